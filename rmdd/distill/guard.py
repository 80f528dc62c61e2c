"""Detect that a phase diverged; the loop then returns to the last good state, with halved outer learning rates."""

import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.distill.synthetic import Synthetic


class PhaseDiverged(FloatingPointError):
    """Raised when a phase diverged more often than `guard.retries` allows, or a student at which its paths start did.

    The last good checkpoint of the phase is on disk. The first clause of the message, up to "; ", says what diverged.
    """

    advice = ""
    """Hint that the command line appends to the message; empty, because the message already says how to continue."""


def health_numbers(synthetic: Synthetic, loss: Float[Tensor, ""]) -> Float[Tensor, "4"]:
    """Return four numbers that show whether a phase diverged, on the device of `synthetic`. The first is the sum of the
    loss and of all tensor entries, which is finite only if all of them are. Then come the inner learning rates of the
    image and the text tower, and the largest diagonal entry of the similarity (1 if it is not learned)."""
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


def divergence_reason(numbers: list[float], first_rates: tuple[float, float], rule: config.Distill) -> str | None:
    """Return the reason why a phase diverged, or None if it did not.

    `numbers` is a result of `health_numbers`. `first_rates` are the inner learning rates of the image and the text
    tower at the start of the phase.
    """
    total, *rates, diagonal = numbers
    max_growth = rule.guard.max_rate_growth
    if total != total or abs(total) == float("inf"):
        return "a loss, gradient or tensor stopped being finite"
    for side, rate, first in zip(("image", "text"), rates, first_rates, strict=True):
        if not 1 / max_growth <= rate / first <= max_growth:
            return f"the inner {side} learning rate went from {first:.4g} to {rate:.4g}"
    if rule.guard.dead_similarity and rule.loss == "wbce" and diagonal <= 0.5:
        return f"no pair counts as positive: the largest diagonal entry of the similarity is only {diagonal:.4g}"
    return None
