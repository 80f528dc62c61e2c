"""Trajectory matching with a frozen image tower: match on its features, then carry the gradient back to the pixels.

The frozen tower is the same in all K inner steps. So it computes the features of all pairs in the mini-batches once,
and the engine (`rmdd.distill.unroll`) trains the student on these features. The gradients of the features are summed
over the steps and propagated to the pixels in one pass. RepBlend runs the tower in every step instead, which gives the
same result but takes much longer. Symbols: M pairs, D width of the tower's features.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from rmdd.distill.synthetic import Synthetic
from rmdd.distill.unroll import MetaGradient

Tower = Callable[[Tensor], Tensor]

CHUNK = 32
"""Number of images per forward pass of the frozen tower."""


def features_of(tower: Tower, synthetic: Synthetic, batches: Int[Tensor, "K B"]) -> Synthetic:
    """Return `synthetic` with images replaced by their features (M, D); a pair that is in no mini-batch gets zeros."""
    used = batches.unique().to(synthetic.images.device)
    with torch.no_grad():
        rows = torch.cat([tower(synthetic.images[part]) for part in used.split(CHUNK)])
    features = rows.new_zeros((synthetic.pairs, rows.shape[1])).index_copy(0, used, rows)
    return dataclasses.replace(synthetic, images=features)


def to_pixels(tower: Tower, synthetic: Synthetic, batches: Int[Tensor, "K B"], matched: MetaGradient) -> MetaGradient:
    """Convert the gradient `matched` for features to a gradient for the pixels of `synthetic`."""
    pixels = torch.zeros_like(synthetic.images)
    for part in batches.unique().to(pixels.device).split(CHUNK):
        images = synthetic.images[part].requires_grad_()
        (pixels[part],) = torch.autograd.grad(tower(images), images, matched.gradient.images[part])
    return dataclasses.replace(matched, gradient=dataclasses.replace(matched.gradient, images=pixels))
