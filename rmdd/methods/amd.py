"""AMD: asynchronous matching with dynamic sampling (ICLR 2026), on a LoRS loop.

Text heads move most in the first epochs, image towers later, so one start epoch for both is wrong for one of them.
Starts are drawn independently, t_V ~ U{0..R_V} and t_L ~ U{0..R_L}, from ranges found in the experts:

    drift   D_m(t) = | mean over experts of theta_m(t) - the same at t - 1 |,  m = image V, text L
    ratio   r(t) = D_V(t) / D_L(t), threshold T its median;  R_V = min{t: r(t) > T},  R_L = max{t: r(t) <= T}

and the set starts from prototypes: pairs nearest to the k-means centres of image and text embeddings side by side. From
notes on the paper, which has no code; its rule for R_V is an odd one, and `options.ranges: stated` takes ranges by
hand. Prototypes are found by `rmdd.distill.starts`, where every method may ask for them (`init: prototypes`).
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
            "independent", description="independent: a start epoch for each tower; together: one for both"
        )
        ranges: Literal["drift", "stated"] = Field(
            "drift", description="drift finds each tower's range of starts from the experts"
        )

    options: Options
    plain_options: ClassVar[dict[str, Any]] = {"ranges": "stated", "starts": "together"}
    card = "ICLR 2026"
    verified = (
        "ranges of planted drifts, prototypes and steps equal slow float64 ones; as LoRS on emoji. "
        "Open: published figures"
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
                "distill.options.ranges: drift gives each tower its own range; set distill.options.starts: independent"
            )
        if rule.start_rule == "inclusive":
            mistakes.append(
                "distill.options.ranges: drift finds whole epochs, ends included; set distill.start_rule: exclusive"
            )
        if run.experts.keep == "endpoints":
            mistakes.append("distill.options.ranges 'drift' reads every epoch; set experts.keep: all")
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
    """The half-open range of start epochs per tower, up to the start `last`; the whole of it where all ratios agree."""
    drift = mean_drift(store, experts)
    ratio = drift["image"] / (drift["text"] + np.finfo(np.float64).eps)
    above = ratio > np.median(ratio)
    epochs = np.arange(1, store.epochs + 1)
    reach = {
        "image": int(epochs[above].min()) if above.any() else last,
        "text": int(epochs[~above].max()) if above.any() else last,
    }
    for tower, found in reach.items():
        if found > last:
            _logger.warning("%s starts up to epoch %d are cut at %d, where the path ends", tower, found, last)
    return {tower: (0, min(r, last) + 1) for tower, r in reach.items()}


def mean_drift(store: Store, experts: Sequence[int]) -> dict[str, np.ndarray]:
    """Per tower, how far the mean of the experts moves in each epoch, (epochs,)."""
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
