"""The task that trains and scores one student. If the student is finished, the task only reads the scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd.core.device import device_of
from rmdd.core.storage import Storage
from rmdd.evaluate import records
from rmdd.evaluate.probes.of_run import StudentProbes
from rmdd.evaluate.protocol import (
    RANDOM_KINDS,
    SELECTION_KINDS,
    StudentProtocol,
    random_pairs,
    score_expert,
    soft_pairs,
    train_and_score,
)
from rmdd.evaluate.retrieval import Ranks
from rmdd.evaluate.students import TrainingPairs
from rmdd.evaluate.training_pairs import read_pairs
from rmdd.execution.tasks import Hooks
from rmdd.models.dual import DualEncoder
from rmdd.runs.items import TaskItem, distilled_pairs, prepared_split, record, trained_expert, with_local_paths


@dataclass(frozen=True)
class TrainStudent:
    """Task: train and score a student, or read the scores of a finished student. A student reads test once."""

    def target(self, item: TaskItem) -> Path:
        return record(item)

    def __call__(self, item: TaskItem, hooks: Hooks) -> dict[str, Any]:
        item, storage = with_local_paths(item)
        assert item.job is not None
        job, run, paths = item.job, item.run, item.paths
        path = record(item)
        shared = path.parent == paths.baseline
        value = paths.baseline.name if shared else f"{item.value}/{'-'.join(map(str, item.iterations))}"
        test_files = () if job.kind in SELECTION_KINDS else (records.test_file(path), records.ranks_file(path))
        for file in (path, *test_files):
            storage.fetch(file)
        scored, unranked = records.read(path, value), job.kind in (*SELECTION_KINDS, "reference")
        if not unranked and not records.ranks_file(path).is_file():  # older releases wrote no rank file
            scored = None
        probes = StudentProbes(run, job, path, value, storage)
        if scored is not None and not probes.missing:
            hooks.report({"done": 1})
            return probes.added_to(scored)
        model = probes.load_student() if scored is not None else None
        if model is None:
            new_scores, model = _train_and_score(item, storage, probes, path if scored is None else None, hooks)
            if scored is None:  # a student that is retrained only for new probes keeps its first scores and ranks
                scored = new_scores | {"value": value}
                records.write(path, scored)
        assert scored is not None
        probes.score_missing(model, device_of(run.runtime), hooks.should_stop)
        hooks.report({"done": 1, "val": scored["val"]["R@mean"]} if "val" in scored else {"done": 1})
        return probes.added_to(scored)


def _train_and_score(
    item: TaskItem, storage: Storage, probes: StudentProbes, path: Path | None, hooks: Hooks
) -> tuple[dict[str, Any], DualEncoder | None]:
    """Train and score a student. Return a record with the scores, and the model (None if training diverged).

    Unless `path` (the student's score file) is None, the retrieval ranks of the test queries are written beside it.
    """
    assert item.job is not None
    job, run, paths, protocol = item.job, item.run, item.paths, StudentProtocol.of(item.run)
    storage.fetch(paths.data)
    device, val = device_of(run.runtime), prepared_split(item, "val")
    test = None if job.kind in SELECTION_KINDS else prepared_split(item, "test")

    def save_ranks(ranks: Ranks) -> None:
        if path is not None:
            ranks.save(records.ranks_file(path))

    if job.kind == "full":
        assert test is not None
        model = trained_expert(item, job.index, storage)
        return score_expert(job, model, val, test, device, run.evaluate.chunk, on_ranks=save_ranks), model
    subsets = training_pairs(item, storage)
    trained: list[DualEncoder] = []

    def finished(model: DualEncoder) -> None:
        probes.save_student(model)
        trained.append(model)

    heartbeat = hooks.should_stop  # each call of `should_stop` tells the backend that this worker is alive
    scored = train_and_score(job, protocol, subsets, val, test, device, heartbeat, finished, on_ranks=save_ranks)
    return scored, trained[0] if trained else None


def training_pairs(item: TaskItem, storage: Storage) -> list[TrainingPairs]:
    """Return the training pairs of the student of `item`, one entry per subset."""
    job, run, protocol = item.job, item.run, StudentProtocol.of(item.run)
    assert job is not None
    if item.external is not None:
        file = item.paths.root / item.external.file
        storage.fetch(file)
        return read_pairs(file, run.data.image_size, lambda: prepared_split(item, "train"), job.lr)
    if job.kind in ("soft_tune", "soft"):
        teacher, device = trained_expert(item, job.index % run.experts.num, storage), device_of(run.runtime)
        return [soft_pairs(protocol, prepared_split(item, "train"), job.index, job.lr, teacher, device)]
    if job.kind in RANDOM_KINDS:
        return [random_pairs(protocol, prepared_split(item, "train"), job.index, job.lr)]
    return distilled_pairs(item, storage, run.data.image_size)
