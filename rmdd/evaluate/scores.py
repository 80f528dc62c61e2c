"""Scores HLR, IOR, LRS and ARS of DD-Ranking (arXiv 2505.13300), adapted to retrieval.

The scores separate the gain of a distilled set from the gain of soft labels and augmentation. HLR and IOR are
differences of accuracies. An accuracy is R@mean on test, as a fraction, after the last pass of students trained by our
protocol:

    HLR   full data minus the set, both with hard labels: identity similarity, InfoNCE, the experts' learning rates
    IOR   the set minus random pairs, both with the set's loss, temperature, number of updates and form of similarity
          (the similarity of random pairs is computed by a teacher, their learning rate is chosen on val)
    aug, noaug   IOR of students trained with and without augmentation

    LRS = f(w IOR - (1 - w) HLR),  ARS = f(g aug + (1 - g) noaug),  f(a) = 100 (e^a - e^-1) / (e - e^-1)

If IOR is above 0, the set is better than random pairs with the same settings. `evaluation.json` gives HLR and IOR in
percentage points, with intervals over the images of test. f is defined for differences of fractions, from -1 to 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rmdd import config
from rmdd.evaluate.bootstrap import Interval, difference, interval
from rmdd.evaluate.protocol import Job, StudentProtocol, best_by_val
from rmdd.evaluate.retrieval import Ranks

AUGMENT = "dsa"
"""Augmentation with which the score ARS trains its augmented students if the run sets no augmentation."""
W, GAMMA = 0.5, 0.5


def scaled(alpha: float) -> float:
    """Map `alpha`, a difference of fractions, from -1..1 to 0..100 by f. Raise `ValueError` for any other `alpha`."""
    if not -1 <= alpha <= 1:
        raise ValueError(
            f"alpha must be a difference of fractions in -1..1, found {alpha:g}; divide percentage points by 100"
        )
    low, high = math.exp(-1), math.exp(1)
    return 100 * (math.exp(alpha) - low) / (high - low)


def lrs(hlr: float, ior: float, w: float = W) -> float:
    """Return the label-robust score LRS (0 to 100) from the scores HLR and IOR, given as fractions."""
    return scaled(w * ior - (1 - w) * hlr)


def ars(aug: float, noaug: float, gamma: float = GAMMA) -> float:
    """Return the augmentation-robust score ARS (0 to 100) from IOR with (`aug`) and without (`noaug`) augmentation."""
    return scaled(gamma * aug + (1 - gamma) * noaug)


def augmentations(augment: str) -> tuple[str, str]:
    """Return the two augmentations that the score ARS compares: the run's `augment` (by default `AUGMENT`) and none."""
    return (AUGMENT if augment == "none" else augment), "none"


def tuning_jobs(rule: config.Evaluate) -> list[Job]:
    """Return the jobs that try each learning rate on random pairs, to choose one per augmentation on val."""
    draws = range(min(rule.selection_students, rule.baseline_draws))
    return [
        Job("soft_tune", i, lr=lr, augment=kind)
        for kind in augmentations(rule.augment)
        for lr in rule.baseline_lrs
        for i in draws
    ]


def chosen_rates(tried: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, float]:
    """Return for each augmentation the learning rate with the highest mean R@mean on val."""
    return {
        kind: best_by_val([(job.lr, record) for job, record in tried if job.augment == kind])[0]
        for kind in dict.fromkeys(job.augment for job, _ in tried)
    }


def final_jobs(rule: config.Evaluate, rates: Mapping[str, float]) -> list[Job]:
    """Return the jobs of the kinds hard, own and soft, whose students are scored on test."""
    kinds, students = augmentations(rule.augment), range(rule.students)
    jobs = [Job("hard", i) for i in students]
    jobs += [Job("own", i, augment=kind) for kind in kinds if kind != rule.augment for i in students]
    draws = range(min(rule.students, rule.baseline_draws))
    return jobs + [Job("soft", i, lr=rates[kind], augment=kind) for kind in kinds for i in draws]


def result(protocol: StudentProtocol, ranks: Mapping[Job, Ranks], rates: Mapping[str, float]) -> dict[str, Any]:
    """Return the `scores` section of `evaluation.json` from the test ranks of all final jobs."""

    def of(kind: str, augment: str = "") -> list[Ranks]:
        return [r for job, r in ranks.items() if job.kind == kind and job.augment == augment]

    default = protocol.rule.augment
    augmented, plain = augmentations(default)
    distilled = {kind: of("student") if kind == default else of("own", kind) for kind in (augmented, plain)}
    random = {kind: of("soft", kind) for kind in (augmented, plain)}
    hlr = difference(of("full"), of("hard"))
    gain = {kind: difference(distilled[kind], random[kind]) for kind in distilled}
    ior = gain[default]
    learned = protocol.similarity != "identity"
    similarity = "sigmoid(teacher cosine / temperature)" if learned else "identity"
    return {
        "points": {
            "HLR": asdict(hlr),
            "IOR": asdict(ior),
            "augmented": asdict(gain[augmented]),
            "plain": asdict(gain[plain]),
        },
        "LRS": lrs(_fraction(hlr), _fraction(ior)),
        "ARS": ars(_fraction(gain[augmented]), _fraction(gain[plain])),
        "R@mean": {
            "hard": asdict(interval(of("hard"))),
            "full": asdict(interval(of("full"))),
            **{f"own, {kind}": asdict(interval(queries)) for kind, queries in distilled.items()},
            **{f"random, {kind}": asdict(interval(queries)) for kind, queries in random.items()},
        },
        "augment": augmented,
        "rates": dict(rates),
        "hard_rates": dict(zip(("image", "text"), protocol.expert_rates, strict=True)),
        "similarity": similarity,
    }


def _fraction(points: Interval) -> float:
    return points.mean / 100
