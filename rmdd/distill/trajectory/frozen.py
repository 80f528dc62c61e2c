"""Matching behind a frozen image tower: its features stand for the pictures, and the gradient goes through it once.

The tower is the same in all K steps, so its features of the pairs in use are computed once, the engine runs on
features, and the sum of their gradients is carried back to the pixels in one pass: the same numbers as with the tower
in every step (RepBlend card, section 4), at a fraction of the time. M pairs, D tower width.
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
"""Pictures that go through the tower at once."""


def features_of(tower: Tower, synthetic: Synthetic, batches: Int[Tensor, "K B"]) -> Synthetic:
    """`synthetic` with the features (M, D) of its pictures in their place; rows that no batch uses are zero."""
    used = batches.unique().to(synthetic.images.device)
    with torch.no_grad():
        rows = torch.cat([tower(synthetic.images[part]) for part in used.split(CHUNK)])
    features = rows.new_zeros((synthetic.pairs, rows.shape[1])).index_copy(0, used, rows)
    return dataclasses.replace(synthetic, images=features)


def to_pixels(tower: Tower, synthetic: Synthetic, batches: Int[Tensor, "K B"], found: MetaGradient) -> MetaGradient:
    """`found` with its gradient by features carried back to the pictures of `synthetic`."""
    pixels = torch.zeros_like(synthetic.images)
    for part in batches.unique().to(pixels.device).split(CHUNK):
        images = synthetic.images[part].requires_grad_()
        (pixels[part],) = torch.autograd.grad(tower(images), images, found.gradient.images[part])
    return dataclasses.replace(found, gradient=dataclasses.replace(found.gradient, images=pixels))
