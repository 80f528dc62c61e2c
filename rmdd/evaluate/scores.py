"""What a method's gain is made of: HLR, IOR, LRS and ARS of DD-Ranking (arXiv 2505.13300), translated to retrieval.

Accuracies are R@mean as fractions; every student below is one of ours, read once, after its last pass.

    HLR   full data - the set, both with hard labels: identity similarity, InfoNCE, the rates the experts have
    IOR   the set by its own recipe - random pairs by the same: loss, temperature, updates, and a similarity of the
          same form from a teacher; their rate is chosen on val
    ARS   IOR with augmented students on both sides, and IOR without, averaged

    LRS = f(w IOR - (1 - w) HLR),  ARS = f(g aug + (1 - g) noaug),  f(a) = 100 (e^a - e^-1) / (e - e^-1)

IOR above 0 is the claim: better than random pairs under equal help. Differences are in points, with intervals over the
images of test; f is monotone and of differences between -1 and 1, so percentages in its place would mean nothing.
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
"""How students are augmented for ARS, where the run's own are not augmented otherwise."""
W, GAMMA = 0.5, 0.5


def squashed(alpha: float) -> float:
    """0 to 100 for a difference of fractions between -1 and 1. Raises `ValueError` beyond: those are percentages."""
    if not -1 <= alpha <= 1:
        raise ValueError(f"scores are of fractions, so that their differences lie in -1..1; found {alpha:g}")
    low, high = math.exp(-1), math.exp(1)
    return 100 * (math.exp(alpha) - low) / (high - low)


def lrs(hlr: float, ior: float, w: float = W) -> float:
    """Label-robust score, from fractions."""
    return squashed(w * ior - (1 - w) * hlr)


def ars(aug: float, noaug: float, gamma: float = GAMMA) -> float:
    """Augmentation-robust score, from fractions: the gain over random pairs with augmentation and without."""
    return squashed(gamma * aug + (1 - gamma) * noaug)


def kinds(augment: str) -> tuple[str, str]:
    """The augmentation of augmented students, where a run's own have `augment`, and that of plain ones."""
    return (AUGMENT if augment == "none" else augment), "none"


def choices(rule: config.Evaluate) -> list[Job]:
    """Random pairs by the recipe of the set, at every rate and with either augmentation."""
    draws = range(min(rule.selection_students, rule.baseline_draws))
    return [
        Job("soft_tune", i, lr=lr, augment=kind)
        for kind in kinds(rule.augment)
        for lr in rule.baseline_lrs
        for i in draws
    ]


def chosen_rates(tried: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, float]:
    """The best rate on val, per augmentation."""
    return {
        kind: best_by_val([(job.lr, record) for job, record in tried if job.augment == kind])[0]
        for kind in dict.fromkeys(job.augment for job, _ in tried)
    }


def finals(rule: config.Evaluate, rates: Mapping[str, float]) -> list[Job]:
    """The students that are scored on test."""
    both, students = kinds(rule.augment), range(rule.students)
    jobs = [Job("hard", i) for i in students]
    jobs += [Job("own", i, augment=kind) for kind in both if kind != rule.augment for i in students]
    draws = range(min(rule.students, rule.baseline_draws))
    return jobs + [Job("soft", i, lr=rates[kind], augment=kind) for kind in both for i in draws]


def result(protocol: StudentProtocol, ranks: Mapping[Job, Ranks], rates: Mapping[str, float]) -> dict[str, Any]:
    """The scores, from the ranks of all final students; those of kinds student and full are among them."""

    def of(kind: str, augment: str = "") -> list[Ranks]:
        return [r for job, r in ranks.items() if job.kind == kind and job.augment == augment]

    usual = protocol.rule.augment
    augmented, plain = kinds(usual)
    own = {kind: of("student") if kind == usual else of("own", kind) for kind in (augmented, plain)}
    soft = {kind: of("soft", kind) for kind in (augmented, plain)}
    hard = difference(of("full"), of("hard"))
    gain = {kind: difference(own[kind], soft[kind]) for kind in own}
    ior = gain[usual]
    learned = protocol.similarity != "identity"
    similarity = "sigmoid(teacher cosine / temperature)" if learned else "identity"
    return {
        "points": {
            "HLR": asdict(hard),
            "IOR": asdict(ior),
            "augmented": asdict(gain[augmented]),
            "plain": asdict(gain[plain]),
        },
        "LRS": lrs(_fraction(hard), _fraction(ior)),
        "ARS": ars(_fraction(gain[augmented]), _fraction(gain[plain])),
        "R@mean": {
            "hard": asdict(interval(of("hard"))),
            "full": asdict(interval(of("full"))),
            **{f"own, {kind}": asdict(interval(queries)) for kind, queries in own.items()},
            **{f"random, {kind}": asdict(interval(queries)) for kind, queries in soft.items()},
        },
        "augment": augmented,
        "rates": dict(rates),
        "hard_rates": dict(zip(("image", "text"), protocol.expert_rates, strict=True)),
        "similarity": similarity,
    }


def _fraction(points: Interval) -> float:
    return points.mean / 100
