"""When a phase has derailed, and how it goes on: from its last good state, with halved outer rates."""

import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.distill.synthetic import Synthetic


class Derailed(FloatingPointError):
    """A phase went wrong more often than it may; its last good state is on disk."""

    advice = ""
    """What the command line adds to the message, which here says itself how to go on."""


def vitals(synthetic: Synthetic, loss: Float[Tensor, ""]) -> Float[Tensor, "4"]:
    """Four numbers that tell whether a phase is alive, still on its device: the sum of all that must be finite,
    both inner rates, and the largest diagonal entry of a learned similarity (1 without one)."""
    total = torch.stack([loss, *(t.sum() for t in synthetic.tensors().values())]).sum()
    return torch.stack([total, synthetic.lr_image, synthetic.lr_text, _diagonal(synthetic).amax()])


def _diagonal(synthetic: Synthetic) -> Tensor:
    parts = synthetic.similarity
    if "matrix" in parts:
        return parts["matrix"].diagonal()
    if "left" in parts:
        left, right = parts["left"], parts["right"]
        return parts["scale"] + synthetic.alpha / left.shape[1] * (left * right).sum(dim=1)
    return synthetic.lr_image.new_ones(1)


def what_is_wrong(numbers: list[float], first_rates: tuple[float, float], rule: config.Distill) -> str | None:
    """Why a phase with these `vitals`, which began with `first_rates`, has derailed, or None."""
    total, *rates, diagonal = numbers
    most = rule.guard.max_rate_growth
    if total != total or abs(total) == float("inf"):
        return "a loss, gradient or tensor stopped being finite"
    for side, rate, first in zip(("image", "text"), rates, first_rates, strict=True):
        if not 1 / most <= rate / first <= most:
            return f"the inner {side} rate went from {first:.4g} to {rate:.4g}"
    if rule.guard.dead_similarity and rule.loss == "wbce" and diagonal <= 0.5:
        return f"the similarity is dead: its largest diagonal entry is {diagonal:.4g}, so no pair is a positive"
    return None
