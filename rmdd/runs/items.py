"""`TaskItem`, the input of a run's tasks, and helpers of tasks: paths, folder locks, training curves, experts."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rmdd import config
from rmdd.core import tracking as track
from rmdd.core.device import device_of
from rmdd.core.locks import hold_folder
from rmdd.core.storage import Storage, open_storage
from rmdd.distill.sets import load_set
from rmdd.evaluate.protocol import Job, check_split_is_open, pairs_of_subset
from rmdd.evaluate.students import TrainingPairs
from rmdd.execution.tasks import Hooks
from rmdd.experts.feed import Stream
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.generate.encoders import FeatureSource
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit, SplitSource
from rmdd.runs.paths import RunPaths


@dataclass(frozen=True)
class ExternalPairs:
    """Training pairs given to `rmdd compare` or `rmdd transfer`. Both paths are relative to the storage."""

    file: Path
    """File of the pairs; `rmdd.evaluate.training_pairs` describes the format."""
    records: Path
    """Folder of the files with the scores of the students that train on these pairs."""


@dataclass(frozen=True)
class TaskItem:
    """Input of a task: the run, its paths, and either `number` (of an expert or phase) or `job` (of a student)."""

    run: config.Run
    paths: RunPaths
    value: str
    """Hash of all settings that change the result of the task; checkpoints with a different hash are ignored."""
    number: int = 0
    job: Job | None = None
    iterations: tuple[int, ...] = ()
    """For each phase, the iteration of the distilled snapshot that a student trains on."""
    stream: Stream | None = None
    """Function that reads uncached images in parallel. If None, the process that trains an expert reads them itself."""
    external: ExternalPairs | None = None

    @property
    def source(self) -> SplitSource:
        """Settings with which any process opens the train, val and test splits of the run."""
        run = self.run
        return SplitSource(self.paths.data, self.paths.cache, run.data, run.model, device_of(run.runtime))

    @property
    def feature_source(self) -> FeatureSource:
        """Settings with which any process embeds the train split for a coreset or a generative method."""
        run = self.run
        return FeatureSource(self.source, self.paths.store, run.experts.epochs, run.seed_of("experts"), run.runtime)


def prepared_split(item: TaskItem, split: str) -> PreparedSplit:
    """Return a split with its caption embeddings. Runs with equal data settings share one copy in memory.

    Raises `TestIsClosed` if the split is test and the job of `item` chooses a snapshot or a setting.
    """
    check_split_is_open(item.job, split)
    return item.source.open(split)


def distilled_pairs(item: TaskItem, storage: Storage, size: int) -> list[TrainingPairs]:
    """Return the pairs of each phase after `item.iterations` updates, with images of `size` x `size` pixels."""
    files = [item.paths.set(p, iteration) for p, iteration in enumerate(item.iterations)]
    for file in files:
        storage.fetch(file)
    return [pairs_of_subset(load_set(file), size) for file in files]


def record(item: TaskItem) -> Path:
    """Return the path of a student's score file. Runs share the score files of random-pairs and full-data baselines."""
    assert item.job is not None
    if item.external is not None:
        return item.paths.root / item.external.records / f"{item.job.name}.json"
    shared = item.job.kind in ("tune", "baseline", "full")
    return (item.paths.baseline if shared else item.paths.run / "students") / f"{item.job.name}.json"


@contextlib.contextmanager
def exclusive_folder(folder: Path, storage: Storage, hooks: Hooks) -> Iterator[Hooks]:
    """Lock `folder` during the block and fetch its files; yield hooks that stop the task if the lock is lost."""
    with hold_folder(folder, wait=True) as lease:
        storage.fetch(folder)
        yield replace(hooks, should_stop=lambda: lease.lost or hooks.should_stop())
        storage.flush()
        lease.check()


def with_local_paths(item: TaskItem) -> tuple[TaskItem, Storage]:
    """Return a copy of `item` with paths that are valid in this process, and the storage in which these paths lie."""
    storage = open_storage(item.run.runtime)
    return replace(item, paths=item.paths.under(storage.root)), storage


@contextlib.contextmanager
def tracked(item: TaskItem, title: str, value: str, folder: Path, storage: Storage) -> Iterator[track.Tracker]:
    """Yield a tracker that appends to the training curves in `folder`. Publish them to the storage at the end."""
    for part in track.FOLDERS:
        storage.fetch(folder / part)
    try:
        with track.open_tracker(item.run, title, value, folder) as tracker:
            yield tracker
    finally:
        for part in track.FOLDERS:
            storage.publish(folder / part)


def needed_after_training(name: str) -> bool:
    """Return whether file `name` of an expert store is needed after training; training states and curves are not."""
    return not name.endswith("/running.safetensors") and not track.is_curve(name)


def needed_after_distillation(name: str) -> bool:
    """Return whether file `name` of a phase is needed after distillation; starts of paths and curves are not."""
    return "/path-starts/" not in name and not track.is_curve(name)


def trained_expert(item: TaskItem, expert: int, storage: Storage) -> DualEncoder:
    """Return the model of an expert with the parameters of its last epoch."""
    others = re.compile(rf"/expert-(?!{expert:03d}/)")
    storage.fetch(item.paths.store, lambda name: not others.search(name) and not track.is_curve(name))
    store = Store.open(item.paths.store)
    image_size, seed = item.run.data.image_size, item.run.seed_of("experts")
    model = expert_model(item.run.model, image_size, seed, expert, prepared_split(item, "val").texts.shape[1])
    model.load_trained(store.read(expert, store.epochs))
    return model
