"""What a task of a run is given, and what all tasks do: find their files, hold a folder, follow their curves."""

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
from rmdd.evaluate.protocol import Job, check_split_is_open
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
    """Training pairs that no phase of the run made, and the folder of its students' records, within the storage."""

    file: Path
    """See `rmdd.evaluate.training_pairs`."""
    records: Path


@dataclass(frozen=True)
class TaskItem:
    """What every task is given: the run, the paths, and a number or a job."""

    run: config.Run
    paths: RunPaths
    value: str
    """Hash of all that shaped the result; guards checkpoints against another run's."""
    number: int = 0
    job: Job | None = None
    iterations: tuple[int, ...] = ()
    """Per phase, the iteration of the set that a student learns from."""
    stream: Stream | None = None
    """Who reads the shards for an expert whose pictures are not cached; None: the process that trains it."""
    external: ExternalPairs | None = None

    @property
    def source(self) -> SplitSource:
        """Where the splits of the run are read from."""
        run = self.run
        return SplitSource(self.paths.data, self.paths.cache, run.data, run.model, device_of(run.runtime))

    @property
    def feature_source(self) -> FeatureSource:
        """What embeds the training split."""
        run = self.run
        return FeatureSource(self.source, self.paths.store, run.experts.epochs, run.seed_of("experts"), run.runtime)


def prepared_split(item: TaskItem, split: str) -> PreparedSplit:
    """A split, loaded once for all runs that differ in nothing that shapes it.

    Raises `TestIsClosed` for test and a job that something is chosen by.
    """
    check_split_is_open(item.job, split)
    return item.source.open(split)


def record(item: TaskItem) -> Path:
    """Where the record of a student lies; those of random pairs and full data are shared by runs."""
    assert item.job is not None
    if item.external is not None:
        return item.paths.root / item.external.records / f"{item.job.name}.json"
    shared = item.job.kind in ("tune", "baseline", "full")
    return (item.paths.baseline if shared else item.paths.run / "students") / f"{item.job.name}.json"


@contextlib.contextmanager
def held_alone(folder: Path, storage: Storage, hooks: Hooks) -> Iterator[Hooks]:
    """Hold `folder`, brought up to date, while a task works in it; yields hooks that also stop a task that lost it."""
    with hold_folder(folder, wait=True) as lease:
        storage.fetch(folder)
        yield replace(hooks, should_stop=lambda: lease.lost or hooks.should_stop())
        storage.flush()
        lease.check()


def located(item: TaskItem) -> tuple[TaskItem, Storage]:
    """`item` with its paths as this process sees them, and the storage they lie in."""
    storage = open_storage(item.run.runtime)
    return replace(item, paths=item.paths.under(storage.root)), storage


@contextlib.contextmanager
def tracked(item: TaskItem, title: str, value: str, folder: Path, storage: Storage) -> Iterator[track.Tracker]:
    """What follows a piece of work, going on from the curves in `folder`, which go to the storage at the end."""
    for part in track.FOLDERS:
        storage.fetch(folder / part)
    try:
        with track.open_tracker(item.run, title, value, folder) as tracker:
            yield tracker
    finally:
        for part in track.FOLDERS:
            storage.publish(folder / part)


def without_running(name: str) -> bool:
    """What is read of a store whose experts are there."""
    return not name.endswith("/running.safetensors") and not track.is_curve(name)


def trained_expert(item: TaskItem, expert: int, storage: Storage) -> DualEncoder:
    """An expert after its last epoch."""
    others = re.compile(rf"/expert-(?!{expert:03d}/)")
    storage.fetch(item.paths.store, lambda name: not others.search(name) and not track.is_curve(name))
    store = Store.open(item.paths.store)
    image_size, seed = item.run.data.image_size, item.run.seed_of("experts")
    model = expert_model(item.run.model, image_size, seed, expert, prepared_split(item, "val").texts.shape[1])
    model.load_trained(store.read(expert, store.epochs))
    return model
