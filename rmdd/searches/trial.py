"""One trial: a run that is distilled from snapshot to snapshot and scored on val at each. It never opens test."""

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any

from rmdd import config, methods
from rmdd.core.progress import Progress
from rmdd.evaluate import protocol
from rmdd.execution.in_turn import InTurn
from rmdd.execution.tasks import Hooks
from rmdd.pipeline import Pipeline
from rmdd.runs.paths import candidates_of
from rmdd.runs.tasks import Item, phase

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Until:
    """The task `phase`, stopped at an iteration; gives True once that is reached."""

    iteration: int

    def __call__(self, item: Item, hooks: Hooks) -> bool:
        reached = 0

        def report(metrics: dict[str, Any]) -> None:
            nonlocal reached
            reached = metrics["done"]
            hooks.report(metrics)

        def should_stop() -> bool:
            return reached >= self.iteration or hooks.should_stop()

        return phase(item, replace(hooks, report=report, should_stop=should_stop)) or reached >= self.iteration


class Trial(Pipeline):
    """A run in rungs, one per snapshot. Finished rungs are reused: a trial run again goes on where it stopped."""

    def __init__(self, run: config.Run):
        self.worker = InTurn(run.runtime.threads)
        super().__init__(run, self.worker, Progress(quiet=True))
        self.splits = SPLITS
        self.curve: list[float] = []

    def run_rung(self, hooks: Hooks) -> dict[str, Any]:
        """Distil up to the next snapshot and score it: `step`, `val` R@mean there, and `done` at the last one with the
        `value` of the trial and its `cost`.

        `error` says why no number came of it: rates that derail a phase make a worthless trial (value 0), what the run
        file cannot be used for makes none.
        """
        self.worker.hooks = hooks
        try:
            return self._run_rung()
        except ArithmeticError as error:
            return {"done": True, "value": 0.0, "cost": self.cost(), "error": str(error)}
        except ValueError as error:
            return {"done": True, "error": str(error)}

    def _run_rung(self) -> dict[str, Any]:
        places, dataset = self.begin_phases(), self.ingest()
        step, rungs = len(self.curve), candidates_of(self.run)
        if not methods.find(self.run.distill.method).iterates:  # which has one rung
            self.distill()
        for p, iteration in enumerate(rungs[step]):
            if not places.set(p, iteration).is_file():
                item = replace(self._item(dataset), number=p)
                self._map("phases", Until(iteration), [item], {f"phase {p}": iteration})
        jobs = [job for job in protocol.selection_jobs(self.run, len(rungs)) if job.snapshot == step]
        records = self._students(dataset, "val", jobs, rungs)
        self.curve.append(statistics.fmean(record["val"]["R@mean"] for record in records))
        told: dict[str, Any] = {"step": step + 1, "val": self.curve[-1], "done": step + 1 == len(rungs)}
        told |= {"experts": places.store.name, "phases": places.phases.name}
        if told["done"]:
            best = max if self.run.evaluate.selection == "val_best" else lambda curve: curve[-1]
            told |= {"value": best(self.curve), "cost": self.cost()}
        return told

    def cost(self) -> dict[str, float]:
        """What the distillation has cost so far: outer updates, and seconds spent on them."""
        places = self.begin_phases()
        spent = {"iterations": 0.0, "seconds": 0.0}
        for p in range(len(self.run.distill.phases)):
            log = places.phase(p) / "metrics.jsonl"
            lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
            spent["iterations"] += len(lines)
            spent["seconds"] += sum(json.loads(line)["seconds"] for line in lines)
        return spent


def open_trial(text: str) -> Trial:
    """The trial of a resolved run, given as JSON."""
    return Trial(config.Run.model_validate_json(text))
