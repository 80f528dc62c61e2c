"""The pieces of a run that are handed to an executor: one expert, one phase, one student.

Each opens what it needs by path, so it runs the same in this process and on another machine that sees the
same storage, and each goes on from its own last checkpoint.
"""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmdd import config
from rmdd.data.material import Material, load_material
from rmdd.data.shards import Dataset
from rmdd.distill.matching import distill_phase, load_set
from rmdd.evaluate.protocol import Job, lesson_of, random_lesson, score_expert, train_and_score
from rmdd.experts import gang
from rmdd.experts.feed import Stream
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model, train_expert
from rmdd.files import locked, read_json, write_json
from rmdd.jobs import Hooks
from rmdd.models.text import text_width


@dataclass(frozen=True)
class Places:
    """Where the parts of a run lie."""

    data: Path
    cache: Path
    store: Path
    phases: Path
    baseline: Path
    run: Path

    def phase(self, number: int) -> Path:
        return self.phases / f"phase-{number}"

    def start(self, number: int) -> Path:
        """The set that a phase starts from."""
        return self.phase(number) / "start.safetensors"

    def set(self, number: int, iteration: int) -> Path:
        return self.phase(number) / f"set-{iteration:06d}.safetensors"


@dataclass(frozen=True)
class Item:
    """What every task is given: the run, the places, and a number or a job."""

    run: config.Run
    places: Places
    value: str
    """Hash of all that shaped the result; guards checkpoints against another run's."""
    number: int = 0
    job: Job | None = None
    iterations: tuple[int, ...] = ()
    """Per phase, the iteration of the set that a student learns from."""
    stream: Stream | None = None
    """Who reads the shards for an expert whose pictures are not cached; None: the process that trains it."""


def device_of(run: config.Run) -> torch.device:
    return torch.device("cuda" if run.runtime.gpus_per_worker > 0 else "cpu")


@functools.lru_cache(maxsize=4)
def _material(run: config.Run, data: Path, cache: Path, split: str) -> Material:
    return load_material(run, Dataset.open(data), split, cache, str(device_of(run)))


def material(item: Item, split: str) -> Material:
    return _material(item.run, item.places.data, item.places.cache, split)


def expert(item: Item, hooks: Hooks) -> bool:
    """Train expert `item.number` to the end or until told to stop."""

    def on_epoch(metrics: dict[str, Any]) -> None:
        hooks.report({"done": metrics["epoch"], "loss": metrics["loss"], "val": metrics["val"]})

    rule, device, seat = item.run.experts.gang, device_of(item.run), hooks.seat
    if rule.workers > 1 and seat is None:
        return gang.side_by_side(expert, item, hooks, rule.workers, item.run.runtime.threads)
    store = Store.open(item.places.store)
    leads = seat is None or seat.rank == 0
    with locked(store.folder(item.number)) if leads else contextlib.nullcontext():
        return train_expert(
            item.run,
            item.number,
            store,
            material(item, "train"),
            material(item, "val"),
            device,
            on_epoch,
            hooks.should_stop,
            item.run.runtime.loader_workers,
            item.stream,
            gang.team_of(seat, rule.strategy, device) if seat else None,
        )


def phase(item: Item, hooks: Hooks) -> bool:
    """Distil phase `item.number` to the end or until told to stop."""
    places, run = item.places, item.run
    model = expert_model(run, 0, text_width(run.model.text))
    tracker = _tracker(run, places.phase(item.number))

    def on_step(metrics: dict[str, Any]) -> None:
        hooks.report(
            {
                "done": metrics["iteration"],
                "loss": metrics["loss"],
                "lr_image": metrics["lr_image"],
                "lr_text": metrics["lr_text"],
            }
        )
        if tracker is not None:
            for name in ("loss", "miss_image", "miss_text", "student_loss", "lr_image", "lr_text"):
                if name in metrics:
                    tracker.add_scalar(name, metrics[name], metrics["iteration"])

    try:
        with locked(places.phase(item.number)):
            return distill_phase(
                run,
                item.number,
                Store.open(places.store),
                model,
                load_set(places.start(item.number)),
                places.phase(item.number),
                device_of(run),
                f"{item.value}/{item.number}",
                on_step,
                hooks.should_stop,
            )
    finally:
        if tracker is not None:
            tracker.close()


def student(item: Item, hooks: Hooks) -> dict[str, Any]:
    """Train and score one student, or read its record if it has been; test is read once."""
    assert item.job is not None
    job, run, places = item.job, item.run, item.places
    folder = places.baseline if job.kind in ("tune", "baseline", "full") else places.run / "students"
    path = folder / f"{job.name}.json"
    value = f"{item.value}/{'-'.join(map(str, item.iterations))}" if folder == places.run / "students" else folder.name
    if path.is_file() and (record := read_json(path))["value"] == value:
        hooks.report({"done": 1})
        return record
    device, val, test = device_of(run), material(item, "val"), material(item, "test")
    if job.kind == "full":
        model = expert_model(run, job.index, val.texts.shape[1])
        store = Store.open(places.store)
        model.load_trained(store.read(job.index, store.epochs))
        record = score_expert(job, run, model, val, test, device)
    else:
        if job.kind in ("tune", "baseline"):
            lessons = [random_lesson(run, material(item, "train"), job.index, job.lr)]
        else:
            sets = [load_set(places.set(p, iteration)) for p, iteration in enumerate(item.iterations)]
            lessons = [lesson_of(s, run.data.image_size) for s in sets]
        record = train_and_score(job, run, lessons, val, test, device)
    record["value"] = value
    write_json(path, record)
    hooks.report({"done": 1, "val": record["val"]["R@mean"]} if "val" in record else {"done": 1})
    return record


def _tracker(run: config.Run, folder: Path):
    if run.runtime.track == "none":
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
