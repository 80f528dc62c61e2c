"""Run the trials of a search by Ray Tune, which places trials on the cluster and restarts trials whose worker died.

A `TrialSource` (`rmdd.execution.trials`) in this process chooses the trials and decides which of them continue. Nothing
that Ray Tune stores is needed later. So a killed search resumes with a new run of Ray Tune, and several processes can
run trials of the same search.
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
    """Ray actor that runs trials one after another; Ray Tune calls `step` for each rung (step) of a trial."""

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
            why = str(error) or "its process was stopped; the trial saved its checkpoint first"
            ray.get(self.monitor.note_failure.remote(self.trial_id, f"{type(error).__name__}: {why}"))
            raise RuntimeError(why) from error
        finally:
            self.heartbeat.end()
        return {"val": rung.get("val", 0.0), "rung": json.dumps(rung), "done": rung["done"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.runner = self.open_runner(new_config["what"])
        return True


class SourceSearcher(Searcher):
    """Search algorithm for Ray Tune that takes trials from a `TrialSource` and runs at most `width` at a time."""

    def __init__(self, source: TrialSource, width: int, monitor: Any):
        super().__init__(metric="val", mode="max")
        self.source, self.width, self.monitor = source, width, monitor
        self.names: dict[str, str] = {}
        """Names of the running trials, by the id that Ray Tune gave each trial."""
        self.problem: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles this object, but never loads it

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
        """Pass the results of a trial's rung (step) to the `TrialSource`; return whether the trial continues."""
        try:
            continues = self.problem is None and self.source.tell(self.names[trial_id], json.loads(result["rung"]))
        except Exception as error:
            self.problem, continues = error, False
        if not continues:
            del self.names[trial_id]
        return continues

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self.names:
            return
        if result is not None and "rung" in result and not error:
            self.tell(trial_id, result)
        else:
            why = ray.get(self.monitor.reason.remote(trial_id)) or "its worker died"
            advice = "more than runtime.max_restarts failures; the next `rmdd search` continues this trial"
            self.source.fail(self.names.pop(trial_id), f"{why} ({advice})")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class SourceScheduler(FIFOScheduler):
    """Scheduler for Ray Tune that ends a trial early if the `TrialSource` decides so."""

    def __init__(self, searcher: SourceSearcher):
        super().__init__()
        self.searcher = searcher
        self.controller: Any = None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.controller = tune_controller

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if self.searcher.tell(trial.trial_id, result) else self.STOP

    def end(self) -> None:
        """Kill the workers of a stopped search. In a cluster that outlives the search, they would otherwise run on."""
        if self.controller is None:
            return
        for trial in self.controller.get_live_trials():
            if (actor := trial.temporary_state.ray_actor) is not None:
                ray.kill(actor)
        self.controller.cleanup()


class StopAndStall(tune.Callback):
    """Stops the search after a signal, and kills workers without a heartbeat, so that Ray Tune restarts their trials.

    After a signal, this callback raises the error. The signal handler must not raise it, because Ray could catch it.
    """

    def __init__(self, monitor: Any, stopped: Callable[[], bool], minutes: float | None, say: Callable[[str], None]):
        self.monitor, self.stopped, self.minutes, self.say = monitor, stopped, minutes, say
        self.checked_at = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles this object, but never loads it

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.stopped():
            raise Interrupted
        if self.minutes is None or time.monotonic() - self.checked_at < BEAT_SECONDS:
            return
        self.checked_at = time.monotonic()
        silent = ray.get(self.monitor.silent.remote(60 * self.minutes))
        for trial in trials:
            if trial.trial_id in silent and (actor := trial.temporary_state.ray_actor) is not None:
                self.say(f"a worker made no progress for {self.minutes:g} minutes (runtime.stall_limit); it is killed")
                ray.kill(actor)


def run_trials(
    source: TrialSource,
    open_runner: Callable[[Any], TrialRunner],
    runtime: config.Runtime,
    resources: Resources,
    most: int | None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Run all trials of `source`: as many in parallel as the cluster has room for, but at most `most`.

    After Ctrl-C the workers save their checkpoints and stop; a second Ctrl-C kills them.
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
            tempfile.TemporaryDirectory(prefix="rmdd-search-") as scratch,  # for Ray Tune; rmdd reads nothing here
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
    """Ask the workers to save their checkpoints and stop; return when all trials have ended."""
    deadline = time.monotonic() + STOP_SECONDS
    ray.get(monitor.stop.remote())
    while ray.get(monitor.at_work.remote()) and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
