"""The evaluation protocol: students trained on the distilled set, on random pairs, and experts trained on all data.

Each job trains and scores one student. Jobs are independent, so they can run in parallel:

    select     trained on one snapshot of the set, scored on val only; the best snapshot is exported
    tune       trained on random pairs with one loss and learning rate, scored on val only; the best loss and rate are
               used for the baseline
    student    trained on the exported set; scored on val during training, on val and test after the last pass
    baseline   trained on random pairs with the chosen loss and learning rate; scored once on val and test
    reference  trained by a paper's released protocol and scored on *test*, for comparison with the paper only
    full       an expert trained on all pairs; scored once on val and test

`rmdd.evaluate.scores` adds four optional kinds: hard, own, soft_tune (val only) and soft.

Jobs whose scores select something cannot read test: `check_split_is_open` refuses to open the split for them,
`train_and_score` refuses to score it, and `best_by_val` rejects records that contain test scores. Student i of every
kind has the same initial heads, and with equal numbers of pairs also the same batches, so that rows of the result table
differ only in their training pairs.
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
SELECTION_KINDS = ("select", "tune", "soft_tune")
"""Kinds of jobs whose scores select something; they are scored on val and may not read test."""
SET_KINDS = ("select", "student", "reference", "hard", "own")
"""Kinds of jobs that train on the distilled set."""
RANDOM_KINDS = ("tune", "baseline", "soft_tune", "soft")
"""Kinds of jobs that train on random pairs."""


class TestIsClosed(PermissionError):
    """Raised when a selection tries to read the test split or a test score."""

    __test__ = False


@dataclass(frozen=True)
class Job:
    """One student to train and score. `index` is the number of the student, random draw or expert."""

    kind: Kind
    index: int
    snapshot: int = -1
    loss: str = ""
    lr: float = 0.0
    augment: str = ""
    """Augmentation for the kinds own, soft_tune and soft; empty: the run's augmentation."""

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
    """Return `split` if `job` may read it. Raise `TestIsClosed` if a job for a selection asks for test."""
    if split == "test" and job is not None and job.kind in SELECTION_KINDS:
        raise TestIsClosed(f"{job.name} is used for a selection, so it must not read test; score it on val")
    return split


@dataclass(frozen=True)
class StudentProtocol:
    """The settings of a run that training and scoring its students depends on."""

    rule: config.Evaluate
    seed: int
    model: config.Model
    image_size: int
    layout: str | None
    method: str
    loss: str
    """Loss of students of the distilled set."""
    temperature: float
    """Temperature of students of the distilled set."""
    phase_pairs: tuple[int, ...]
    """Number of pairs of each phase."""
    budget: int
    similarity: str
    """Kind of the similarity of the distilled set: identity, low_rank or full."""
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
        """The released protocol by which the set is also scored, or None."""
        return reference_of(self.rule, self.method, self.loss, self.temperature)

    @property
    def updates(self) -> int:
        """Number of SGD steps of a student of the distilled set; students of random pairs get the same number."""
        return updates(self.rule, self.phase_pairs)


def updates(rule: config.Evaluate, phase_pairs: Iterable[int]) -> int:
    """Return the number of SGD steps of a student trained on subsets with these numbers of pairs."""
    return sum(-(-pairs // rule.batch) * rule.epochs for pairs in phase_pairs)


def pairs_of_subset(synthetic: Synthetic, image_size: int) -> TrainingPairs:
    """Return the training pairs of one distilled subset, with images enlarged to side `image_size`."""
    s = similarity.dense(synthetic.similarity, synthetic.alpha, synthetic.texts)
    images = enlarged(synthetic.images, image_size)
    return TrainingPairs(images, synthetic.texts, s, float(synthetic.lr_image), float(synthetic.lr_text))


def random_pairs(protocol: StudentProtocol, train: PreparedSplit, draw: int, lr: float) -> TrainingPairs:
    """Return `budget` random real pairs with identity similarity and the learning rate `lr` for both towers."""
    return real_pairs(train, random_records(train, protocol.budget, protocol.seed, draw), lr)


def random_records(train: PreparedSplit, budget: int, seed: int, draw: int) -> list[int]:
    """Return `budget` random caption records, or all records if the split has fewer."""
    random = generator(seed, "random pairs", draw)
    return torch.randperm(len(train.split.captions), generator=random)[:budget].tolist()


def with_hard_labels(pairs: TrainingPairs, lr_image: float, lr_text: float) -> TrainingPairs:
    """Replace similarity and learning rates by the identity and the given rates, to score images and texts alone."""
    return replace(pairs, similarity=torch.eye(len(pairs.images)), lr_image=lr_image, lr_text=lr_text)


def soft_pairs(
    protocol: StudentProtocol, train: PreparedSplit, draw: int, lr: float, teacher: DualEncoder, device: torch.device
) -> TrainingPairs:
    """Return random pairs with a similarity if the distilled set has one: S = sigmoid(cosine / temperature).

    `teacher` computes the cosines; it is an expert after its last epoch.
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
    """Return the jobs whose scores are reported: student, reference, baseline and full.

    `loss` and `lr` of the baseline were chosen on val; `experts` are the experts scored as the full-data bound.
    """
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
    """Train and score one student; return its record.

    `test` must be None for the kinds in `SELECTION_KINDS`, otherwise `TestIsClosed` is raised. `on_pass` is called
    after every pass over a subset, `finished` with the fully trained student, `on_ranks` with its ranks on test.
    """
    if job.kind in SELECTION_KINDS and test is not None:
        check_split_is_open(job, "test")
    rule, reference = protocol.rule, protocol.reference if job.kind == "reference" else None
    loss, schedule = job.loss or protocol.loss, StudentSchedule.of(rule)
    pixels = val if test is None else test
    width, size = subsets[0].texts.shape[1], protocol.image_size
    model = build(protocol.model, width, size, protocol.seed, "student", job.index).to(device)
    if job.kind in SET_KINDS or job.kind in ("soft_tune", "soft"):
        model.temperature = protocol.temperature
    if job.kind == "reference":
        assert reference is not None and test is not None
        scored_on = val if reference.split(protocol.layout) == "val" else test
        loss, schedule, model.temperature = reference.loss, reference.schedule, reference.temperature
        subsets = reference.adapted(subsets)
    elif job.kind == "hard":
        loss, subsets = "infonce", [with_hard_labels(x, *protocol.expert_rates) for x in subsets]
    elif job.kind in RANDOM_KINDS:
        passes = round(protocol.updates / -(-len(subsets[0].images) // rule.batch))
        schedule = replace(schedule, epochs=max(1, passes))
        if schedule.drop_after is not None:
            schedule = replace(schedule, drop_after=(schedule.epochs + 1) // 2)
    schedule = replace(schedule, augment=job.augment or schedule.augment).on(pixels.mean, pixels.std)
    curve: list[dict[str, Any]] = []

    def after_pass(subset: int, passes: int) -> None:
        on_pass()
        last = subset == len(subsets) - 1 and passes == schedule.epochs
        point: dict[str, Any] = {"subset": subset, "passes": passes}
        if reference is not None and passes in reference.points:
            curve.append(point | {"test": score(model, scored_on, device, rule.chunk).as_dict()})
        elif job.kind == "student" and (last or passes % rule.eval_every == 0):
            curve.append(point | {"val": score(model, val, device, rule.chunk).as_dict()})

    record: dict[str, Any] = {"job": job.name, "curve": curve}
    try:
        train_student(model, subsets, schedule, loss, protocol.seed, job.index, after_pass)
        if reference is not None:
            best = max(curve, key=lambda point: point["test"]["R@mean"])
            return record | {"test_best_reference": (best if reference.reported == "best" else curve[-1])["test"]}
        finished(model)
        return record | _scored(job, model, val, test, device, rule.chunk, on_ranks)
    except Diverged as error:  # raised in training, or in scoring if the embeddings collapsed
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
    """Score one expert after its last epoch, as the full-data bound; return its record."""
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
    """Score a fully trained model on val and, unless the job is for a selection, on test."""
    scores = {"val": score(model, val, device, chunk).as_dict()}
    if job.kind not in SELECTION_KINDS:
        assert test is not None
        ranks = rank(model, test, device, chunk)
        on_ranks(ranks)
        scores["test_last"] = ranks.recalls().as_dict()
    return scores


def _diverged(
    job: Job, error: Diverged, test: PreparedSplit | None, on_ranks: Callable[[Ranks], object]
) -> dict[str, Any]:
    """Return recalls of 0 for every split that would have been scored, and the error message."""
    keys = ("val",) if job.kind in SELECTION_KINDS else ("val", "test_last", "test_best_reference")
    if test is not None and job.kind != "reference":
        on_ranks(Ranks.worst(torch.from_numpy(test.split.image_of)))
    return dict.fromkeys(keys, _zero_recalls()) | {"diverged": str(error)}


def selection_jobs(rule: config.Evaluate, snapshots: int) -> list[Job]:
    """Return the jobs that train students on every snapshot, to choose one."""
    students = range(rule.selection_students)
    return [Job("select", i, snapshot=s) for s in range(snapshots) for i in students]


def tuning_jobs(rule: config.Evaluate) -> list[Job]:
    """Return the jobs that train students on random pairs with every loss and learning rate, to choose one of each."""
    draws = range(min(rule.selection_students, rule.baseline_draws))
    return [
        Job("tune", i, loss=loss, lr=lr) for loss in rule.baseline_losses for lr in rule.baseline_lrs for i in draws
    ]


def best_by_val(records: Sequence[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[Any, float]]:
    """Return the choice with the highest mean val R@mean, and the mean of every choice.

    `records` holds (choice, record) pairs. Of equal means, the first choice wins. Raise `TestIsClosed` for a record
    with a test score.
    """
    groups: dict[Any, list[float]] = {}
    for choice, record in records:
        if test_keys := [key for key in record if key.startswith("test")]:
            raise TestIsClosed(
                f"a selection got {', '.join(test_keys)} of {record.get('job', choice)}; select by val only"
            )
        groups.setdefault(choice, []).append(record["val"]["R@mean"])
    means = {choice: statistics.fmean(values) for choice, values in groups.items()}
    return max(means, key=lambda choice: means[choice]), means


def summary(records: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float | None]]:
    """Return mean, sample standard deviation (ddof = 1; None for one record) and number of records of each metric."""
    rows = [r[key] for r in records]
    return {
        metric: {
            "mean": statistics.fmean(r[metric] for r in rows),
            "std": statistics.stdev(r[metric] for r in rows) if len(rows) > 1 else None,
            "n": len(rows),
        }
        for metric in rows[0]
    }


def _zero_recalls() -> dict[str, float]:
    zero = dict.fromkeys((1, 5, 10), 0.0)
    return Recalls(ir=zero, tr=zero, gap=0.0).as_dict()
