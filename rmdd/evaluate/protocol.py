"""Who is scored against whom: distilled set, random pairs at the same budget, full data.

Each row of the result table comes from jobs that know nothing of one another, so they run side by side:

    select     a student on one snapshot, scored on val only; the best snapshot is exported
    tune       random pairs with one loss and rate, scored on val only; the best rate trains the baseline
    student    the exported set: a curve on val, then val and test once at the last pass
    baseline   random pairs at the chosen loss and rate: val and test once
    reference  the released protocol: the best *test* score over its passes, for comparison with papers only
    full       an expert trained on all pairs: val and test once
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rmdd import config
from rmdd.data.material import Material
from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, enlarged
from rmdd.evaluate.lessons import real_lesson
from rmdd.evaluate.retrieval import Recalls
from rmdd.evaluate.students import Diverged, Lesson, reference_rule, score, train_student
from rmdd.models.dual import DualEncoder, build
from rmdd.seeding import generator

Kind = Literal["select", "tune", "student", "baseline", "reference", "full"]


@dataclass(frozen=True)
class Job:
    """One student. `index` is the student (or draw, or expert); the rest says what it learns from."""

    kind: Kind
    index: int
    snapshot: int = -1
    loss: str = ""
    lr: float = 0.0

    @property
    def name(self) -> str:
        extra = (
            f"-{self.snapshot:02d}"
            if self.kind == "select"
            else f"-{self.loss}-{self.lr:g}"
            if self.kind == "tune"
            else ""
        )
        return f"{self.kind}{extra}-{self.index:03d}"


def lesson_of(synthetic: Synthetic, image_size: int) -> Lesson:
    """What a student learns from one distilled subset, its pictures enlarged to `image_size`."""
    s = similarity.dense(synthetic.similarity, synthetic.alpha, synthetic.texts)
    images = enlarged(synthetic.images, image_size)
    return Lesson(images, synthetic.texts, s, float(synthetic.lr_image), float(synthetic.lr_text))


def random_lesson(run: config.Run, train: Material, draw: int, lr: float) -> Lesson:
    """`budget` real caption records drawn uniformly, identity similarity, one rate for both towers."""
    total = len(train.split.captions)
    pairs = min(run.distill.budget, total)
    records = torch.randperm(total, generator=generator(run.seed_of("evaluate"), "random pairs", draw))[:pairs].tolist()
    return real_lesson(run, train, records, lr)


def updates(run: config.Run) -> int:
    """Steps that a student of the distilled set makes; one of random pairs gets as many."""
    rule = run.evaluate
    return sum(-(-p.pairs // rule.batch) * rule.epochs for p in run.distill.phases)


def train_and_score(
    job: Job,
    run: config.Run,
    lessons: Sequence[Lesson],
    val: Material,
    test: Material | None,
    device: torch.device,
    on_pass: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run one student job and return its record; `test` is scored only by kinds that report it,
    and None for the others, which choose."""
    rule = run.evaluate
    loss = job.loss or run.distill.loss
    seed = run.seed_of("evaluate")
    if job.kind == "reference":
        rule = reference_rule(rule)
    if job.kind in ("tune", "baseline"):
        passes = round(updates(run) / -(-len(lessons[0].images) // rule.batch))
        rule = rule.model_copy(update={"epochs": max(1, passes)})
    model = build(run.model, lessons[0].texts.shape[1], run.data.image_size, seed, "student", job.index).to(device)
    if job.kind in ("select", "student", "reference"):
        model.temperature = run.student_temperature
    curve: list[dict[str, Any]] = []

    def at(subset: int, passes: int) -> None:
        on_pass()
        last = subset == len(lessons) - 1 and passes == rule.epochs
        if job.kind == "reference" and (passes - 1) % rule.eval_every == 0:
            assert test is not None
            curve.append({"subset": subset, "passes": passes, "test": score(model, test, device, rule.chunk).as_dict()})
        elif job.kind == "student" and (last or passes % rule.eval_every == 0):
            curve.append({"subset": subset, "passes": passes, "val": score(model, val, device, rule.chunk).as_dict()})

    try:
        train_student(model, lessons, rule, loss, seed, job.index, at)
    except Diverged as error:
        scores = dict.fromkeys(("val", "test_last", "test_best_reference"), _nothing())
        return {"job": job.name, "curve": curve, **scores, "diverged": str(error)}
    record: dict[str, Any] = {"job": job.name, "curve": curve}
    if job.kind == "reference":
        best = max(curve, key=lambda point: point["test"]["R@mean"])
        return record | {"test_best_reference": best["test"]}
    record["val"] = score(model, val, device, rule.chunk).as_dict()
    if job.kind in ("student", "baseline"):
        assert test is not None
        record["test_last"] = score(model, test, device, rule.chunk).as_dict()
    return record


def score_expert(
    job: Job, run: config.Run, model: DualEncoder, val: Material, test: Material, device: torch.device
) -> dict[str, Any]:
    """The full-data bound: one expert after its last epoch."""
    chunk = run.evaluate.chunk
    return {
        "job": job.name,
        "val": score(model.to(device), val, device, chunk).as_dict(),
        "test_last": score(model, test, device, chunk).as_dict(),
    }


def selection_jobs(run: config.Run, snapshots: int) -> list[Job]:
    students = range(run.evaluate.selection_students)
    return [Job("select", i, snapshot=s) for s in range(snapshots) for i in students]


def tuning_jobs(run: config.Run) -> list[Job]:
    rule = run.evaluate
    draws = range(min(rule.selection_students, rule.baseline_draws))
    return [
        Job("tune", i, loss=loss, lr=lr) for loss in rule.baseline_losses for lr in rule.baseline_lrs for i in draws
    ]


def best_by_val(records: Sequence[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[Any, float]]:
    """Given (choice, record) rows, the choice with the best mean val R@mean (the first of equals) and all means."""
    groups: dict[Any, list[float]] = {}
    for choice, record in records:
        groups.setdefault(choice, []).append(record["val"]["R@mean"])
    means = {choice: statistics.fmean(values) for choice, values in groups.items()}
    return max(means, key=lambda choice: means[choice]), means


def summary(records: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float | None]]:
    """Per metric, mean and sample standard deviation (ddof = 1; None for one) over records, with their number."""
    rows = [r[key] for r in records]
    return {
        metric: {
            "mean": statistics.fmean(r[metric] for r in rows),
            "std": statistics.stdev(r[metric] for r in rows) if len(rows) > 1 else None,
            "n": len(rows),
        }
        for metric in rows[0]
    }


def _nothing() -> dict[str, float]:
    zero = dict.fromkeys((1, 5, 10), 0.0)
    return Recalls(ir=zero, tr=zero, gap=0.0).as_dict()
