"""Ray Tune as the runner of a search: it places trials, restarts those whose worker died, and ends those told to end.

What is tried and what goes on is asked of an `rmdd.jobs.Inquiry`, which lives in the driver. So a run of Tune keeps
nothing that matters: one that was killed is followed by a new one, not restored, and drivers can share a search.
"""

import json
import math
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from rmdd import config
from rmdd.jobs import Climber, Inquiry
from rmdd.runtime.cluster import Resources

MANY = 10**6


class Climbing(tune.Trainable):
    """A step is a rung. One actor climbs for many trials, one after the other."""

    def setup(self, config: dict[str, Any], open_climber: Callable[[Any], Climber], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.open_climber = open_climber
        self.climber = open_climber(config["what"])

    def step(self) -> dict[str, Any]:
        rung = self.climber.climb()
        return {"val": rung.get("val", 0.0), "rung": json.dumps(rung), "done": rung["done"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.climber = self.open_climber(new_config["what"])
        return True


class Asking(Searcher):
    """Tune's searcher: hands on what the inquiry says, at most `width` at a time."""

    def __init__(self, inquiry: Inquiry, width: int):
        super().__init__(metric="val", mode="max")
        self.inquiry, self.width = inquiry, width
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
            why = "its worker failed or died too often (runtime.max_restarts); it goes on with the next `rmdd search`"
            self.inquiry.failed(self.names.pop(trial_id), why)

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

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if self.asking.told(trial.trial_id, result) else self.STOP


def climb(
    inquiry: Inquiry,
    open_climber: Callable[[Any], Climber],
    runtime: config.Runtime,
    resources: Resources,
    place: str,
    most: int | None,
) -> None:
    """Climb side by side, as many as have room and at most `most`, until the inquiry has nothing left to begin.

    `place`, a folder that all nodes see or a URI, holds what Tune writes while it runs. Ctrl-C ends at once; trials go
    on from their checkpoints.
    """
    cpus, gpus = runtime.share
    asking = Asking(inquiry, min(resources.workers(runtime, MANY), most or MANY))
    name = f"search-{uuid.uuid4().hex[:8]}"
    trainable = tune.with_resources(
        tune.with_parameters(Climbing, open_climber=open_climber, threads=runtime.threads),
        {"cpu": min(cpus, resources.widest), "gpu": math.ceil(gpus) if gpus > 1 else gpus},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="val",
            mode="max",
            num_samples=-1,
            search_alg=asking,
            scheduler=Judged(asking),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=place,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=runtime.max_restarts),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        tuner.fit()
    finally:
        if "://" not in place:
            shutil.rmtree(Path(place) / name, ignore_errors=True)
    if asking.problem is not None:
        raise asking.problem
