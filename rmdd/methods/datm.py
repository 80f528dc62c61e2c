"""DATM: difficulty-aligned trajectory matching (arXiv 2310.05773), adapted to image-text pairs.

Early expert epochs teach easy patterns and late epochs teach hard ones. DATM therefore lets the range of start epochs
grow during distillation, and uses later ranges for larger budgets. At iteration i, with T- = `start`, T0 = `grow_from`,
T+ = `stop` and i_end = `grow_until` (fields of `distill.phases`),

    U(i) = min(T+, T0 + floor((T+ - T0) i / i_end)),      start ~ Uniform{T-, ..., U(i) - 1}

`growing_stop` computes U. All other steps are those of LoRS. DATM was published for classification. Its learned soft
labels correspond to LoRS's learned similarity. Its loss threshold is `distill.skip_above`, which is off here, because
the published threshold fits losses of a different scale.
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
        "Tests: the growing start ranges and the updates equal those of a slow float64 implementation. On emoji pairs, "
        "DATM scores lower than LoRS; the results published with PTM-ST have the same order. Not verified: the "
        "published numbers, which need a GPU."
    )
    # We chose this start range for 100 pairs and 10 expert epochs; the paper has none for image-text pairs.
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
    """Return U(i), the exclusive upper bound of the start epochs at iteration `iteration` (counted from 0).

    Return `stop` unchanged if the phase sets no `grow_from`.
    """
    if phase.grow_from is None or phase.grow_until is None:
        return stop
    return min(stop, phase.grow_from + max(0, stop - phase.grow_from) * iteration // phase.grow_until)
