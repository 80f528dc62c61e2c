"""The evaluation protocol: students trained on the distilled set or on random pairs, experts trained on all data.

Each job trains and scores one student. Jobs are independent, so they can run in parallel:

    select     trained on one snapshot of the set, scored on val only; the best snapshot is exported
    tune       trained on random pairs with one loss and learning rate, scored on val only; the best loss and rate are
               used for the baseline
    student    trained on the exported set; scored on val during training, on val and test after the last pass
    baseline   trained on random pairs with the chosen loss and learning rate; scored once on val and test
    reference  trained by a paper's released protocol and scored on *test*, for comparison with the paper only
    full       an expert trained on all pairs; scored once on val and test

`rmdd.evaluate.scores` adds four optional kinds of jobs: hard, own, soft_tune (val only) and soft.

Jobs whose scores choose a snapshot or a setting cannot read test: `check_split_is_open` refuses to open the split,
`train_and_score` refuses to score it, and `best_by_val` rejects records that contain test scores. Student i starts from
the same heads in every kind of job; for equal numbers of pairs it also gets the same batches. The rows of the result
table thus differ only in their training pairs.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rmdd import config
from rmdd.config.order import pairs_of_stages, stages
from rmdd.core.seeding import generator
from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, enlarged
from rmdd.evaluate.examples import examples_of
from rmdd.evaluate.references import Reference, reference_of
from rmdd.evaluate.retrieval import Ranks, Recalls, ranks
from rmdd.evaluate.students import Diverged, StudentSchedule, TrainingPairs, embedded, score, train_student
from rmdd.evaluate.training_pairs import real_pairs
from rmdd.models.dual import DualEncoder, build
from rmdd.models.prepared import PreparedSplit

Kind = Literal["select", "tune", "student", "baseline", "reference", "full", "hard", "own", "soft_tune", "soft"]
SELECTION_KINDS = ("select", "tune", "soft_tune")
"""Kinds of jobs whose scores choose a snapshot or a setting; they are scored on val and may not read test."""
SET_KINDS = ("select", "student", "reference", "hard", "own")
"""Kinds of jobs whose students train on the distilled set."""
EXAMPLE_KINDS = ("student", "baseline", "full")
"""Kinds of jobs whose first student gives the retrieval examples of the report."""
RANDOM_KINDS = ("tune", "baseline", "soft_tune", "soft")
"""Kinds of jobs whose students train on random pairs of real images and captions."""


class TestIsClosed(PermissionError):
    """Raised when a job that chooses a snapshot or a setting tries to read the test split or a test score."""

    __test__ = False


@dataclass(frozen=True)
class Job:
    """One student to train and score. `index` is the number, from 0, of the student, random draw or expert."""

    kind: Kind
    index: int
    snapshot: int = -1
    loss: str = ""
    lr: float = 0.0
    augment: str = ""
    """Augmentation of the student, set only for the kinds own, soft_tune and soft; empty: as in the run."""
    gate: str = ""
    """Subsets that a student at a gate of a planned chain learns, and their order; only for the kind select."""

    @property
    def name(self) -> str:
        extra = {
            "select": f"-{self.gate}" if self.gate else f"-{self.snapshot:02d}",
            "tune": f"-{self.loss}-{self.lr:g}",
            "own": f"-{self.augment}",
            "soft": f"-{self.augment}",
            "soft_tune": f"-{self.augment}-{self.lr:g}",
        }.get(self.kind, "")
        return f"{self.kind}{extra}-{self.index:03d}"


def check_split_is_open(job: Job | None, split: str) -> str:
    """Return `split` if `job` may read it. Raise `TestIsClosed` for test if `job` makes a choice on val."""
    if split == "test" and job is not None and job.kind in SELECTION_KINDS:
        raise TestIsClosed(f"{job.name} chooses a snapshot or setting, so it must not read test; score it on val")
    return split


@dataclass(frozen=True)
class StudentProtocol:
    """Settings of a run that affect how its students are trained and scored."""

    rule: config.Evaluate
    seed: int
    model: config.Model
    image_size: int
    layout: str | None
    method: str
    loss: str
    """Name of the loss with which students learn from the distilled set."""
    temperature: float
    """Temperature of the loss with which students learn from the distilled set."""
    phase_pairs: tuple[int, ...]
    """Number of distilled pairs of each phase."""
    budget: int
    similarity: str
    """Form of the learned similarity of the distilled set: identity, low_rank or full."""
    expert_rates: tuple[float, float]
    """Learning rates of the experts: (image tower, text head)."""

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
        """The protocol of a paper's released code by which the distilled set is also scored, or None."""
        return reference_of(self.rule, self.method, self.loss, self.temperature)

    @property
    def updates(self) -> int:
        """Number of SGD steps of a student, which is equal for the distilled set and for random pairs."""
        return updates(self.rule, self.phase_pairs)


def updates(rule: config.Evaluate, phase_pairs: Sequence[int]) -> int:
    """Return the number of SGD steps of a student that is trained on subsets with `phase_pairs` pairs each."""
    return sum(-(-pairs // rule.batch) * rule.epochs for pairs in pairs_of_stages(rule.order, phase_pairs))


def pairs_of_subset(synthetic: Synthetic, image_size: int) -> TrainingPairs:
    """Return the training pairs of one distilled subset, with images enlarged to `image_size` pixels per side."""
    s = similarity.dense(synthetic.similarity, synthetic.alpha, synthetic.texts)
    images = enlarged(synthetic.images, image_size)
    return TrainingPairs(images, synthetic.texts, s, float(synthetic.lr_image), float(synthetic.lr_text))


def random_pairs(protocol: StudentProtocol, train: PreparedSplit, draw: int, lr: float) -> TrainingPairs:
    """Return `protocol.budget` random real pairs with identity similarity; `lr` is the learning rate of both towers."""
    return real_pairs(train, random_records(train, protocol.budget, protocol.seed, draw), lr)


def random_records(train: PreparedSplit, budget: int, seed: int, draw: int) -> list[int]:
    """Return the indices of `budget` random captions of the train split, or of all captions if the split has fewer."""
    random = generator(seed, "random pairs", draw)
    return torch.randperm(len(train.split.captions), generator=random)[:budget].tolist()


def with_hard_labels(pairs: TrainingPairs, lr_image: float, lr_text: float) -> TrainingPairs:
    """Return `pairs` with identity similarity and the given learning rates in place of any learned ones."""
    return replace(pairs, similarity=torch.eye(len(pairs.images)), lr_image=lr_image, lr_text=lr_text)


def soft_pairs(
    protocol: StudentProtocol, train: PreparedSplit, draw: int, lr: float, teacher: DualEncoder, device: torch.device
) -> TrainingPairs:
    """Return random real pairs, with similarity sigmoid(cosine / temperature) if the distilled set learned one.

    `teacher`, an expert after its last epoch, computes the cosines.
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

    `loss` and `lr` are those of the random-pairs baseline, chosen on val. `experts` are the indices of the experts that
    are scored as students trained on all pairs.
    """
    rule, reference = protocol.rule, protocol.reference
    jobs = [Job("student", i) for i in range(rule.students)]
    jobs += [Job("reference", i) for i in range(reference.students if reference else 0)]
    draws = range(min(rule.students, rule.baseline_draws))
    jobs += [Job("baseline", i % rule.baseline_draws, loss=loss, lr=lr) for i in draws]
    return jobs + [Job("full", e) for e in experts]


@dataclass(frozen=True)
class StudentTraining:
    """What one student learns: its pairs, its schedule and its loss, for the job and the seed that select its draws."""

    subsets: Sequence[TrainingPairs]
    schedule: StudentSchedule
    loss: str
    seed: int
    student: int

    @property
    def stages(self) -> int:
        """Number of stages of the training."""
        return len(stages(self.schedule.order, len(self.subsets)))

    @property
    def passes(self) -> int:
        """Number of passes over all stages."""
        return self.stages * self.schedule.epochs

    def train(self, model: DualEncoder, after_pass: Callable[[int, int], None] = lambda stage, passes: None) -> None:
        """Train `model` in place; see `train_student`."""
        train_student(model, self.subsets, self.schedule, self.loss, self.seed, self.student, after_pass)


def new_student(
    job: Job, protocol: StudentProtocol, subsets: Sequence[TrainingPairs], device: torch.device
) -> DualEncoder:
    """Return the student of `job` before its training, with the temperature that the job trains with."""
    width = subsets[0].texts.shape[1]
    model = build(protocol.model, width, protocol.image_size, protocol.seed, "student", job.index).to(device)
    if job.kind == "reference":
        assert protocol.reference is not None
        model.temperature = protocol.reference.temperature
    elif job.kind in SET_KINDS or job.kind in ("soft_tune", "soft"):
        model.temperature = protocol.temperature
    return model


def training_of(
    job: Job,
    protocol: StudentProtocol,
    subsets: Sequence[TrainingPairs],
    mean: Sequence[float],
    std: Sequence[float],
) -> StudentTraining:
    """Return how the student of `job` learns `subsets`; `mean` and `std` are those that normalised the images."""
    rule, loss, schedule = protocol.rule, job.loss or protocol.loss, StudentSchedule.of(protocol.rule)
    if job.kind == "reference":
        reference = protocol.reference
        assert reference is not None
        loss, schedule, subsets = reference.loss, reference.schedule, reference.adapted(subsets)
    elif job.kind == "hard":
        loss, subsets = "infonce", [with_hard_labels(x, *protocol.expert_rates) for x in subsets]
    elif job.kind in RANDOM_KINDS:
        passes = round(protocol.updates / -(-len(subsets[0].images) // rule.batch))
        schedule = replace(schedule, epochs=max(1, passes))
        if schedule.drop_after is not None:
            schedule = replace(schedule, drop_after=(schedule.epochs + 1) // 2)
    schedule = replace(schedule, augment=job.augment or schedule.augment).on(mean, std)
    return StudentTraining(subsets, schedule, loss, protocol.seed, job.index)


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
    after every pass over a stage, `finished` with the trained student, `on_ranks` with the student's ranks on test.
    """
    if job.kind in SELECTION_KINDS and test is not None:
        check_split_is_open(job, "test")
    rule, reference = protocol.rule, protocol.reference if job.kind == "reference" else None
    pixels = val if test is None else test
    model = new_student(job, protocol, subsets, device)
    if reference is not None:
        assert test is not None
        scored_on = val if reference.split(protocol.layout) == "val" else test
    training = training_of(job, protocol, subsets, pixels.mean, pixels.std)
    schedule, last_stage = training.schedule, training.stages - 1
    curve: list[dict[str, Any]] = []

    def after_pass(stage: int, passes: int) -> None:
        on_pass()
        last = stage == last_stage and passes == schedule.epochs
        point: dict[str, Any] = {"subset": stage, "passes": passes}  # stored records call a stage "subset"
        if reference is not None and passes in reference.points:
            curve.append(point | {"test": score(model, scored_on, device, rule.chunk).as_dict()})
        elif job.kind == "student" and (last or passes % rule.eval_every == 0):
            curve.append(point | {"val": score(model, val, device, rule.chunk).as_dict()})

    record: dict[str, Any] = {"job": job.name, "curve": curve}
    try:
        training.train(model, after_pass)
        if reference is not None:
            best = max(curve, key=lambda point: point["test"]["R@mean"])
            return record | {"test_best_reference": (best if reference.reported == "best" else curve[-1])["test"]}
        finished(model)
        return record | _scored(job, model, val, test, device, rule.chunk, on_ranks)
    except Diverged as error:  # the training diverged, or embeddings of the trained model collapsed
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
    """Score one expert after its last epoch, as a student trained on all pairs; return a record with the scores."""
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
    """Return the scores of a trained model on val and, unless the job chooses a snapshot or setting, on test.

    Those of the first student of a row of the result table contain retrieval examples under `test_examples`.
    """
    scores: dict[str, Any] = {"val": score(model, val, device, chunk).as_dict()}
    if job.kind not in SELECTION_KINDS:
        assert test is not None
        images, texts = embedded(model, test, device, chunk)
        ranked = ranks(images, texts, torch.from_numpy(test.split.image_of).to(device), chunk)
        on_ranks(ranked)
        scores["test_last"] = ranked.recalls().as_dict()
        if job.kind in EXAMPLE_KINDS and job.index == 0:
            scores["test_examples"] = examples_of(images, texts, ranked, chunk)
    return scores


def _diverged(
    job: Job, error: Diverged, test: PreparedSplit | None, on_ranks: Callable[[Ranks], object]
) -> dict[str, Any]:
    """Return the scores of a student that diverged: recalls of 0 for every split to score, and the error message."""
    keys = ("val",) if job.kind in SELECTION_KINDS else ("val", "test_last", "test_best_reference")
    if test is not None and job.kind != "reference":
        on_ranks(Ranks.worst(torch.from_numpy(test.split.image_of)))
    return dict.fromkeys(keys, _zero_recalls()) | {"diverged": str(error)}


def selection_jobs(rule: config.Evaluate, snapshots: int) -> list[Job]:
    """Return the jobs that train students on every snapshot of the distilled set, to choose one snapshot on val."""
    students = range(rule.selection_students)
    return [Job("select", i, snapshot=s) for s in range(snapshots) for i in students]


def tuning_jobs(rule: config.Evaluate) -> list[Job]:
    """Return the jobs that try every loss and learning rate on random pairs, to choose one of each on val."""
    draws = range(min(rule.selection_students, rule.baseline_draws))
    return [
        Job("tune", i, loss=loss, lr=lr) for loss in rule.baseline_losses for lr in rule.baseline_lrs for i in draws
    ]


def best_by_val(records: Sequence[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[Any, float]]:
    """Return the choice with the highest mean R@mean on val, and the mean of every choice.

    `records` holds pairs (choice, record of a student trained with that choice). Of equal means, the first choice wins.
    Raise `TestIsClosed` for a record with a test score.
    """
    groups: dict[Any, list[float]] = {}
    for choice, record in records:
        if test_keys := [key for key in record if key.startswith("test")]:
            raise TestIsClosed(
                f"cannot choose by {', '.join(test_keys)} of {record.get('job', choice)}; choose by val scores only"
            )
        groups.setdefault(choice, []).append(record["val"]["R@mean"])
    means = {choice: statistics.fmean(values) for choice, values in groups.items()}
    return max(means, key=lambda choice: means[choice]), means


def summary(records: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float | None]]:
    """Return the mean, sample standard deviation (None for one record) and count of each metric in `record[key]`."""
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
