"""AMD: asynchronous matching with dynamic sampling (ICLR 2026), built on LoRS.

In the experts, text heads move most in the first epochs and image towers move most in later ones. One start epoch for
both towers therefore fits only one of them. AMD draws the two start epochs independently: t_V ~ U{0..R_V} for the image
tower and t_L ~ U{0..R_L} for the text head. It computes the upper bounds R_V and R_L from the experts:

    drift   D_m(t) = || mean_m(t) - mean_m(t - 1) ||,  mean_m(t) = mean over experts of theta_m(t),  m = V or L
    ratio   r(t) = D_V(t) / D_L(t), with threshold T = median of r
    bounds  R_V = min{t: r(t) > T},  R_L = max{t: r(t) <= T}

The initial pairs are prototypes (`distill.init: prototypes`, an option of every trajectory-matching method). Image and
text embeddings are concatenated and clustered by k-means; the pair nearest to each centre is a prototype.

No code was released; this file follows notes on the paper. The rule for R_V is unusual: it ends the range of the image
tower at the first epoch with a high ratio. `options.ranges: stated` takes the ranges from the run file instead.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rmdd import config
from rmdd.config.runfile import filled
from rmdd.experts.store import Store
from rmdd.methods.lors import LoRS
from rmdd.models.dual import TOWERS, Params, tower_of

_logger = logging.getLogger(__name__)


class AMD(LoRS):
    class Options(LoRS.Options):
        starts: Literal["independent", "together"] = Field(
            "independent", description="independent: draw one start epoch per tower; together: one epoch for both"
        )
        ranges: Literal["drift", "stated"] = Field(
            "drift",
            description="drift: compute the start range of each tower from the experts; stated: use the ranges in "
            "distill.phases",
        )

    options: Options
    plain_options: ClassVar[dict[str, Any]] = {"ranges": "stated", "starts": "together"}
    card = "ICLR 2026"
    verified = (
        "Tests: the start ranges, prototypes and updates equal those of a slow float64 implementation. On emoji pairs, "
        "AMD scores like LoRS. Not verified: the published numbers, which need a GPU."
    )
    defaults = filled({"distill": {"init": "prototypes"}}, LoRS.defaults)

    @classmethod
    def starts_apart(cls, rule: config.Distill) -> bool:
        return (rule.options_as(cls.Options) or cls.Options()).starts == "independent"

    @classmethod
    def states_ranges(cls, rule: config.Distill) -> bool:
        return (rule.options_as(cls.Options) or cls.Options()).ranges == "stated"

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        mistakes, rule = super().clashes(run), run.distill
        if cls.states_ranges(rule):
            return mistakes
        if not cls.starts_apart(rule):
            mistakes.append(
                "distill.options.ranges: drift computes one range per tower; set distill.options.starts: independent"
            )
        if rule.start_rule == "inclusive":
            mistakes.append(
                "distill.options.ranges: drift already includes the last start epoch; set distill.start_rule: exclusive"
            )
        if run.experts.keep == "endpoints":
            mistakes.append("distill.options.ranges 'drift' reads the experts at every epoch; set experts.keep: all")
        return mistakes

    @classmethod
    def endpoint_of(cls, rule: config.Distill, epochs: int, phase: int) -> int:
        if rule.trajectory == "original" and not cls.states_ranges(rule):
            return epochs
        return super().endpoint_of(rule, epochs, phase)

    def ranges(self, store: Store, experts: Sequence[int], phase: int) -> dict[str, tuple[int, int]]:
        if self.options.ranges == "stated":
            return super().ranges(store, experts, phase)
        return drift_ranges(store, experts, self.run.endpoint_of(phase) - self.rule.match_epochs)


def drift_ranges(store: Store, experts: Sequence[int], last: int) -> dict[str, tuple[int, int]]:
    """Return the half-open range of start epochs of each tower, computed from the result of `mean_drift`.

    No range goes beyond epoch `last`. If no ratio of image drift to text drift exceeds the median ratio, both ranges
    end at `last`.
    """
    drift = mean_drift(store, experts)
    ratio = drift["image"] / (drift["text"] + np.finfo(np.float64).eps)
    above = ratio > np.median(ratio)
    epochs = np.arange(1, store.epochs + 1)
    reach = {
        "image": int(epochs[above].min()) if above.any() else last,
        "text": int(epochs[~above].max()) if above.any() else last,
    }
    for tower, epoch in reach.items():
        if epoch > last:
            _logger.warning(
                "the %s start range ends at epoch %d; it is cut to %d, the last start whose target is on the path",
                tower,
                epoch,
                last,
            )
    return {tower: (0, min(r, last) + 1) for tower, r in reach.items()}


def mean_drift(store: Store, experts: Sequence[int]) -> dict[str, np.ndarray]:
    """Return an array (epochs,) per tower: the distance by which the experts' mean parameters move in each epoch."""
    squares = {tower: np.zeros(store.epochs) for tower in TOWERS}
    before = _mean(store, experts, 0)
    for epoch in range(1, store.epochs + 1):
        now = _mean(store, experts, epoch)
        for name in now:
            squares[tower_of(name)][epoch - 1] += float((now[name] - before[name]).square().sum())
        before = now
    return {tower: np.sqrt(s) for tower, s in squares.items()}


def _mean(store: Store, experts: Sequence[int], epoch: int) -> Params:
    total: Params = {}
    for expert in experts:
        for name, p in store.read(expert, epoch).items():
            total[name] = total.get(name, 0) + p.double() / len(experts)
    return total
