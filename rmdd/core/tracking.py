"""Write training curves to those of TensorBoard, W&B and MLflow that `runtime.track` lists.

The JSON-lines files of a run are the authoritative record; the curves are copies to look at. Work that resumes from a
checkpoint repeats some steps, but every tool shows each step once. For repeated steps, TensorBoard shows the new
values; W&B and MLflow keep the earlier values. If a tool fails, it is dropped with a warning and the work continues.
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
"""Names of the subfolders in which TensorBoard and W&B write their files."""

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One tracking tool, such as TensorBoard, opened for one curve."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes the values of each step to tracking tools. The functions `openers` open the tools at the first step."""

    def __init__(self, openers: Mapping[str, Callable[[int], Sink]]):
        self.openers = dict(openers)
        self.sinks: dict[str, Sink] = {}
        self.last = 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of the step with the number `step` (from 1). If `step` was added before, as after a rollback,
        the tracking tools are opened again, so that TensorBoard drops the old values from this step on."""
        if self.sinks and step <= self.last:
            self.close()
        self.last = step
        for name in list(self.openers):
            try:
                if name not in self.sinks:
                    self.sinks[name] = self.openers[name](step)
                self.sinks[name].add(step, values)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                sink.close()
            except Exception as error:
                self._drop(name, error)
        self.sinks = {}

    def _drop(self, name: str, error: Exception) -> None:
        _logger.warning("%s failed and no longer records this work: %s", name, error)
        self.openers.pop(name, None)
        self.sinks.pop(name, None)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_tracker(run: config.Run, title: str, value: str, folder: Path) -> Tracker:
    """Return the tracker of one phase or expert, called `title`.

    `value` is the hash of the settings that the phase or expert depends on: a resumed one has the same hash, and so
    continues the same curve.
    """
    value = f"{value}-{title.replace(' ', '-')}"
    facts = run.model_dump(mode="json")
    openers: dict[str, Callable[[int], Sink]] = {
        "tensorboard": lambda step: TensorBoard(folder / "tensorboard", step),
        "wandb": lambda step: Wandb(facts, title, value, folder),
        "mlflow": lambda step: MLflow(facts, run.runtime, title, value),
    }
    return Tracker({name: openers[name] for name in run.runtime.track})


def is_curve(name: str) -> bool:
    """Return whether the file `name` of a storage was written by a tracking tool."""
    return any(f"/{part}/" in name for part in FOLDERS)


class TensorBoard:
    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # otherwise a kill of the process would lose steps that the last checkpoint includes

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A W&B run in the project `rmdd`, grouped by the name of the rmdd run; W&B reads its environment variables."""

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
        if step >= self.run.step:  # W&B refuses a step that it already has
            self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish(quiet=True)


class MLflow:
    """An MLflow run in the experiment `rmdd`, stored at MLFLOW_TRACKING_URI (default: `mlflow.db` in the storage)."""

    def __init__(self, facts: dict[str, Any], runtime: config.Runtime, title: str, value: str):
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri and is_uri(runtime.storage):
            raise ValueError(f"MLflow cannot write its database to {runtime.storage}; set MLFLOW_TRACKING_URI")
        self.client = MlflowClient(uri or f"sqlite:///{root_of(runtime)}/mlflow.db")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rmdd")
        experiment = self.client.get_experiment_by_name(name)
        id = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
        runs = self.client.search_runs([id], f"tags.rmdd = '{value}'", max_results=1)
        self.id = (runs or [self._begin(facts, title, value, id)])[0].info.run_id
        self.last_steps: dict[str, int] = {}

    def _begin(self, facts: dict[str, Any], title: str, value: str, experiment: str) -> Any:
        run = self.client.create_run(experiment, tags={"rmdd": value}, run_name=f"{facts['name']} {title}")
        for section in ("data", "model", "experts", "distill"):
            for key, each in facts[section].items():
                self.client.log_param(run.info.run_id, f"{section}.{key}", str(each)[:500])
        return run

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self.last_steps:
                self.last_steps[name] = max((m.step for m in self.client.get_metric_history(self.id, name)), default=0)
            if step > self.last_steps[name]:
                self.client.log_metric(self.id, name, value, step=step)
                self.last_steps[name] = step

    def close(self) -> None:
        self.client.set_terminated(self.id)
