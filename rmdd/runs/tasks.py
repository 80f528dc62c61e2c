"""Tasks of a run: train experts, plan, distil or generate phases, check for embedding collapse.

The task of a student is in `rmdd.runs.students`. A task is called with a `TaskItem` and opens files by path. It
therefore gives the same result in this process and on any machine that can read the storage. A restarted task resumes
from its last checkpoint. `target` returns the path of the result. Task items with equal targets stand for equal work.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import methods
from rmdd.core import tracking as track
from rmdd.core.device import device_of
from rmdd.core.files import read_json, write_json
from rmdd.data.shards import Dataset
from rmdd.distill.chain import updates_after
from rmdd.distill.sets import load_set
from rmdd.distill.trajectory.planning import PLAN, key_of, make_plan
from rmdd.evaluate.health_of_run import health_report
from rmdd.evaluate.students import score
from rmdd.execution.parts import OpenParts, WorkerParts, with_restarts
from rmdd.execution.tasks import Hooks
from rmdd.experts import worker_group
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model, train_expert
from rmdd.generate.studio import Studio, Tools
from rmdd.generate.tuning import tune
from rmdd.methods.generative import GenerativeMethod
from rmdd.methods.tuned import TunedMethod
from rmdd.models.prepared import PreparedSplit
from rmdd.models.text import text_width
from rmdd.runs.gate import write_plan
from rmdd.runs.items import (
    TaskItem,
    exclusive_folder,
    needed_after_distillation,
    needed_after_training,
    prepared_split,
    tracked,
    trained_expert,
    with_local_paths,
)
from rmdd.runs.paths import HEALTH, candidates_of

CURVES = ("loss", "miss_image", "miss_text", "student_loss", "lr_image", "lr_text", "rollbacks")
"""Names of the metrics that are written to the training curves of a phase."""


@dataclass(frozen=True)
class TrainExpert:
    """Task: train expert `item.number` until it is finished or stopped. In a worker group, only rank 0 writes files."""

    def target(self, item: TaskItem) -> Path:
        return item.paths.store / f"expert-{item.number:03d}"

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        rule, device, member = item.run.experts.worker_group, device_of(item.run.runtime), hooks.member
        if rule.workers > 1 and member is None:
            return worker_group.run_in_processes(self, item, hooks, rule.workers, item.run.runtime.threads)
        item, storage = with_local_paths(item)
        paths = item.paths
        storage.fetch(paths.data)
        storage.fetch(paths.store, lambda name: "/expert-" not in name and not track.is_curve(name))
        store = Store.open(paths.store)
        with contextlib.ExitStack() as stack:
            tracker = track.Tracker({})
            if member is None or member.rank == 0:
                hooks = stack.enter_context(exclusive_folder(store.folder(item.number), storage, hooks))
                curves = paths.store / "curves" / f"{item.number:03d}"
                tracking = tracked(item, f"expert {item.number}", paths.store.name, curves, storage)
                tracker = stack.enter_context(tracking)

            def on_epoch(metrics: dict[str, Any]) -> None:
                shown = {"loss": metrics["loss"], "val": metrics["val"]}
                tracker.add(metrics["epoch"], shown)
                hooks.report({"done": metrics["epoch"], **shown})

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
                worker_group.join_group(member, rule.strategy, device) if member else None,
            )


@dataclass(frozen=True)
class DistillPhase:
    """Task: distil phase `item.number` until it is finished or stopped."""

    parts: WorkerParts | None = None
    """Workers among which the random draws of each step are divided; None: this process computes all draws."""
    wave: int | None = None
    """Number of the wave of a chained run, up to which the phase is distilled; None: the phase is finished."""

    def target(self, item: TaskItem) -> Path:
        if self.wave is None:
            return item.paths.phase(item.number)
        return item.paths.set(item.number, updates_after(item.run.distill, item.number, self.wave))

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        item, storage = with_local_paths(item)
        paths, run = item.paths, item.run
        storage.fetch(paths.store, needed_after_training)
        method, image_size, seed = methods.method_of(run), run.data.image_size, run.seed_of("experts")
        model = expert_model(run.model, image_size, seed, 0, text_width(run.model.text))
        title, folder, key = f"phase {item.number}", paths.phase(item.number), f"{item.value}/{item.number}"
        tracking = tracked(item, title, paths.phases.name, folder, storage)
        with exclusive_folder(folder, storage, hooks) as hooks, tracking as tracker:

            def train() -> PreparedSplit:
                storage.fetch(paths.data)
                return prepared_split(item, "train")

            def on_step(metrics: dict[str, Any]) -> None:
                tracker.add(
                    metrics["iteration"], {n: v for n, v in metrics.items() if n in CURVES or n.startswith("loss")}
                )
                shown: dict[str, Any] = {
                    name: metrics[name] for name in ("loss", "lr_image", "lr_text") if name in metrics
                }
                pace = {"pairs/s": pairs / metrics["seconds"]} if metrics["seconds"] else {}
                hooks.report({"done": metrics["iteration"], **shown, **pace})

            store, device, stop = Store.open(paths.store), device_of(run.runtime), hooks.should_stop
            pairs = method.pairs_of_step(item.number, train)
            until = {} if self.wave is None else {"until": updates_after(run.distill, item.number, self.wave)}
            return method.distil(
                item.number, store, model, train, folder, device, key, on_step, stop, self.parts, **until
            )


@dataclass(frozen=True)
class DistillShared:
    """Task: `DistillPhase` with the draws of each step divided among workers. If a worker dies, all start again."""

    open_parts: OpenParts
    draws: int
    say: Callable[[str], None]

    def target(self, item: TaskItem) -> Path:
        return item.paths.phase(item.number)

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        def distilled() -> bool:
            with self.open_parts(functools.partial(part_of_phase, item), None, self.draws, True) as parts:
                return DistillPhase(parts)(item, hooks)

        return with_restarts(distilled, item.run.runtime.max_restarts, self.say)


def part_of_phase(item: TaskItem, rank: int, size: int) -> Any:
    """Return an object that computes the share of one worker (`rank` of `size` workers) in each step of a phase."""
    item, storage = with_local_paths(item)
    storage.fetch(item.paths.data)
    storage.fetch(item.paths.store, needed_after_training)
    image_size, seed = item.run.data.image_size, item.run.seed_of("experts")
    model = expert_model(item.run.model, image_size, seed, 0, text_width(item.run.model.text))
    store, train = Store.open(item.paths.store), prepared_split(item, "train")
    device, method = device_of(item.run.runtime), methods.method_of(item.run)
    return method.part_of_step(item.number, store, model, train, device, rank, size)


@dataclass(frozen=True)
class GeneratePhase:
    """Task: generate the missing pairs of phase `item.number` of a generative method."""

    tools: Tools

    def target(self, item: TaskItem) -> Path:
        return item.paths.phase(item.number)

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        item, storage = with_local_paths(item)
        paths = item.paths
        storage.fetch(paths.data)
        folder = paths.phase(item.number)
        with exclusive_folder(folder, storage, hooks) as hooks:
            method = methods.method_of(item.run)
            if not method.is_finished(item.number, folder):
                assert isinstance(method, GenerativeMethod)
                tune = functools.partial(self.tune, item)
                source, train = item.feature_source, prepared_split(item, "train")
                studio = Studio(item.run, item.number, source, paths.root, train, folder, self.tools, hooks, tune)
                restarts = item.run.runtime.max_restarts
                with_restarts(lambda: method.make(studio, item.number), restarts, self.tools.progress.say)
        hooks.report({"done": 1})
        return True

    def tune(self, item: TaskItem, total: int) -> bool:
        """Fine-tune the image generator of the method for `total` updates; return whether fine-tuning is finished."""
        with self.tools.progress.stage("fine-tuning", {"fine-tuning": total}) as update:
            return all(self.tools.executor.map(TuneGenerator(), [item], ["fine-tuning"], update))


@dataclass(frozen=True)
class TuneGenerator:
    """Task: fine-tune the image generator of a generative method until it is finished or stopped."""

    def target(self, item: TaskItem) -> Path:
        method = methods.method_of(item.run)
        assert isinstance(method, TunedMethod)
        return method.tuned_folder(item.paths.root, Dataset.open(item.paths.data).hash)

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        item, storage = with_local_paths(item)
        storage.fetch(item.paths.data)
        method = methods.method_of(item.run)
        assert isinstance(method, TunedMethod)
        train = prepared_split(item, "train")
        folder = method.tuned_folder(item.paths.root, train.split.dataset.hash)
        with exclusive_folder(folder, storage, hooks) as hooks:

            def on_step(metrics: dict[str, Any]) -> None:
                hooks.report({"done": metrics["step"], "loss": metrics["loss"]})

            trainer = method.trainer(train, device_of(item.run.runtime))
            return tune(trainer, folder, folder.name, method.checkpoint_every, on_step, hooks.should_stop)


@dataclass(frozen=True)
class MakePlan:
    """Task: plan the phases of a run that lists none, unless an up-to-date plan exists.

    It writes `plan.json`, which holds measured signals and the reasons for each phase. For phases planned by `auto`, it
    also writes `planned.yaml`, the run file with these phases.
    """

    most: int | None = None
    """Largest number of phases, after the gate of a planned chain has dropped one; None: as the run says."""
    decisions: tuple[dict[str, Any], ...] = ()
    """Decisions of the gate so far, which are written to the plan."""

    def target(self, item: TaskItem) -> Path:
        """Return the path of the plan and `most`: planning again with fewer phases is other work for the same file."""
        return item.paths.run / PLAN / str(self.most or "")

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        item, storage = with_local_paths(item)
        paths, run = item.paths, item.run
        storage.fetch(paths.run / PLAN)
        written = paths.run / PLAN
        plan: dict[str, Any] = read_json(written) if written.is_file() else {"key": None}
        if plan["key"] != key_of(run, paths.store.name) or (self.most and len(plan["phases"]) > self.most):
            storage.fetch(paths.data)
            storage.fetch(paths.store, needed_after_training)
            planned = make_plan(
                methods.matching_method(run),
                Store.open(paths.store),
                prepared_split(item, "train"),
                device_of(run.runtime),
                self.most,
            )
            write_plan(paths.run, run, planned | ({"decisions": list(self.decisions)} if self.decisions else {}))
            storage.flush()
        hooks.report({"done": 1})
        return True


@dataclass(frozen=True)
class CheckHealth:
    """Task: embed the distilled sets of a run with its first expert; write measures of collapse to `health.json`."""

    def target(self, item: TaskItem) -> Path:
        return item.paths.run / HEALTH

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        item, storage = with_local_paths(item)
        paths, run = item.paths, item.run
        path = paths.run / HEALTH
        storage.fetch(path)
        if not path.is_file() or read_json(path)["value"] != item.value:
            storage.fetch(paths.data)
            storage.fetch(paths.phases, needed_after_distillation)
            storage.fetch(paths.store, lambda name: not name.endswith(".safetensors") and not track.is_curve(name))
            train, val = prepared_split(item, "train"), prepared_split(item, "val")
            model = trained_expert(item, Store.open(paths.store).complete()[0], storage)
            snapshots = [(0,) * len(run.distill.phases), *candidates_of(run)]
            sets = [
                (snapshot, [load_set(paths.set_of(p, i)) for p, i in enumerate(snapshot)]) for snapshot in snapshots
            ]
            device, seed, rule = device_of(run.runtime), run.seed_of("evaluate"), run.evaluate
            health = health_report(model, sets, train, val, device, seed, rule.chunk, run.data.image_size)
            write_json(path, health | {"value": item.value})
        hooks.report({"done": 1})
        return True
