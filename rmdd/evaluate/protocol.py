"""Who is scored against whom: distilled set, random pairs at the same budget, full data.

Each row of the result table comes from jobs that know nothing of one another, so they run side by side:

    select     a student on one snapshot, scored on val only; the best snapshot is exported
    tune       random pairs with one loss and rate, scored on val only; the best rate trains the baseline
    student    the exported set: a curve on val, then val and test once at the last pass
    baseline   random pairs at the chosen loss and rate: val and test once
    reference  a released protocol: its scorings of *test*, for comparison with papers only
    full       an expert trained on all pairs: val and test once

and of `rmdd.evaluate.scores`, on request: hard, own, soft_tune (val only) and soft.

Jobs that choose have no way to test: `door` refuses to open it for them, `train_and_score` to be given it, and
`best_by_val` any record that holds a score of it. Student i of every kind has the same heads, and with as many pairs
the same batches, so rows differ in what is learned from alone.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, enlarged
from rmdd.evaluate.lessons import real_lesson
from rmdd.evaluate.references import reference_of
from rmdd.evaluate.retrieval import Ranks, Recalls
from rmdd.evaluate.students import Course, Diverged, Lesson, rank, score, train_student
from rmdd.models.dual import DualEncoder, build
from rmdd.models.prepared import PreparedSplit

Kind = Literal["select", "tune", "student", "baseline", "reference", "full", "hard", "own", "soft_tune", "soft"]
CHOOSING = ("select", "tune", "soft_tune")
"""Kinds whose scores something is chosen by; they are scored on val, and test is closed to them."""
OF_THE_SET = ("select", "student", "reference", "hard", "own")
OF_RANDOM_PAIRS = ("tune", "baseline", "soft_tune", "soft")


class TestIsClosed(PermissionError):
    """What a choice depends on asked for the test split, or was given a score of it."""

    __test__ = False


@dataclass(frozen=True)
class Job:
    """One student. `index` is the student (or draw, or expert); the rest says what it learns from."""

    kind: Kind
    index: int
    snapshot: int = -1
    loss: str = ""
    lr: float = 0.0
    augment: str = ""
    """Of kinds own, soft_tune and soft; empty: as the run says."""

    @property
    def name(self) -> str:
        extra = {
            "select": f"-{self.snapshot:02d}",
            "tune": f"-{self.loss}-{self.lr:g}",
            "own": f"-{self.augment}",
            "soft": f"-{self.augment}",
            "soft_tune": f"-{self.augment}-{self.lr:g}",
        }.get(self.kind, "")
        return f"{self.kind}{extra}-{self.index:03d}"


def door(job: Job | None, split: str) -> str:
    """`split`, where `job` may look at it. Raises `TestIsClosed` for test and a job that something is chosen by."""
    if split == "test" and job is not None and job.kind in CHOOSING:
        raise TestIsClosed(f"{job.name} is scored for a choice, and choices are made on val; test is closed to it")
    return split


def lesson_of(synthetic: Synthetic, image_size: int) -> Lesson:
    """What a student learns from one distilled subset, its pictures enlarged to `image_size`."""
    s = similarity.dense(synthetic.similarity, synthetic.alpha, synthetic.texts)
    images = enlarged(synthetic.images, image_size)
    return Lesson(images, synthetic.texts, s, float(synthetic.lr_image), float(synthetic.lr_text))


def random_lesson(run: config.Run, train: PreparedSplit, draw: int, lr: float) -> Lesson:
    """`budget` real caption records drawn uniformly, identity similarity, one rate for both towers."""
    return real_lesson(train, random_records(run, train, draw), lr)


def random_records(run: config.Run, train: PreparedSplit, draw: int) -> list[int]:
    """The caption records of a draw: `budget` of them, or all where there are fewer."""
    draw_ = generator(run.seed_of("evaluate"), "random pairs", draw)
    return torch.randperm(len(train.split.captions), generator=draw_)[: run.distill.budget].tolist()


def hardened(lesson: Lesson, experts: config.Experts) -> Lesson:
    """What images and texts alone are worth: each belongs to its own, at the rates of the experts."""
    own = torch.eye(len(lesson.images))
    return replace(lesson, similarity=own, lr_image=experts.lr_image, lr_text=experts.lr_text)


def soft_lesson(
    run: config.Run, train: PreparedSplit, draw: int, lr: float, teacher: DualEncoder, device: torch.device
) -> Lesson:
    """Random pairs by the recipe of the set: with a similarity where that has one, as a teacher sees it.

    S = sigmoid(cosine / temperature); the teacher is an expert after its last epoch.
    """
    lesson = random_lesson(run, train, draw, lr)
    if run.distill.similarity.kind == "identity":
        return lesson
    teacher = teacher.to(device).eval()
    with torch.no_grad():
        u = torch.cat([teacher.embed_images(x.to(device)) for x in lesson.images.split(run.evaluate.chunk)])
        v = teacher.embed_texts(lesson.texts.to(device))
        return replace(lesson, similarity=torch.sigmoid(u @ v.T / run.model.temperature).cpu())


def final_jobs(run: config.Run, loss: str, lr: float, experts: Sequence[int]) -> list[Job]:
    """The students whose scores are told: of the set, by the reference protocol, of random pairs at the loss and rate
    that val chose, and `experts` as the full-data bound."""
    rule, reference = run.evaluate, reference_of(run)
    jobs = [Job("student", i) for i in range(rule.students)]
    jobs += [Job("reference", i) for i in range(reference.students if reference else 0)]
    draws = range(min(rule.students, rule.baseline_draws))
    jobs += [Job("baseline", i % rule.baseline_draws, loss=loss, lr=lr) for i in draws]
    return jobs + [Job("full", e) for e in experts]


def updates(run: config.Run) -> int:
    """Steps that a student of the distilled set makes; one of random pairs gets as many."""
    rule = run.evaluate
    return sum(-(-p.pairs // rule.batch) * rule.epochs for p in run.distill.phases)


def train_and_score(
    job: Job,
    run: config.Run,
    lessons: Sequence[Lesson],
    val: PreparedSplit,
    test: PreparedSplit | None,
    device: torch.device,
    on_pass: Callable[[], object] = lambda: None,
    finished: Callable[[DualEncoder], object] = lambda model: None,
    *,
    on_ranks: Callable[[Ranks], object] = lambda ranks: None,
) -> dict[str, Any]:
    """Run one student job and return its record; `test` is None for jobs that choose, else `TestIsClosed` is raised.

    `finished` is given the student once it is trained to the end, and `on_ranks` what the queries of test found then.
    """
    if job.kind in CHOOSING and test is not None:
        door(job, "test")
    rule, seed = run.evaluate, run.seed_of("evaluate")
    loss, course = job.loss or run.distill.loss, Course.of(rule)
    points: tuple[int, ...] = ()
    pixels = val if test is None else test
    model = build(run.model, lessons[0].texts.shape[1], run.data.image_size, seed, "student", job.index).to(device)
    if job.kind in OF_THE_SET or job.kind in ("soft_tune", "soft"):
        model.temperature = run.student_temperature
    if job.kind == "reference":
        found = reference_of(run)
        assert found is not None and test is not None
        peeked = val if found.split(run.data.layout) == "val" else test
        loss, course, points, model.temperature = found.loss, found.course, found.points, found.temperature
        lessons = found.lessons(lessons)
    elif job.kind == "hard":
        loss, lessons = "infonce", [hardened(x, run.experts) for x in lessons]
    elif job.kind in OF_RANDOM_PAIRS:
        passes = round(updates(run) / -(-len(lessons[0].images) // rule.batch))
        course = replace(course, epochs=max(1, passes))
        if course.drop_after is not None:
            course = replace(course, drop_after=(course.epochs + 1) // 2)
    course = replace(course, augment=job.augment or course.augment).on(pixels.mean, pixels.std)
    curve: list[dict[str, Any]] = []

    def at(subset: int, passes: int) -> None:
        on_pass()
        last = subset == len(lessons) - 1 and passes == course.epochs
        if job.kind == "reference" and passes in points:
            curve.append(
                {"subset": subset, "passes": passes, "test": score(model, peeked, device, rule.chunk).as_dict()}
            )
        elif job.kind == "student" and (last or passes % rule.eval_every == 0):
            curve.append({"subset": subset, "passes": passes, "val": score(model, val, device, rule.chunk).as_dict()})

    record: dict[str, Any] = {"job": job.name, "curve": curve}
    try:
        train_student(model, lessons, course, loss, seed, job.index, at)
        if job.kind == "reference":
            assert found is not None
            of_best = max(curve, key=lambda point: point["test"]["R@mean"])
            return record | {"test_best_reference": (of_best if found.reported == "best" else curve[-1])["test"]}
        finished(model)
        return record | _scored(job, model, val, test, device, rule.chunk, on_ranks)
    except Diverged as error:  # in training, or where its embeddings are to be scored
        return record | _diverged(job, error, test, on_ranks)


def score_expert(
    job: Job,
    run: config.Run,
    model: DualEncoder,
    val: PreparedSplit,
    test: PreparedSplit,
    device: torch.device,
    *,
    on_ranks: Callable[[Ranks], object] = lambda ranks: None,
) -> dict[str, Any]:
    """The full-data bound: one expert after its last epoch."""
    try:
        found = _scored(job, model.to(device), val, test, device, run.evaluate.chunk, on_ranks)
    except Diverged as error:
        found = _diverged(job, error, test, on_ranks)
    return {"job": job.name} | found


def _scored(
    job: Job,
    model: DualEncoder,
    val: PreparedSplit,
    test: PreparedSplit | None,
    device: torch.device,
    chunk: int,
    on_ranks: Callable[[Ranks], object],
) -> dict[str, Any]:
    """What a model scores after its last pass: on val and, unless something is chosen by it, once on test."""
    scores = {"val": score(model, val, device, chunk).as_dict()}
    if job.kind not in CHOOSING:
        assert test is not None
        found = rank(model, test, device, chunk)
        on_ranks(found)
        scores["test_last"] = found.recalls().as_dict()
    return scores


def _diverged(
    job: Job, error: Diverged, test: PreparedSplit | None, on_ranks: Callable[[Ranks], object]
) -> dict[str, Any]:
    """Nothing found, on whatever would have been scored."""
    keys = ("val",) if job.kind in CHOOSING else ("val", "test_last", "test_best_reference")
    if test is not None and job.kind != "reference":
        on_ranks(Ranks.worst(torch.from_numpy(test.split.image_of)))
    return dict.fromkeys(keys, _nothing()) | {"diverged": str(error)}


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
    """Given (choice, record) rows, the choice with the best mean val R@mean (the first of equals) and all means.

    Raises `TestIsClosed` for a record that holds a score of test.
    """
    groups: dict[Any, list[float]] = {}
    for choice, record in records:
        if seen := [key for key in record if key.startswith("test")]:
            raise TestIsClosed(
                f"a choice was given {', '.join(seen)} of {record.get('job', choice)}; choose by val alone"
            )
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
