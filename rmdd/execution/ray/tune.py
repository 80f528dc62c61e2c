"""Ray Tune as the runner of a search: it places trials, restarts those whose worker died, and ends those told to end.

What is tried and what goes on is asked of an `Inquiry` (`rmdd.execution.tasks`), which lives in the driver. So a
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
from rmdd.execution.ray.actors import STOP_SECONDS
from rmdd.execution.ray.cluster import Resources
from rmdd.execution.ray.heartbeat import BEAT_SECONDS, Pulse, Watch
from rmdd.execution.ray.worker import folder_to_see, require_sight
from rmdd.execution.tasks import Climber, Inquiry, Interrupted, asked_to_stop

MANY = 10**6


class Climbing(tune.Trainable):
    """A step is a rung. One actor climbs for many trials, one after the other."""

    def setup(
        self,
        config: dict[str, Any],
        open_climber: Callable[[Any], Climber],
        threads: int,
        folder: Path | None,
        watch: Any,
    ) -> None:
        require_sight(folder)
        import torch

        torch.set_num_threads(threads)
        self.open_climber, self.watch, self.pulse = open_climber, watch, Pulse(watch)
        self.climber = open_climber(config["what"])

    def step(self) -> dict[str, Any]:
        self.pulse.begin(self.trial_id)
        try:
            rung = self.climber.climb(self.pulse.hooks)
        except (Exception, Interrupted) as error:
            why = str(error) or "its process was told to go; it has saved"
            ray.get(self.watch.blame.remote(self.trial_id, f"{type(error).__name__}: {why}"))
            raise RuntimeError(why) from error
        finally:
            self.pulse.end()
        return {"val": rung.get("val", 0.0), "rung": json.dumps(rung), "done": rung["done"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.climber = self.open_climber(new_config["what"])
        return True


class Asking(Searcher):
    """Tune's searcher: hands on what the inquiry says, at most `width` at a time."""

    def __init__(self, inquiry: Inquiry, width: int, watch: Any):
        super().__init__(metric="val", mode="max")
        self.inquiry, self.width, self.watch = inquiry, width, watch
        self.names: dict[str, str] = {}
        """Of those at work, by Tune's id."""
        self.problem: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its searcher; this one is never restored

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.problem is None and len(self.names) >= self.width:
            return None
        try:
            asked = self.inquiry.ask() if self.problem is None else None
        except Exception as error:
            self.problem, asked = error, None
        if asked is None:
            return Searcher.FINISHED
        self.names[trial_id] = asked[0]
        return {"what": asked[1]}

    def told(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to climb on."""
        try:
            goes_on = self.problem is None and self.inquiry.told(self.names[trial_id], json.loads(result["rung"]))
        except Exception as error:
            self.problem, goes_on = error, False
        if not goes_on:
            del self.names[trial_id]
        return goes_on

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self.names:
            return
        if result is not None and "rung" in result and not error:
            self.told(trial_id, result)
        else:
            why = ray.get(self.watch.reason.remote(trial_id)) or "its worker died"
            told = "more often than runtime.max_restarts allows; it goes on with the next `rmdd search`"
            self.inquiry.failed(self.names.pop(trial_id), f"{why} ({told})")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class Judged(FIFOScheduler):
    """Tune's scheduler: a trial ends when the inquiry says so."""

    def __init__(self, asking: Asking):
        super().__init__()
        self.asking = asking
        self.controller: Any = None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.controller = tune_controller

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if self.asking.told(trial.trial_id, result) else self.STOP

    def end(self) -> None:
        """Let no worker outlive a search that was stopped, also where the cluster does: Tune leaves them."""
        if self.controller is None:
            return
        for trial in self.controller.get_live_trials():
            if (actor := trial.temporary_state.ray_actor) is not None:
                ray.kill(actor)
        self.controller.cleanup()


class Guarding(tune.Callback):
    """Ends the search when it was asked to stop, and workers that give no sign of life; Tune begins their trials again.

    A signal that raised wherever it came could be lost in what Ray calls from its own threads.
    """

    def __init__(self, watch: Any, stopped: Callable[[], bool], minutes: float | None, say: Callable[[str], None]):
        self.watch, self.stopped, self.minutes, self.say = watch, stopped, minutes, say
        self.looked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks; this one is never restored

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.stopped():
            raise Interrupted
        if self.minutes is None or time.monotonic() - self.looked < BEAT_SECONDS:
            return
        self.looked = time.monotonic()
        silent = ray.get(self.watch.silent.remote(60 * self.minutes))
        for trial in trials:
            if trial.trial_id in silent and (actor := trial.temporary_state.ray_actor) is not None:
                self.say(f"no sign of life of a worker for {self.minutes:g} minutes (runtime.stall_limit); it is ended")
                ray.kill(actor)


def climb(
    inquiry: Inquiry,
    open_climber: Callable[[Any], Climber],
    runtime: config.Runtime,
    resources: Resources,
    most: int | None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Climb side by side, as many as have room and at most `most`, until the inquiry has nothing left to begin.

    Ctrl-C asks the workers to save what they have, and a second one ends them.
    """
    cpus, gpus = runtime.share
    watch = ray.remote(Watch).options(num_cpus=0, max_concurrency=1).remote()
    asking = Asking(inquiry, min(resources.workers(runtime, MANY), most or MANY), watch)
    judged = Judged(asking)
    folder = folder_to_see(runtime, Path(runtime.storage) / "searches")
    given = {"open_climber": open_climber, "threads": runtime.threads, "folder": folder, "watch": watch}
    trainable = tune.with_resources(
        tune.with_parameters(Climbing, **given),
        {"cpu": min(cpus, resources.widest), "gpu": math.ceil(gpus) if gpus > 1 else gpus},
    )
    try:
        with (
            asked_to_stop() as stopped,
            tempfile.TemporaryDirectory(prefix="rmdd-search-") as place,  # what Tune writes; nothing of it is read
        ):
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    metric="val",
                    mode="max",
                    num_samples=-1,
                    search_alg=asking,
                    scheduler=judged,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=place,
                    verbose=0,
                    callbacks=[Guarding(watch, stopped, runtime.stall_limit, say)],
                    failure_config=tune.FailureConfig(max_failures=runtime.max_restarts),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()
    except KeyboardInterrupt:
        try:
            _save(watch)
        finally:
            judged.end()
        raise Interrupted from None
    finally:
        ray.kill(watch)
    if asking.problem is not None:
        raise asking.problem


def _save(watch: Any) -> None:
    """Have the workers save, and wait for it."""
    deadline = time.monotonic() + STOP_SECONDS
    ray.get(watch.stop.remote())
    while ray.get(watch.at_work.remote()) and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
