"""Who is scored against whom: distilled set, random pairs at the same budget, full data.

The jobs behind a row of the result table are independent of one another, so they run side by side:

    select     a student on one snapshot, scored on val only; the best snapshot is exported
    tune       random pairs with one loss and rate, scored on val only; the best rate trains the baseline
    student    the exported set: a curve on val, then val and test once at the last pass
    baseline   random pairs at the chosen loss and rate: val and test once
    reference  a released protocol: its scorings of *test*, for comparison with papers only
    full       an expert trained on all pairs: val and test once

and of `rmdd.evaluate.scores`, on request: hard, own, soft_tune (val only) and soft.

Jobs that choose cannot read test: `check_split_is_open` refuses to open it for them, `train_and_score` refuses the
split, and `best_by_val` refuses any record that holds a score of it. Student i of every kind has the same heads, and
with as many pairs the same batches, so rows differ in their training pairs alone.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, enlarged
from rmdd.evaluate.references import Reference, reference_of
from rmdd.evaluate.retrieval import Ranks, Recalls
from rmdd.evaluate.students import Diverged, StudentSchedule, TrainingPairs, rank, score, train_student
from rmdd.evaluate.training_pairs import real_pairs
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


def check_split_is_open(job: Job | None, split: str) -> str:
    """`split`, where `job` may look at it. Raises `TestIsClosed` for test and a job that something is chosen by."""
    if split == "test" and job is not None and job.kind in CHOOSING:
        raise TestIsClosed(f"{job.name} is scored for a choice, and choices are made on val; test is closed to it")
    return split


@dataclass(frozen=True)
class StudentProtocol:
    """All that training and scoring the students of a run reads of its run file."""

    rule: config.Evaluate
    seed: int
    model: config.Model
    image_size: int
    layout: str | None
    method: str
    loss: str
    """Of students of the distilled set."""
    temperature: float
    """What students of the distilled set divide their cosines by."""
    phase_pairs: tuple[int, ...]
    """Pairs of each phase."""
    budget: int
    similarity: str
    """Kind of similarity of the distilled set."""
    expert_rates: tuple[float, float]
    """Learning rates of the experts: image, text."""

    @classmethod
    def of(cls, run: config.Run) -> "StudentProtocol":
        rule = run.distill
        return cls(
            rule=run.evaluate,
            seed=run.seed_of("evaluate"),
            model=run.model,
            image_size=run.data.image_size,
            layout=run.data.layout,
            method=rule.method,
            loss=rule.loss,
            temperature=run.student_temperature,
            phase_pairs=tuple(p.pairs for p in rule.phases),
            budget=rule.budget,
            similarity=rule.similarity.kind,
            expert_rates=(run.experts.lr_image, run.experts.lr_text),
        )

    @property
    def reference(self) -> Reference | None:
        """The released protocol that the set is also scored by."""
        return reference_of(self.rule, self.method, self.loss, self.temperature)

    @property
    def updates(self) -> int:
        """Steps that a student of the distilled set makes; one of random pairs gets as many."""
        return updates(self.rule, self.phase_pairs)


def updates(rule: config.Evaluate, phase_pairs: Iterable[int]) -> int:
    """Steps of a student that is trained on subsets of so many pairs."""
    return sum(-(-pairs // rule.batch) * rule.epochs for pairs in phase_pairs)


def pairs_of_subset(synthetic: Synthetic, image_size: int) -> TrainingPairs:
    """What a student learns from one distilled subset, its pictures enlarged to `image_size`."""
    s = similarity.dense(synthetic.similarity, synthetic.alpha, synthetic.texts)
    images = enlarged(synthetic.images, image_size)
    return TrainingPairs(images, synthetic.texts, s, float(synthetic.lr_image), float(synthetic.lr_text))


def random_pairs(protocol: StudentProtocol, train: PreparedSplit, draw: int, lr: float) -> TrainingPairs:
    """`budget` real caption records drawn uniformly, identity similarity, one rate for both towers."""
    return real_pairs(train, random_records(train, protocol.budget, protocol.seed, draw), lr)


def random_records(train: PreparedSplit, budget: int, seed: int, draw: int) -> list[int]:
    """The caption records of a draw: `budget` of them, or all where there are fewer."""
    random = generator(seed, "random pairs", draw)
    return torch.randperm(len(train.split.captions), generator=random)[:budget].tolist()


def hardened(pairs: TrainingPairs, lr_image: float, lr_text: float) -> TrainingPairs:
    """The pairs with identity similarity, at the rates of the experts: what images and texts alone are worth."""
    return replace(pairs, similarity=torch.eye(len(pairs.images)), lr_image=lr_image, lr_text=lr_text)


def soft_pairs(
    protocol: StudentProtocol, train: PreparedSplit, draw: int, lr: float, teacher: DualEncoder, device: torch.device
) -> TrainingPairs:
    """Random pairs by the recipe of the set: where the set has a similarity, so have they, computed by a teacher.

    S = sigmoid(cosine / temperature); the teacher is an expert after its last epoch.
    """
    pairs = random_pairs(protocol, train, draw, lr)
    if protocol.similarity == "identity":
        return pairs
    teacher = teacher.to(device).eval()
    with torch.no_grad():
        u = torch.cat([teacher.embed_images(x.to(device)) for x in pairs.images.split(protocol.rule.chunk)])
        v = teacher.embed_texts(pairs.texts.to(device))
        return replace(pairs, similarity=torch.sigmoid(u @ v.T / protocol.model.temperature).cpu())


def final_jobs(protocol: StudentProtocol, loss: str, lr: float, experts: Sequence[int]) -> list[Job]:
    """The students whose scores are reported: of the set, by the reference protocol, of random pairs at the loss and
    rate that val chose, and `experts` as the full-data bound."""
    rule, reference = protocol.rule, protocol.reference
    jobs = [Job("student", i) for i in range(rule.students)]
    jobs += [Job("reference", i) for i in range(reference.students if reference else 0)]
    draws = range(min(rule.students, rule.baseline_draws))
    jobs += [Job("baseline", i % rule.baseline_draws, loss=loss, lr=lr) for i in draws]
    return jobs + [Job("full", e) for e in experts]


def train_and_score(
    job: Job,
    protocol: StudentProtocol,
    subsets: Sequence[TrainingPairs],
    val: PreparedSplit,
    test: PreparedSplit | None,
    device: torch.device,
    on_pass: Callable[[], object] = lambda: None,
    finished: Callable[[DualEncoder], object] = lambda model: None,
    *,
    on_ranks: Callable[[Ranks], object] = lambda ranks: None,
) -> dict[str, Any]:
    """Run one student job and return its record; `test` is None for jobs that choose, else `TestIsClosed` is raised.

    `finished` gets the student once it is trained to the end, and `on_ranks` the ranks of its queries on test.
    """
    if job.kind in CHOOSING and test is not None:
        check_split_is_open(job, "test")
    rule, reference = protocol.rule, protocol.reference if job.kind == "reference" else None
    loss, schedule = job.loss or protocol.loss, StudentSchedule.of(rule)
    pixels = val if test is None else test
    width, size = subsets[0].texts.shape[1], protocol.image_size
    model = build(protocol.model, width, size, protocol.seed, "student", job.index).to(device)
    if job.kind in OF_THE_SET or job.kind in ("soft_tune", "soft"):
        model.temperature = protocol.temperature
    if job.kind == "reference":
        assert reference is not None and test is not None
        scored_on = val if reference.split(protocol.layout) == "val" else test
        loss, schedule, model.temperature = reference.loss, reference.schedule, reference.temperature
        subsets = reference.adapted(subsets)
    elif job.kind == "hard":
        loss, subsets = "infonce", [hardened(x, *protocol.expert_rates) for x in subsets]
    elif job.kind in OF_RANDOM_PAIRS:
        passes = round(protocol.updates / -(-len(subsets[0].images) // rule.batch))
        schedule = replace(schedule, epochs=max(1, passes))
        if schedule.drop_after is not None:
            schedule = replace(schedule, drop_after=(schedule.epochs + 1) // 2)
    schedule = replace(schedule, augment=job.augment or schedule.augment).on(pixels.mean, pixels.std)
    curve: list[dict[str, Any]] = []

    def at(subset: int, passes: int) -> None:
        on_pass()
        last = subset == len(subsets) - 1 and passes == schedule.epochs
        point: dict[str, Any] = {"subset": subset, "passes": passes}
        if reference is not None and passes in reference.points:
            curve.append(point | {"test": score(model, scored_on, device, rule.chunk).as_dict()})
        elif job.kind == "student" and (last or passes % rule.eval_every == 0):
            curve.append(point | {"val": score(model, val, device, rule.chunk).as_dict()})

    record: dict[str, Any] = {"job": job.name, "curve": curve}
    try:
        train_student(model, subsets, schedule, loss, protocol.seed, job.index, at)
        if reference is not None:
            of_best = max(curve, key=lambda point: point["test"]["R@mean"])
            return record | {"test_best_reference": (of_best if reference.reported == "best" else curve[-1])["test"]}
        finished(model)
        return record | _scored(job, model, val, test, device, rule.chunk, on_ranks)
    except Diverged as error:  # in training, or where its embeddings are to be scored
        return record | _diverged(job, error, test, on_ranks)


def score_expert(
    job: Job,
    model: DualEncoder,
    val: PreparedSplit,
    test: PreparedSplit,
    device: torch.device,
    chunk: int,
    *,
    on_ranks: Callable[[Ranks], object] = lambda ranks: None,
) -> dict[str, Any]:
    """The full-data bound: one expert after its last epoch."""
    try:
        scores = _scored(job, model.to(device), val, test, device, chunk, on_ranks)
    except Diverged as error:
        scores = _diverged(job, error, test, on_ranks)
    return {"job": job.name} | scores


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
        ranks = rank(model, test, device, chunk)
        on_ranks(ranks)
        scores["test_last"] = ranks.recalls().as_dict()
    return scores


def _diverged(
    job: Job, error: Diverged, test: PreparedSplit | None, on_ranks: Callable[[Ranks], object]
) -> dict[str, Any]:
    """Recalls of 0 on every split that would have been scored."""
    keys = ("val",) if job.kind in CHOOSING else ("val", "test_last", "test_best_reference")
    if test is not None and job.kind != "reference":
        on_ranks(Ranks.worst(torch.from_numpy(test.split.image_of)))
    return dict.fromkeys(keys, _nothing()) | {"diverged": str(error)}


def selection_jobs(rule: config.Evaluate, snapshots: int) -> list[Job]:
    """Students on every snapshot."""
    students = range(rule.selection_students)
    return [Job("select", i, snapshot=s) for s in range(snapshots) for i in students]


def tuning_jobs(rule: config.Evaluate) -> list[Job]:
    """Students of random pairs at every loss and rate."""
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
        if of_test := [key for key in record if key.startswith("test")]:
            raise TestIsClosed(
                f"a choice was given {', '.join(of_test)} of {record.get('job', choice)}; choose by val alone"
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
