"""`Trial`: a run that is distilled and scored on val one snapshot at a time; the test split is never read."""

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any

from rmdd import config, methods
from rmdd.core.progress import Progress
from rmdd.distill.chain import is_chained
from rmdd.evaluate import protocol
from rmdd.execution.backend import Backend
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.tasks import Hooks
from rmdd.pipeline import Pipeline
from rmdd.runs.gate import logs_of
from rmdd.runs.items import TaskItem
from rmdd.runs.paths import candidates_of
from rmdd.runs.tasks import DistillPhase

SPLITS = ("train", "val")


@dataclass(frozen=True)
class DistillUntil:
    """Task that distils a phase up to `iteration`; the result is whether that iteration was reached."""

    iteration: int

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        reached = 0

        def report(metrics: dict[str, Any]) -> None:
            nonlocal reached
            reached = metrics["done"]
            hooks.report(metrics)

        def should_stop() -> bool:
            return reached >= self.iteration or hooks.should_stop()

        finished = DistillPhase()(item, replace(hooks, report=report, should_stop=should_stop))
        return finished or reached >= self.iteration


class Trial:
    """A run that is distilled and scored one snapshot at a time. A restarted trial skips finished snapshots."""

    def __init__(self, run: config.Run):
        self.worker = SequentialExecutor(run.runtime.threads)
        self.pipeline = Pipeline(run, Backend(self.worker), Progress(quiet=True), splits=SPLITS)
        self.item: TaskItem | None = None
        self.curve: list[float] = []

    def run_rung(self, hooks: Hooks) -> dict[str, Any]:
        """Distil up to the next snapshot and score the snapshot on val.

        Returns `step` (number of the snapshot, from 1), `val` (R@mean) and `done` (whether it was the last snapshot).
        After the last snapshot, also returns `value` (the trial's final score) and `cost`. If a phase diverges, `value`
        is 0 and `error` is the message. If the run is invalid, only `done` and `error` are returned.
        """
        self.worker.hooks = hooks
        try:
            return self._score_next()
        except ArithmeticError as error:
            return {"done": True, "value": 0.0, "cost": self.cost(), "error": str(error)}
        except ValueError as error:
            return {"done": True, "error": str(error)}

    def _score_next(self) -> dict[str, Any]:
        item, steps, step = self.pipeline.begin_phases(), self.pipeline.steps, len(self.curve)
        self.item = item
        if not methods.method_of(item.run).iterates or is_chained(item.run.distill):
            self.item = item = self.pipeline.distilled()  # all snapshots at once
        candidates = candidates_of(item.run)
        for p, iteration in enumerate(candidates[step]):
            if not item.paths.set(p, iteration).is_file():
                steps.map("phases", DistillUntil(iteration), [replace(item, number=p)], {f"phase {p}": iteration})
        jobs = [job for job in protocol.selection_jobs(item.run.evaluate, len(candidates)) if job.snapshot == step]
        records = steps.students(item, "val", jobs, candidates)
        self.curve.append(statistics.fmean(record["val"]["R@mean"] for record in records))
        score: dict[str, Any] = {"step": step + 1, "val": self.curve[-1], "done": step + 1 == len(candidates)}
        score |= {"experts": item.paths.store.name, "phases": item.paths.phases.name}
        if score["done"]:
            best = max if item.run.evaluate.selection == "val_best" else lambda curve: curve[-1]
            score |= {"value": best(self.curve), "cost": self.cost()}
        return score

    def cost(self) -> dict[str, float]:
        """Return how many outer iterations all phases, dropped ones included, have done, and their seconds."""
        total = {"iterations": 0.0, "seconds": 0.0}
        for log in logs_of(self.item or self.pipeline.begin_phases()):
            lines = log.read_text(encoding="utf-8").splitlines()
            total["iterations"] += len(lines)
            total["seconds"] += sum(json.loads(line)["seconds"] for line in lines)
        return total


def open_trial(text: str) -> Trial:
    """Create the trial whose run is given as JSON text."""
    return Trial(config.Run.model_validate_json(text))
