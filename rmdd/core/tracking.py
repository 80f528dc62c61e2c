"""Curves for people: TensorBoard beside the results, and W&B or MLflow where a run file asks for them.

The record is in JSON lines; these are copies of it. Work that goes on from a checkpoint tells some steps again. A
tracker shows each of them once: TensorBoard drops what an earlier sitting said of steps from the first new one on,
W&B and MLflow keep what they were told before. A tracker that fails is left out with a warning and stops no work.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rmdd import config
from rmdd.core.storage import is_uri, root_of

FOLDERS = ("tensorboard", "wandb")
"""Where trackers write, in the folder that they are given."""

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Scalars by step, to every sink of `runtime.track`; each is opened at the first step."""

    def __init__(self, openers: Mapping[str, Callable[[int], Sink]]):
        self.openers = dict(openers)
        self.sinks: dict[str, Sink] = {}
        self.last = 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """`values` after `step` steps, counted from 1. A step that is not after the last one begins anew from there."""
        if self.sinks and step <= self.last:
            self.close()
        self.last = step
        for name in list(self.openers):
            try:
                if name not in self.sinks:
                    self.sinks[name] = self.openers[name](step)
                self.sinks[name].add(step, values)
            except Exception as error:
                self._leave_out(name, error)

    def close(self) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                sink.close()
            except Exception as error:
                self._leave_out(name, error)
        self.sinks = {}

    def _leave_out(self, name: str, error: Exception) -> None:
        _logger.warning("%s no longer follows this work: %s", name, error)
        self.openers.pop(name, None)
        self.sinks.pop(name, None)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_tracker(run: config.Run, title: str, value: str, folder: Path) -> Tracker:
    """What follows one phase or expert; `value` is the hash of what shaped it, under which a resumed one goes on."""
    value = f"{value}-{title.replace(' ', '-')}"
    facts = run.model_dump(mode="json")
    openers: dict[str, Callable[[int], Sink]] = {
        "tensorboard": lambda step: TensorBoard(folder / "tensorboard", step),
        "wandb": lambda step: Wandb(facts, title, value, folder),
        "mlflow": lambda step: MLflow(facts, run.runtime, title, value),
    }
    return Tracker({name: openers[name] for name in run.runtime.track})


def is_curve(name: str) -> bool:
    """Whether a file of a storage is of a tracker."""
    return any(f"/{part}/" in name for part in FOLDERS)


class TensorBoard:
    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # else a kill would leave a gap before the step that is gone on from

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project `rmdd`, in the group of its run; WANDB_MODE, WANDB_API_KEY and the like decide where."""

    def __init__(self, facts: dict[str, Any], title: str, value: str, folder: Path):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rmdd"),
            id=value,
            resume="allow",
            name=f"{facts['name']} {title}",
            group=facts["name"],
            config=facts,
            dir=str(folder),
            settings=wandb.Settings(silent=True),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.run.step:  # W&B takes no step twice
            self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish(quiet=True)


class MLflow:
    """A run of the experiment `rmdd`, at MLFLOW_TRACKING_URI or in `mlflow.db` on a storage that is a folder."""

    def __init__(self, facts: dict[str, Any], runtime: config.Runtime, title: str, value: str):
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri and is_uri(runtime.storage):
            raise ValueError(f"{runtime.storage} cannot hold its database; set MLFLOW_TRACKING_URI to a server")
        self.client = MlflowClient(uri or f"sqlite:///{root_of(runtime)}/mlflow.db")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rmdd")
        experiment = self.client.get_experiment_by_name(name)
        of = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
        runs = self.client.search_runs([of], f"tags.rmdd = '{value}'", max_results=1)
        self.id = (runs or [self._begin(facts, title, value, of)])[0].info.run_id
        self.last_steps: dict[str, int] = {}

    def _begin(self, facts: dict[str, Any], title: str, value: str, experiment: str) -> Any:
        begun = self.client.create_run(experiment, tags={"rmdd": value}, run_name=f"{facts['name']} {title}")
        for section in ("data", "model", "experts", "distill"):
            for key, each in facts[section].items():
                self.client.log_param(begun.info.run_id, f"{section}.{key}", str(each)[:500])
        return begun

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self.last_steps:
                self.last_steps[name] = max((m.step for m in self.client.get_metric_history(self.id, name)), default=0)
            if step > self.last_steps[name]:
                self.client.log_metric(self.id, name, value, step=step)
                self.last_steps[name] = step

    def close(self) -> None:
        self.client.set_terminated(self.id)
