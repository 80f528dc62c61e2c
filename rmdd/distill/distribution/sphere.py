"""The losses of MDM on the unit sphere: joint image-text features, kernels of angles, and kernel energies.

Symbols: n and m points in the two sets, D joint width. All vectors have unit length. All functions have a derivative
everywhere, also for two points that are equal or opposite.
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
"""Smallest distance of a cosine from +-1, where arccos has no derivative; `unit` also adds it to squared lengths."""
FLOOR = 1e-8
"""Small number added to an energy before the square root, because the root has an infinite derivative at 0."""


def unit(x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Scale rows to unit length; a row of zeros stays near zero, and its gradient stays below 1e3 per entry."""
    return x / (x.square().sum(dim=1, keepdim=True) + NEAR).sqrt()


def agreement(images: Float[Tensor, "n D"], texts: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Return, for each pair, image features plus text features, scaled to unit length."""
    return unit(images + texts)


def discrepancy(images: Float[Tensor, "n D"], texts: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Return, for each pair, image minus text features, scaled to unit length; it is orthogonal to `agreement`."""
    return unit(images - texts)


def kernel(
    a: Float[Tensor, "n D"], b: Float[Tensor, "m D"], sigma: float, kind: Kernel = "geodesic"
) -> Float[Tensor, "n m"]:
    """Return the kernel between all points of `a` and all points of `b`; phi is the angle between two points.

    `geodesic` is exp(-phi^2 / 2 sigma^2) and `laplacian` is exp(-phi / sigma).
    `chordal` is exp(-c^2 / 2 sigma^2), where c is the length of the chord between the points.
    """
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
    """Return the kernel energy between two sets of points, or its square if `root` is false.

    With `u`, the energy is a U-statistic: it leaves out the kernel of a point with itself. The squared energy can then
    be negative; for two samples of one distribution, this happens half of the time. A negative squared energy is set to
    0 before the root is taken, and its gradient is then zero.
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
    """Return the symmetric InfoNCE loss of a batch of pairs."""
    return infonce(images @ texts.T / temperature, torch.eye(len(images), dtype=images.dtype, device=images.device))
