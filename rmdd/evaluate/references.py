"""How each paper's released code trains and scores a student: a value per protocol, as coded, traps included.

`evaluate.reference` names one; its score, `test_best_reference`, is for comparison with printed tables alone and never
feeds a choice. Counts are passes over a subset: `range(E + 1)` of the released loops makes 101 of E = 100.

What all share: SGD, a tower that starts from the same weights with fresh heads, cosines divided by 0.07 whatever a set
was distilled with, and the test split.
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
    """One protocol. A set of several subsets goes through it as through PTM-ST's: one optimiser and one drop for all,
    at the rates of the last."""

    name: str
    loss: str
    schedule: StudentSchedule
    lr: float | None
    """One rate for what is trained; None: the learned ones."""
    every: int | None
    """Passes between scorings; None: only after the last."""
    first: int
    """The pass after which it is first scored."""
    reported: Literal["best", "last"]
    """Which scoring is quoted; best is by R@mean on the split that is quoted."""
    students: int
    temperature: float = TEMPERATURE

    @property
    def points(self) -> tuple[int, ...]:
        """Passes of each subset after which students are scored."""
        return (
            (self.schedule.epochs,)
            if self.every is None
            else tuple(range(self.first, self.schedule.epochs + 1, self.every))
        )

    def split(self, layout: str | None) -> Literal["val", "test"]:
        """Where it is scored. EDGE takes CC3M's validation file for its test."""
        return "val" if self.name == "edge" and layout == "cc3m" else "test"

    def adapted(self, subsets: Sequence[TrainingPairs]) -> Sequence[TrainingPairs]:
        """The pairs as its student takes them: InfoNCE has no similarity, and a fixed rate replaces learned ones."""
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
        # subsets 2.. run at a tenth of the rate: the drop lies inside the first
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
        # its drop comes after the last pass; both sides learn at the image rate
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
        # which of its 20 scorings is quoted is not coded; we take the last
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
    """The protocol that a run is also scored by. None: switched off, or `auto` with a method that has none.

    A named one is as coded. `auto` takes that of the run's method to the scale of the run: loss, batch, momentum,
    decay, temperature and number of students are the run's. Presets named after a paper state the paper's, so that
    there the two are one; small runs on plain SGD would diverge with momentum at the rates that they learned without.
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
