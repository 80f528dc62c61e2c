"""Distributions of image-text features on the unit sphere: joint features, kernels of angles, and their energy (MDM).

n, m points of two sets, D joint width. All vectors have unit length; all functions are differentiable, at coinciding
and at opposite points too.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rmdd.models.losses import infonce

Kernel = Literal["geodesic", "laplacian", "chordal"]
Statistic = Literal["v", "u"]

NEAR = 1e-6
"""How far a cosine stays from +-1, where arccos has no derivative; also what an empty vector is taken for, squared."""
FLOOR = 1e-8
"""Under the root of an energy, whose derivative is infinite at 0."""


def unit(x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Rows at unit length; one that vanishes stays near 0 with a gradient below 1e3 an entry."""
    return x / (x.square().sum(dim=1, keepdim=True) + NEAR).sqrt()


def agreement(images: Float[Tensor, "n D"], texts: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """The direction in which image and text agree."""
    return unit(images + texts)


def discrepancy(images: Float[Tensor, "n D"], texts: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """The direction in which they differ, orthogonal to the other."""
    return unit(images - texts)


def kernel(
    a: Float[Tensor, "n D"], b: Float[Tensor, "m D"], sigma: float, kind: Kernel = "geodesic"
) -> Float[Tensor, "n m"]:
    """exp(-phi^2 / 2 sigma^2) of the angle phi; `laplacian`: exp(-phi / sigma); `chordal`: with the chord for phi."""
    cosine = a @ b.T
    if kind == "chordal":
        return (-(1 - cosine) / sigma**2).exp()
    angle = cosine.clamp(NEAR - 1, 1 - NEAR).arccos()
    return (-angle / sigma).exp() if kind == "laplacian" else (-angle.square() / (2 * sigma**2)).exp()


def energy(
    a: Float[Tensor, "n D"],
    b: Float[Tensor, "m D"],
    sigma: float,
    kind: Kernel = "geodesic",
    statistic: Statistic = "v",
    root: bool = True,
) -> Float[Tensor, ""]:
    """Kernel energy between two sets of points, squared where `root` is false.

    The U-statistic leaves a point's kernel with itself out. Under the root, what lies below 0 counts as 0 and has no
    gradient: so it is with half of the U-statistics of two samples of one distribution.
    """
    within = _mean(kernel(a, a, sigma, kind), statistic) + _mean(kernel(b, b, sigma, kind), statistic)
    squared = within - 2 * kernel(a, b, sigma, kind).mean()
    return (squared.clamp(min=0) + FLOOR).sqrt() if root else squared


def _mean(k: Float[Tensor, "n n"], statistic: Statistic) -> Float[Tensor, ""]:
    if statistic == "v":
        return k.mean()
    n = len(k)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1) if n > 1 else math.inf)


def contrastive(images: Float[Tensor, "n D"], texts: Float[Tensor, "n D"], temperature: float) -> Float[Tensor, ""]:
    """Symmetric cross entropy of the pairs of a batch among each other."""
    return infonce(images @ texts.T / temperature, torch.eye(len(images), dtype=images.dtype, device=images.device))
