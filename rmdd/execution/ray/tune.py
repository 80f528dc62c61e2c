"""Ray Tune as the runner of a search: it places trials, restarts those whose worker died, and ends those told to end.

What is tried and what goes on is asked of an `TrialSource` (`rmdd.execution.trials`), which lives in the driver. So a
run of Tune keeps nothing that matters: one that was killed is followed by a new one, not restored, and drivers can
share a search.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from rmdd import config
from rmdd.execution.interrupts import stop_on_signal
from rmdd.execution.ray.actors import STOP_SECONDS
from rmdd.execution.ray.cluster import Resources
from rmdd.execution.ray.heartbeat import BEAT_SECONDS, TrialHeartbeat, TrialMonitor
from rmdd.execution.ray.worker import folder_to_check, require_visible
from rmdd.execution.tasks import Interrupted
from rmdd.execution.trials import TrialRunner, TrialSource

MANY = 10**6


class TrialActor(tune.Trainable):
    """A step is a rung. One actor makes many trials, one after the other."""

    def setup(
        self,
        config: dict[str, Any],
        open_runner: Callable[[Any], TrialRunner],
        threads: int,
        folder: Path | None,
        monitor: Any,
    ) -> None:
        require_visible(folder)
        import torch

        torch.set_num_threads(threads)
        self.open_runner, self.monitor, self.heartbeat = open_runner, monitor, TrialHeartbeat(monitor)
        self.runner = open_runner(config["what"])

    def step(self) -> dict[str, Any]:
        self.heartbeat.begin(self.trial_id)
        try:
            rung = self.runner.run_rung(self.heartbeat.hooks)
        except (Exception, Interrupted) as error:
            why = str(error) or "its process was told to go; it has saved"
            ray.get(self.monitor.note_failure.remote(self.trial_id, f"{type(error).__name__}: {why}"))
            raise RuntimeError(why) from error
        finally:
            self.heartbeat.end()
        return {"val": rung.get("val", 0.0), "rung": json.dumps(rung), "done": rung["done"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.runner = self.open_runner(new_config["what"])
        return True


class SourceSearcher(Searcher):
    """Tune's searcher: hands on the trials of the source, at most `width` at a time."""

    def __init__(self, source: TrialSource, width: int, monitor: Any):
        super().__init__(metric="val", mode="max")
        self.source, self.width, self.monitor = source, width, monitor
        self.names: dict[str, str] = {}
        """Of those at work, by Tune's id."""
        self.problem: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its searcher; this one is never restored

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.problem is None and len(self.names) >= self.width:
            return None
        try:
            trial = self.source.ask() if self.problem is None else None
        except Exception as error:
            self.problem, trial = error, None
        if trial is None:
            return Searcher.FINISHED
        self.names[trial_id] = trial[0]
        return {"what": trial[1]}

    def tell(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial goes on."""
        try:
            goes_on = self.problem is None and self.source.tell(self.names[trial_id], json.loads(result["rung"]))
        except Exception as error:
            self.problem, goes_on = error, False
        if not goes_on:
            del self.names[trial_id]
        return goes_on

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self.names:
            return
        if result is not None and "rung" in result and not error:
            self.tell(trial_id, result)
        else:
            why = ray.get(self.monitor.reason.remote(trial_id)) or "its worker died"
            advice = "more often than runtime.max_restarts allows; it goes on with the next `rmdd search`"
            self.source.fail(self.names.pop(trial_id), f"{why} ({advice})")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class SourceScheduler(FIFOScheduler):
    """Tune's scheduler: a trial ends when the source says so."""

    def __init__(self, searcher: SourceSearcher):
        super().__init__()
        self.searcher = searcher
        self.controller: Any = None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.controller = tune_controller

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if self.searcher.tell(trial.trial_id, result) else self.STOP

    def end(self) -> None:
        """Let no worker outlive a search that was stopped, also where the cluster does: Tune leaves them."""
        if self.controller is None:
            return
        for trial in self.controller.get_live_trials():
            if (actor := trial.temporary_state.ray_actor) is not None:
                ray.kill(actor)
        self.controller.cleanup()


class StopAndStall(tune.Callback):
    """Ends the search when it was asked to stop, and workers that give no sign of life; Tune begins their trials again.

    A signal that raised wherever it came could be lost in what Ray calls from its own threads.
    """

    def __init__(self, monitor: Any, stopped: Callable[[], bool], minutes: float | None, say: Callable[[str], None]):
        self.monitor, self.stopped, self.minutes, self.say = monitor, stopped, minutes, say
        self.looked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks; this one is never restored

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.stopped():
            raise Interrupted
        if self.minutes is None or time.monotonic() - self.looked < BEAT_SECONDS:
            return
        self.looked = time.monotonic()
        silent = ray.get(self.monitor.silent.remote(60 * self.minutes))
        for trial in trials:
            if trial.trial_id in silent and (actor := trial.temporary_state.ray_actor) is not None:
                self.say(f"no sign of life of a worker for {self.minutes:g} minutes (runtime.stall_limit); it is ended")
                ray.kill(actor)


def run_trials(
    source: TrialSource,
    open_runner: Callable[[Any], TrialRunner],
    runtime: config.Runtime,
    resources: Resources,
    most: int | None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Make trials side by side, as many as have room and at most `most`, until the source has none left to begin.

    Ctrl-C asks the workers to save what they have, and a second one ends them.
    """
    cpus, gpus = runtime.share
    monitor = ray.remote(TrialMonitor).options(num_cpus=0, max_concurrency=1).remote()
    searcher = SourceSearcher(source, min(resources.workers(runtime, MANY), most or MANY), monitor)
    scheduler = SourceScheduler(searcher)
    folder = folder_to_check(runtime, Path(runtime.storage) / "searches")
    parameters = {"open_runner": open_runner, "threads": runtime.threads, "folder": folder, "monitor": monitor}
    trainable = tune.with_resources(
        tune.with_parameters(TrialActor, **parameters),
        {"cpu": min(cpus, resources.widest), "gpu": math.ceil(gpus) if gpus > 1 else gpus},
    )
    try:
        with (
            stop_on_signal() as stopped,
            tempfile.TemporaryDirectory(prefix="rmdd-search-") as scratch,  # what Tune writes; nothing of it is read
        ):
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    metric="val",
                    mode="max",
                    num_samples=-1,
                    search_alg=searcher,
                    scheduler=scheduler,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[StopAndStall(monitor, stopped, runtime.stall_limit, say)],
                    failure_config=tune.FailureConfig(max_failures=runtime.max_restarts),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()
    except KeyboardInterrupt:
        try:
            _save(monitor)
        finally:
            scheduler.end()
        raise Interrupted from None
    finally:
        ray.kill(monitor)
    if searcher.problem is not None:
        raise searcher.problem


def _save(monitor: Any) -> None:
    """Have the workers save, and wait for it."""
    deadline = time.monotonic() + STOP_SECONDS
    ray.get(monitor.stop.remote())
    while ray.get(monitor.at_work.remote()) and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
