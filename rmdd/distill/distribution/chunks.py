"""The exact gradient of a loss on features of all pairs, at the memory of a few.

Features are computed without a graph, the loss is differentiated by them, and each chunk is encoded again to carry its
share back to pictures and texts. The encoder must give a pair the same features whatever stands beside it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Pictures and texts of some pairs to their features."""
LossOf = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Image and text features to the loss and its parts."""


def gradient_in_chunks(
    encode: Encode,
    images: Tensor,
    texts: Tensor,
    loss_of: LossOf,
    chunk: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The gradients of `loss_of(image features, text features)`, which also gives its parts, by pictures and texts."""
    pieces = list(zip(images.split(chunk), texts.split(chunk), strict=True))
    if len(pieces) == 1:
        leaves = [t.detach().requires_grad_() for t in pieces[0]]
        loss, parts = loss_of(*encode(*leaves))
        by = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return by[0], by[1], _told(parts)
    with torch.no_grad():
        seen = [encode(*piece) for piece in pieces]
    whole = [torch.cat(side).requires_grad_() for side in zip(*seen, strict=True)]
    loss, parts = loss_of(*whole)
    shares = torch.autograd.grad(loss, whole, materialize_grads=True)
    found: list[list[Tensor]] = [[], []]
    for piece, *share in zip(pieces, *(s.split(chunk) for s in shares), strict=True):
        leaves = [t.detach().requires_grad_() for t in piece]
        for side, grad in enumerate(
            torch.autograd.grad(encode(*leaves), leaves, grad_outputs=share, materialize_grads=True)
        ):
            found[side].append(grad)
    return torch.cat(found[0]), torch.cat(found[1]), _told(parts)


def _told(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in parts.items()}
