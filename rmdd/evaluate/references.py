"""Protocols that train and score students as the released code of each paper does, including its mistakes.

`evaluate.reference` selects one protocol. The score of this protocol, `test_best_reference`, is only compared with the
paper's tables and never used for a choice. Epochs are passes over a subset. Released loops over `range(E + 1)` make one
more than E passes, such as 101 for E = 100.

All protocols use SGD, the initial image tower of the run, new heads, the test split, and temperature 0.07 even if the
set was distilled with a different temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rmdd import config
from rmdd.config import recipes
from rmdd.evaluate.students import StudentSchedule, TrainingPairs

TEMPERATURE = 0.07


@dataclass(frozen=True)
class Reference:
    """One released protocol. On a set with several subsets, students train as in PTM-ST's code: all subsets share one
    optimiser, one drop of the learning rate, and the learned rates of the last subset."""

    name: str
    loss: str
    schedule: StudentSchedule
    lr: float | None
    """Learning rate of all trained parameters; None: students use the learned learning rates of the set."""
    every: int | None
    """Number of passes between two scorings; None: students are scored once, after the last pass."""
    first: int
    """Number of passes before students are scored for the first time."""
    reported: Literal["best", "last"]
    """Which of several scorings the paper reports: the last, or the best (the one with the highest R@mean)."""
    students: int
    temperature: float = TEMPERATURE

    @property
    def points(self) -> tuple[int, ...]:
        """Numbers of passes over each subset after which students are scored."""
        return (
            (self.schedule.epochs,)
            if self.every is None
            else tuple(range(self.first, self.schedule.epochs + 1, self.every))
        )

    def split(self, layout: str | None) -> Literal["val", "test"]:
        """Return the split on which students are scored; EDGE uses CC3M's validation file as its test split."""
        return "val" if self.name == "edge" and layout == "cc3m" else "test"

    def adapted(self, subsets: Sequence[TrainingPairs]) -> Sequence[TrainingPairs]:
        """Return the pairs as this protocol uses them: identity similarity for InfoNCE, learning rate `lr` if set."""
        if self.loss == "infonce":
            subsets = [replace(x, similarity=torch.eye(len(x.images)).to(x.similarity)) for x in subsets]
        if self.lr is not None:
            subsets = [replace(x, lr_image=self.lr, lr_text=self.lr) for x in subsets]
        return subsets


_LEARNED = StudentSchedule(
    epochs=101, batch=128, momentum=0.9, weight_decay=5e-4, drop_after=51, drop=0.1, chain=True, rates="last"
)

REFERENCES = {
    r.name: r
    for r in (
        Reference("lors", "wbce", _LEARNED, lr=None, every=10, first=1, reported="best", students=5),
        # The learning rate drops during the first subset, so all later subsets use a tenth of it.
        Reference("ptm_st", "wbce", _LEARNED, lr=None, every=10, first=1, reported="best", students=5),
        Reference(
            "repblend",
            "wbce",
            replace(_LEARNED, trains="heads"),
            lr=None,
            every=20,
            first=1,
            reported="best",
            students=1,
        ),
        # The code of MTT-VL lowers the learning rate only after the last pass, without effect, so `drop_after` is None.
        # Both towers use the image learning rate.
        Reference(
            "mtt_vl",
            "infonce",
            replace(_LEARNED, epochs=51, batch=64, drop_after=None, text_rate="image", batches="cut"),
            lr=None,
            every=None,
            first=51,
            reported="last",
            students=5,
        ),
        Reference(
            "mdm",
            "infonce",
            replace(_LEARNED, epochs=100, batch=256, batches="cut", augment="dsa"),
            lr=0.1,
            every=None,
            first=100,
            reported="last",
            students=5,
        ),
        Reference(
            "pds",
            "infonce",
            replace(_LEARNED, trains="text head"),
            lr=0.2,
            every=10,
            first=1,
            reported="best",
            students=5,
        ),
        # The code of EDGE does not say which of its 20 scorings the paper reports; we use the last.
        Reference(
            "edge",
            "infonce",
            replace(
                _LEARNED,
                epochs=100,
                batch=64,
                momentum=0.0,
                weight_decay=0.0,
                drop_after=None,
                batches="cut_full",
                augment="randaugment",
            ),
            lr=0.1,
            every=5,
            first=5,
            reported="last",
            students=1,
        ),
    )
}


def reference_of(rule: config.Evaluate, method: str, loss: str, temperature: float) -> Reference | None:
    """Return the released protocol by which a run is also scored; None for `none`, or if `auto` finds none.

    A protocol chosen by name is reproduced as coded. `auto` takes the protocol of the run's method, but the run's own
    batch, momentum, weight decay and number of students; if rates are learned, also the run's loss and temperature.
    Presets named after a paper set the paper's values, so `auto` and the name give the same protocol there. Small runs
    need values of their own: students with momentum would diverge with learning rates learned without momentum.
    """
    if rule.reference == "none":
        return None
    if rule.reference != "auto":
        return REFERENCES[rule.reference]
    name = recipes.find(method).reference
    if name is None:
        return None
    reference = REFERENCES[name]
    scaled = replace(reference.schedule, batch=rule.batch, momentum=rule.momentum, weight_decay=rule.weight_decay)
    if reference.lr is None:
        reference = replace(reference, loss=loss, temperature=temperature)
    return replace(reference, schedule=scaled, students=rule.students)
