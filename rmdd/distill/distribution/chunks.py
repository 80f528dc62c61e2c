"""Compute the exact gradient of a loss that depends on all pairs, with the graph of one chunk of pairs in memory.

First, all features are computed without an autograd graph, and the loss is differentiated with respect to the features.
Then each chunk is encoded again, with a graph, and its feature gradients are propagated to its images and texts. The
features of a pair must not depend on the other pairs in the chunk, so encoders must not use batch statistics.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function that encodes pairs: (images, texts) -> (image features, text features)."""
LossOf = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Loss function on features: (image features, text features) -> (loss, terms of the loss by name)."""


def gradient_in_chunks(
    encode: Encode,
    images: Tensor,
    texts: Tensor,
    loss_of: LossOf,
    chunk: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the gradients of the loss with respect to `images` and `texts`, and the values of the loss terms."""
    pieces = list(zip(images.split(chunk), texts.split(chunk), strict=True))
    if len(pieces) == 1:
        leaves = [t.detach().requires_grad_() for t in pieces[0]]
        loss, parts = loss_of(*encode(*leaves))
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return grads[0], grads[1], _detached(parts)
    with torch.no_grad():
        encoded = [encode(*piece) for piece in pieces]
    features = [torch.cat(side).requires_grad_() for side in zip(*encoded, strict=True)]
    loss, parts = loss_of(*features)
    on_features = torch.autograd.grad(loss, features, materialize_grads=True)
    on_inputs: list[list[Tensor]] = [[], []]
    for piece, *share in zip(pieces, *(g.split(chunk) for g in on_features), strict=True):
        leaves = [t.detach().requires_grad_() for t in piece]
        for side, grad in enumerate(
            torch.autograd.grad(encode(*leaves), leaves, grad_outputs=share, materialize_grads=True)
        ):
            on_inputs[side].append(grad)
    return torch.cat(on_inputs[0]), torch.cat(on_inputs[1]), _detached(parts)


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in parts.items()}
