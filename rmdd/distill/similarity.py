"""The learned target similarity of M pairs: a full matrix, a low-rank form, or the fixed identity.

Symbols: M pairs, B of them in a batch, R rank. Rows of the matrix are images and columns are texts. The matrix need not
be symmetric, and its entries are unbounded. Optimisers, checkpoints and distilled sets use this module's tensor names.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd import config


def initial(rule: config.Similarity, pairs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return initial similarity tensors; all kinds start at exactly S = I (low-rank: diagonal 1, right factor 0)."""
    if rule.kind == "full":
        return {"matrix": torch.eye(pairs)}
    if rule.kind == "low_rank":
        return {
            "scale": torch.ones(pairs if rule.diagonal == "vector" else ()),
            "left": torch.randn(pairs, rule.rank, generator=generator),
            "right": torch.zeros(pairs, rule.rank),
        }
    return {}


def per_pair(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the similarity `tensors` with `scale` expanded to one value (omega) per pair, as in distilled sets."""
    if "scale" not in tensors:
        return tensors
    return tensors | {"scale": tensors["scale"].expand(tensors["left"].shape[0]).contiguous()}


def gather(tensors: dict[str, Tensor], index: Int[Tensor, " B"]) -> dict[str, Tensor]:
    """Return the rows and columns of the similarity `tensors` that belong to the pairs at `index`."""
    return {n: t[index][:, index] if n == "matrix" else t[index] if t.ndim else t for n, t in tensors.items()}


def scatter_add(total: dict[str, Tensor], index: Int[Tensor, " B"], parts: dict[str, Tensor]) -> None:
    """Add `parts`, the similarity gradients of a mini-batch, to the entries of `total` for the pairs at `index`."""
    for name, part in parts.items():
        if name == "matrix":
            total[name].index_put_((index[:, None], index[None, :]), part, accumulate=True)
        elif part.ndim:
            total[name].index_add_(0, index, part)
        else:
            total[name].add_(part)


def dense(parts: dict[str, Tensor], alpha: float, like: Float[Tensor, " B *_"]) -> Float[Tensor, "B B"]:
    """Return the similarity matrix S, differentiable: `matrix`, diag(scale) + alpha/R left right^T, or the identity."""
    if "matrix" in parts:
        return parts["matrix"]
    if "left" in parts:
        left, right = parts["left"], parts["right"]
        return torch.diag(parts["scale"].expand(left.shape[0])) + (alpha / left.shape[1]) * (left @ right.T)
    return torch.eye(like.shape[0], dtype=like.dtype, device=like.device)
