"""The pieces of a run that are handed to an executor: one expert, one phase, one student.

Each opens what it needs by path, so it runs the same in this process and on another machine that sees the
same storage, and each goes on from its own last checkpoint.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmdd import config, methods
from rmdd.core import tracking as track
from rmdd.core.device import device_of
from rmdd.core.files import atomic_path, read_json, write_json
from rmdd.core.locks import held
from rmdd.core.storage import Storage, open_storage
from rmdd.data.shards import Dataset
from rmdd.distill.sets import load_set
from rmdd.distill.trajectory.planning import PLAN, key_of, make_plan, stated, with_phases
from rmdd.evaluate import records
from rmdd.evaluate.lessons import read_lessons
from rmdd.evaluate.probes.of_run import Probing
from rmdd.evaluate.protocol import (
    CHOOSING,
    OF_RANDOM_PAIRS,
    Job,
    door,
    lesson_of,
    random_lesson,
    score_expert,
    soft_lesson,
    train_and_score,
)
from rmdd.evaluate.retrieval import Ranks
from rmdd.evaluate.students import score
from rmdd.execution.parts import OpenParts, WorkerParts, with_restarts
from rmdd.execution.tasks import Hooks, Task
from rmdd.experts import gang
from rmdd.experts.feed import Stream
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model, train_expert
from rmdd.generate.features import FeatureSource
from rmdd.generate.studio import Studio, Tools
from rmdd.methods.generative import GenerativeMethod
from rmdd.methods.tuned import TunedMethod
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit, SplitSource
from rmdd.models.text import text_width
from rmdd.runs.paths import HEALTH, Places, candidates_of

CURVES = ("loss", "miss_image", "miss_text", "student_loss", "lr_image", "lr_text", "rollbacks")
"""What is tracked of a phase."""


@dataclass(frozen=True)
class Taught:
    """What a student learns that no phase of its run made, and where its record goes; paths within the storage."""

    lessons: Path
    """See `rmdd.evaluate.lessons`."""
    records: Path


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
    taught: Taught | None = None

    @property
    def source(self) -> SplitSource:
        """Where the splits of the run are read from."""
        run = self.run
        return SplitSource(self.places.data, self.places.cache, run.data, run.model, device_of(run.runtime))

    @property
    def feature_source(self) -> FeatureSource:
        """What embeds the training split."""
        run = self.run
        return FeatureSource(self.source, self.places.store, run.experts.epochs, run.seed_of("experts"), run.runtime)


def prepared_split(item: Item, split: str) -> PreparedSplit:
    """A split, loaded once for all runs that differ in nothing that shapes it.

    Raises `TestIsClosed` for test and a job that something is chosen by.
    """
    door(item.job, split)
    return item.source.open(split)


def record(item: Item) -> Path:
    """Where the record of a student lies; those of random pairs and full data are shared by runs."""
    assert item.job is not None
    if item.taught is not None:
        return item.places.root / item.taught.records / f"{item.job.name}.json"
    shared = item.job.kind in ("tune", "baseline", "full")
    return (item.places.baseline if shared else item.places.run / "students") / f"{item.job.name}.json"


def target(task: Task, item: Item) -> Path:
    """Where the result of a task goes: items with the same one are the same work."""
    if task is student:
        return record(item)
    if task is tuning:
        method = methods.method_of(item.run)
        assert isinstance(method, TunedMethod)
        return method.tuned_folder(item.places.root, Dataset.open(item.places.data).hash)
    if task in (plan, checkup):
        return item.places.run / (PLAN if task is plan else HEALTH)
    return item.places.phase(item.number) if task is phase else item.places.store / f"expert-{item.number:03d}"


@contextlib.contextmanager
def _alone(folder: Path, storage: Storage, hooks: Hooks) -> Iterator[Hooks]:
    """Hold `folder`, brought up to date, while a task works in it; yields hooks that also stop a task that lost it."""
    with held(folder, wait=True) as lease:
        storage.fetch(folder)
        yield replace(hooks, should_stop=lambda: lease.lost or hooks.should_stop())
        storage.flush()
        lease.check()


def _here(item: Item) -> tuple[Item, Storage]:
    """`item` with its places as this process sees them, and the storage they lie in."""
    storage = open_storage(item.run.runtime)
    return replace(item, places=item.places.under(storage.root)), storage


@contextlib.contextmanager
def _followed(item: Item, title: str, value: str, folder: Path, storage: Storage) -> Iterator[track.Tracker]:
    """What follows a piece of work, going on from the curves in `folder`, which go to the storage at the end."""
    for part in track.FOLDERS:
        storage.fetch(folder / part)
    try:
        with track.of(item.run, title, value, folder) as tracker:
            yield tracker
    finally:
        for part in track.FOLDERS:
            storage.publish(folder / part)


def expert(item: Item, hooks: Hooks) -> bool:
    """Train expert `item.number` to the end or until told to stop. In a gang the first worker alone writes."""
    rule, device, member = item.run.experts.gang, device_of(item.run.runtime), hooks.member
    if rule.workers > 1 and member is None:
        return gang.side_by_side(expert, item, hooks, rule.workers, item.run.runtime.threads)
    item, storage = _here(item)
    places = item.places
    storage.fetch(places.data)
    storage.fetch(places.store, lambda name: "/expert-" not in name and not track.is_curve(name))
    store = Store.open(places.store)
    with contextlib.ExitStack() as stack:
        tracker = track.Tracker({})
        if member is None or member.rank == 0:
            hooks = stack.enter_context(_alone(store.folder(item.number), storage, hooks))
            curves = places.store / "curves" / f"{item.number:03d}"
            follow = _followed(item, f"expert {item.number}", places.store.name, curves, storage)
            tracker = stack.enter_context(follow)

        def on_epoch(metrics: dict[str, Any]) -> None:
            told = {"loss": metrics["loss"], "val": metrics["val"]}
            tracker.add(metrics["epoch"], told)
            hooks.report({"done": metrics["epoch"], **told})

        val, chunk = prepared_split(item, "val"), item.run.evaluate.chunk
        return train_expert(
            item.run,
            item.number,
            store,
            prepared_split(item, "train"),
            lambda model: score(model, val, device, chunk).mean,
            device,
            on_epoch,
            hooks.should_stop,
            item.run.runtime.loader_workers,
            item.stream,
            gang.team_of(member, rule.strategy, device) if member else None,
        )


def phase(item: Item, hooks: Hooks, ranks: WorkerParts | None = None) -> bool:
    """Distil phase `item.number` to the end or until told to stop; `ranks` share the draws of a step."""
    item, storage = _here(item)
    places, run = item.places, item.run
    storage.fetch(places.store, _no_running)
    method, model = methods.method_of(run), expert_model(run, 0, text_width(run.model.text))
    title, folder, key = f"phase {item.number}", places.phase(item.number), f"{item.value}/{item.number}"
    follow = _followed(item, title, places.phases.name, folder, storage)
    with _alone(folder, storage, hooks) as hooks, follow as tracker:

        def train() -> PreparedSplit:
            storage.fetch(places.data)
            return prepared_split(item, "train")

        def on_step(metrics: dict[str, Any]) -> None:
            tracker.add(metrics["iteration"], {n: v for n, v in metrics.items() if n in CURVES or n.startswith("loss")})
            shown: dict[str, Any] = {name: metrics[name] for name in ("loss", "lr_image", "lr_text") if name in metrics}
            pace = {"pairs/s": pairs / metrics["seconds"]} if metrics["seconds"] else {}
            hooks.report({"done": metrics["iteration"], **shown, **pace})

        store, device, stop = Store.open(places.store), device_of(run.runtime), hooks.should_stop
        pairs = method.pairs_of_step(item.number, train)
        return method.distil(item.number, store, model, train, folder, device, key, on_step, stop, ranks)


def _no_running(name: str) -> bool:
    """What is read of a store whose experts are there."""
    return not name.endswith("/running.safetensors") and not track.is_curve(name)


def shared_phase(item: Item, hooks: Hooks, ranks: OpenParts, draws: int, say: Callable[[str], None]) -> bool:
    """`phase`, by ranks that share the `draws` of a step; they are opened again when one dies."""

    def distilled() -> bool:
        with ranks(functools.partial(rank_of_phase, item), None, draws, True) as found:
            return phase(item, hooks, found)

    return with_restarts(distilled, item.run.runtime.max_restarts, say)


def rank_of_phase(item: Item, rank: int, size: int) -> Any:
    """One of those who share the draws of every step of phase `item.number`."""
    item, storage = _here(item)
    storage.fetch(item.places.data)
    storage.fetch(item.places.store, _no_running)
    model = expert_model(item.run, 0, text_width(item.run.model.text))
    store, train = Store.open(item.places.store), prepared_split(item, "train")
    device, method = device_of(item.run.runtime), methods.method_of(item.run)
    return method.part_of_step(item.number, store, model, train, device, rank, size)


def generate(item: Item, hooks: Hooks, tools: Tools) -> bool:
    """Make phase `item.number` of a generative method: those of its pairs that are not there."""
    item, storage = _here(item)
    places = item.places
    storage.fetch(places.data)
    folder = places.phase(item.number)
    with _alone(folder, storage, hooks) as hooks:
        if not places.set(item.number, 1).is_file():
            method = methods.method_of(item.run)
            assert isinstance(method, GenerativeMethod)
            studio = Studio(item, prepared_split(item, "train"), folder, tools, hooks, tuning)
            restarts = item.run.runtime.max_restarts
            with_restarts(lambda: method.make(studio, item.number), restarts, tools.progress.say)
    hooks.report({"done": 1})
    return True


def tuning(item: Item, hooks: Hooks) -> bool:
    """Train what a generative method draws with, to the end or until told to stop."""
    from rmdd.generate.tuning import tune

    item, storage = _here(item)
    storage.fetch(item.places.data)
    method = methods.method_of(item.run)
    assert isinstance(method, TunedMethod)
    train = prepared_split(item, "train")
    folder = method.tuned_folder(item.places.root, train.split.dataset.hash)
    with _alone(folder, storage, hooks) as hooks:

        def on_step(metrics: dict[str, Any]) -> None:
            hooks.report({"done": metrics["step"], "loss": metrics["loss"]})

        trainer = method.trainer(train, device_of(item.run.runtime))
        return tune(trainer, folder, folder.name, method.checkpoint_every, on_step, hooks.should_stop)


def plan(item: Item, hooks: Hooks) -> bool:
    """Find the phases of a run that plans them; a plan that is there stays.

    Writes plan.json with signals and reasons, plan.svg, and planned.yaml, the same run with its phases listed.
    """
    item, storage = _here(item)
    places, run = item.places, item.run
    storage.fetch(places.run / PLAN)
    written = places.run / PLAN
    if not written.is_file() or read_json(written)["key"] != key_of(run, places.store.name):
        from rmdd.report.sheets import draw_plan

        storage.fetch(places.data)
        storage.fetch(places.store, _no_running)
        found = make_plan(
            methods.matching_method(run),
            Store.open(places.store),
            prepared_split(item, "train"),
            device_of(run.runtime),
        )
        draw_plan(found, places.run / "plan.svg")
        if run.distill.plan.kind == "auto":
            with atomic_path(places.run / "planned.yaml") as temporary:
                temporary.write_text(config.dump(stated(with_phases(run, found["phases"]))), encoding="utf-8")
        write_json(written, found)
        storage.flush()
    hooks.report({"done": 1})
    return True


def checkup(item: Item, hooks: Hooks) -> bool:
    """See the sets of a run through the last epoch of its first expert, and write down their health."""
    from rmdd.evaluate.checkup import checkup as see

    item, storage = _here(item)
    places, run = item.places, item.run
    path = places.run / HEALTH
    storage.fetch(path)
    if not path.is_file() or read_json(path)["value"] != item.value:
        storage.fetch(places.data)
        storage.fetch(places.phases, lambda name: not track.is_curve(name))
        storage.fetch(places.store, lambda name: not name.endswith(".safetensors") and not track.is_curve(name))
        train, val = prepared_split(item, "train"), prepared_split(item, "val")
        model = _trained(item, Store.open(places.store).complete()[0], storage)
        rungs = [(0,) * len(run.distill.phases), *candidates_of(run)]
        paths = [[places.start(p) if i == 0 else places.set(p, i) for p, i in enumerate(rung)] for rung in rungs]
        sets = [(rung, [load_set(file) for file in files]) for rung, files in zip(rungs, paths, strict=True)]
        write_json(path, see(run, model, sets, train, val, device_of(run.runtime)) | {"value": item.value})
    hooks.report({"done": 1})
    return True


def student(item: Item, hooks: Hooks) -> dict[str, Any]:
    """Train and score one student, or read its record if it has been; test is read once."""
    item, storage = _here(item)
    assert item.job is not None
    job, run, places = item.job, item.run, item.places
    path = record(item)
    shared = path.parent == places.baseline
    value = places.baseline.name if shared else f"{item.value}/{'-'.join(map(str, item.iterations))}"
    for each in (path, *(() if job.kind in CHOOSING else (records.test_file(path), records.ranks_file(path)))):
        storage.fetch(each)
    scored, unranked = records.read(path, value), job.kind in (*CHOOSING, "reference")
    if not unranked and not records.ranks_file(path).is_file():  # older records have no ranks
        scored = None
    asked = Probing(run, job, path, value, storage)
    if scored is not None and not asked.missing:
        hooks.report({"done": 1})
        return asked.added_to(scored)
    model = asked.restored() if scored is not None else None
    if model is None:
        again, model = _train_and_score(item, storage, asked, path if scored is None else None, hooks)
        if scored is None:  # a student that is trained again for new probes keeps the scores and ranks it had
            scored = again | {"value": value}
            records.write(path, scored)
    assert scored is not None
    asked.ask(model, device_of(run.runtime), hooks.should_stop)
    hooks.report({"done": 1, "val": scored["val"]["R@mean"]} if "val" in scored else {"done": 1})
    return asked.added_to(scored)


def _train_and_score(
    item: Item, storage: Storage, asked: Probing, path: Path | None, hooks: Hooks
) -> tuple[dict[str, Any], DualEncoder | None]:
    """The record of a student and, if it was trained to the end, itself; its ranks go beside `path`."""
    assert item.job is not None
    job, run, places = item.job, item.run, item.places
    storage.fetch(places.data)
    device, val = device_of(run.runtime), prepared_split(item, "val")
    test = None if job.kind in CHOOSING else prepared_split(item, "test")

    def keep(ranks: Ranks) -> None:
        if path is not None:
            ranks.save(records.ranks_file(path))

    if job.kind == "full":
        assert test is not None
        model = _trained(item, job.index, storage)
        return score_expert(job, run, model, val, test, device, on_ranks=keep), model
    if item.taught is not None:
        given = places.root / item.taught.lessons
        storage.fetch(given)
        lessons = read_lessons(given, run.data.image_size, lambda: prepared_split(item, "train"), job.lr)
    elif job.kind in ("soft_tune", "soft"):
        teacher = _trained(item, job.index % run.experts.num, storage)
        lessons = [soft_lesson(run, prepared_split(item, "train"), job.index, job.lr, teacher, device)]
    elif job.kind in OF_RANDOM_PAIRS:
        lessons = [random_lesson(run, prepared_split(item, "train"), job.index, job.lr)]
    else:
        for p, iteration in enumerate(item.iterations):
            storage.fetch(places.set(p, iteration))
        sets = [load_set(places.set(p, iteration)) for p, iteration in enumerate(item.iterations)]
        lessons = [lesson_of(s, run.data.image_size) for s in sets]
    trained: list[DualEncoder] = []

    def finished(model: DualEncoder) -> None:
        asked.keep(model)
        trained.append(model)

    alive = hooks.should_stop  # a sign of life
    scored = train_and_score(job, run, lessons, val, test, device, alive, finished, on_ranks=keep)
    return scored, trained[0] if trained else None


def _trained(item: Item, expert: int, storage: Storage) -> DualEncoder:
    """An expert after its last epoch."""
    others = re.compile(rf"/expert-(?!{expert:03d}/)")
    storage.fetch(item.places.store, lambda name: not others.search(name) and not track.is_curve(name))
    store = Store.open(item.places.store)
    model = expert_model(item.run, expert, prepared_split(item, "val").texts.shape[1])
    model.load_trained(store.read(expert, store.epochs))
    return model
