"""DATM: difficulty-aligned trajectory matching (arXiv 2310.05773), on image-text pairs.

Early epochs teach easy patterns, late ones hard patterns. So the range of start epochs grows while a set is distilled,
and larger budgets end with later ranges. With T0 = `grow_from`, T+ = `stop` and i_end = `grow_until`,

    U(i) = min(T+, T0 + floor((T+ - T0) i / i_end)),      start ~ Uniform{T-, ..., U(i) - 1}

U is `growing_stop`; all else is LoRS. DATM's other parts are for classification: its learned soft
labels are what the learned similarity is for pairs; its loss threshold is `distill.skip_above`, off here, for it is set
for losses of another size.
"""

from collections.abc import Mapping
from typing import ClassVar

from rmdd import config
from rmdd.config.runfile import filled
from rmdd.distill.phases import Draw
from rmdd.methods.lors import LoRS


class DATM(LoRS):
    grows: ClassVar[bool] = True
    card = "2310.05773"
    verified = (
        "growing ranges and steps equal slow float64 ones; below LoRS on emoji, as published. Open: published figures"
    )
    # the range for 100 pairs and 10 epochs is ours: the paper prints none for pairs
    defaults = filled(
        {
            "distill": {
                "phases": [{"pairs": 99, "start": 0, "stop": 4, "grow_from": 2, "grow_until": 1500, "iterations": 3000}]
            }
        },
        LoRS.defaults,
    )

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> Draw:
        plan = self.rule.phases[phase]
        grown = {tower: (low, growing_stop(plan, stop, iteration)) for tower, (low, stop) in ranges.items()}
        return super().draw(phase, iteration, experts, grown)


def growing_stop(phase: config.Phase, stop: int | float, iteration: int) -> int | float:
    """The exclusive upper bound U(i) of the start epochs at an iteration counted from 0; `stop` where none grows."""
    if phase.grow_from is None or phase.grow_until is None:
        return stop
    return min(stop, phase.grow_from + max(0, stop - phase.grow_from) * iteration // phase.grow_until)
