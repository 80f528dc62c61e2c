"""Controls for a run with several phases: what students gain from each subset, from the order, and from later phases.

The phases of the run are distilled as listed, and again in other ways: with independent phases if they are chained,
with every phase on the epochs of the first phase, and as one phase of the same budget and the same number of updates.
For each of these, students learn every subset alone and all subsets in every order. They are scored on val only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rmdd import config, methods
from rmdd.analyse.tables import FROM_THETA_0, pairs_of_budget, runs_with, scores_of
from rmdd.comparisons.engine import PAIRS, Costs, Row, run_jobs
from rmdd.comparisons.entries import Entry
from rmdd.config.order import Between, Order
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.distill.chain import is_chained
from rmdd.evaluate import protocol
from rmdd.evaluate.protocol import Job
from rmdd.evaluate.students import TrainingPairs
from rmdd.evaluate.training_pairs import write_pairs
from rmdd.execution.backend import hold_folders, open_backend
from rmdd.execution.tasks import Failed
from rmdd.experts.train import kept_epochs
from rmdd.pipeline import Pipeline
from rmdd.report.sheets import Sheet, write_csv
from rmdd.runs.items import distilled_pairs
from rmdd.runs.paths import candidates_of
from rmdd.searches.sweeps import message_of, run_side_by_side
from rmdd.searches.trial import SPLITS

CHAINED, INDEPENDENT, SAME, ONE = "chained", "independent", "same early phase", "one phase"
NOTE = (
    "student: mean val R@mean of the students of a row; spread: its sample standard deviation. chained: the paths of "
    "later phases start at students of the earlier phases. independent: all paths start at theta_0. same early phase: "
    "independent, and every phase has the start epochs and the endpoint of phase 0. one phase: all pairs that the "
    "budget pays for, and the updates of all phases together. first to last, last to first: students learn one subset "
    "after the other. cumulative: the first subset, then the first two joined, and so on. union: all subsets joined; "
    "images and texts of different subsets have similarity 0 (zeros) or are not compared (masked). Phase 0 has the "
    "same pairs whether phases are chained, independent or the same early phase, so it is scored alone only once. "
    "passes: training epochs on each subset or join of subsets, the best on val of those tried"
)


@dataclass(frozen=True)
class TrainingOrder:
    """The subsets that students learn, and whether they learn them one after the other or joined."""

    subsets: tuple[int, ...]
    order: Order = "sequence"
    between: Between = "zeros"


def training_orders(phases: int) -> dict[str, TrainingOrder]:
    """Return all training orders for a set with `phases` subsets, by name."""
    every = tuple(range(phases))
    alone = {f"phase {p} alone": TrainingOrder((p,)) for p in every}
    joined = {
        "first to last": TrainingOrder(every),
        "last to first": TrainingOrder(every[::-1]),
        "cumulative": TrainingOrder(every, "cumulative"),
        "union, zeros": TrainingOrder(every, "union"),
        "union, masked": TrainingOrder(every, "union", "masked"),
    }
    return alone | joined if phases > 1 else alone


@dataclass(frozen=True)
class PhaseComparison:
    """A comparison of the phases of a run with controls, by the val scores of students."""

    run: config.Run
    passes: Sequence[int] | None = None
    """Numbers of training epochs that are tried for every row; None: only `evaluate.epochs`."""
    students: int | None = None
    """Number of students per row; None: `evaluate.students`."""

    def runs(self) -> dict[str, config.Run]:
        """Return the run and its controls by name. Raise `ConfigError` if the run does not list two or more phases."""
        run, rule = self.run, self.run.distill
        if len(rule.phases) < 2:
            found = f"has {len(rule.phases)}" if rule.phases else "is planned"
            advice = "list two or more phases, or give the file `planned.yaml` of a run that planned its phases"
            mistake = f"the analysis compares subsets of several phases, but distill.phases {found}; {advice}"
            raise config.ConfigError([mistake], "analyse")
        try:
            methods.matching_method(run)
        except ValueError as error:
            raise config.ConfigError([str(error)], "analyse") from None
        phases = [phase.model_dump(mode="json") for phase in rule.phases]
        first, updates = phases[0], sum(phase.iterations for phase in rule.phases)
        early = [first | {"pairs": phase["pairs"], "iterations": phase["iterations"]} for phase in phases]
        whole = first | {
            "pairs": pairs_of_budget(rule, run.data.image_size, run.model.text),
            "iterations": updates,
        }
        settings: dict[str, dict[str, Any]] = {INDEPENDENT: FROM_THETA_0} if is_chained(rule) else {}
        if early != phases:
            settings[SAME] = FROM_THETA_0 | {"distill.phases": early}
        settings[ONE] = FROM_THETA_0 | {"distill.phases": [whole]}
        controls = runs_with(run.model_dump(mode="json"), kept_epochs(run.experts, run.endpoints), settings)
        return {CHAINED if is_chained(rule) else INDEPENDENT: run} | {m.label: m.run for m in controls}

    def execute(self, progress: Progress) -> dict[str, Any]:
        """Distil the run and its controls; train and score the students of all rows; return the rows.

        Each row reports the number of passes that is best on val. Write phases.csv and phases.svg to the run's folder
        `analyse`. A second call reuses all finished phases and students.
        """
        rule, runs, folder, runtime = self.run.evaluate, self.runs(), run_folder(self.run), self.run.runtime
        passes = sorted(set(self.passes or [rule.epochs]))
        if passes[0] < 1:
            raise config.ConfigError([f"--epochs {passes[0]} is not positive; give numbers such as 30,60"], "analyse")
        jobs = [Job("select", i, snapshot=0) for i in range(self.students or rule.students)]
        table: list[tuple[dict[str, Any], list[Row], str]] = []
        with (
            hold_folders(runtime, *map(run_folder, runs.values())),
            open_backend(runtime, folder / "events.jsonl", progress) as backend,
        ):
            pipelines = {name: Pipeline(run, backend, progress, splits=SPLITS) for name, run in runs.items()}
            errors = run_side_by_side(pipelines, Pipeline.distill, backend, progress)
            for kind, pipeline in pipelines.items():
                subsets = [] if kind in errors else _subsets(pipeline)
                for name, training in training_orders(len(pipeline.run.distill.phases)).items():
                    if kind != ONE and training.subsets == (0,) and any(rows for _, rows, _ in table):
                        continue  # this subset has the same pairs in all controls with several phases
                    facts = {"row": kind if kind == ONE else f"{kind}: {name}", "phases": kind, "order": name}
                    tried = [_row(facts["row"], pipeline, training, subsets, n) for n in passes] if subsets else []
                    table.append((facts, tried, message_of(errors[kind]) if kind in errors else ""))
            students = [(row, job) for _, tried, _ in table for row in tried for job in jobs]
            done = run_jobs("students", students, backend, progress)
            rows = [facts | ({"error": error} if error else _best(tried, jobs, done)) for facts, tried, error in table]
            files = [folder / "analyse" / f"phases.{kind}" for kind in ("csv", "svg")]
            write_csv(files[0], rows)
            _sheet(rows).save(files[1])
        return {"rows": rows, "note": NOTE, "files": [str(file) for file in files]}


def _subsets(pipeline: Pipeline) -> list[TrainingPairs]:
    """Return the training pairs of each phase after its last update, with images at their stored size."""
    item = pipeline.planned()
    item = replace(item, iterations=candidates_of(item.run)[-1])
    return distilled_pairs(item, pipeline.storage, item.run.stored_size)


def _row(name: str, pipeline: Pipeline, training: TrainingOrder, subsets: list[TrainingPairs], passes: int) -> Row:
    """Write the subsets to a file; return the row whose students learn them in `passes` passes."""
    file = write_pairs(pipeline.storage.root / PAIRS, [subsets[p] for p in training.subsets])
    changes: dict[str, Any] = {"order": training.order, "between": training.between, "epochs": passes, "probes": {}}
    run = pipeline.run.model_copy(update={"evaluate": pipeline.run.evaluate.model_copy(update=changes)})
    costs: Costs = {
        "pairs": sum(len(subsets[p].images) for p in training.subsets),
        "updates": protocol.updates(run.evaluate, [len(subsets[p].images) for p in training.subsets]),
    }
    relative = file.relative_to(pipeline.storage.root)
    return Row(f"{name}, {passes} passes", Entry(name, "set", file.stem), pipeline, run, "learned", relative, costs)


def _best(tried: Sequence[Row], jobs: Sequence[Job], done: dict[tuple[int, Job], Any]) -> dict[str, Any]:
    """Return the scores of the row that is best on val, or the error of a student of it."""
    records = {row: [done[id(row), job] for job in jobs] for row in tried}
    for failed in (r for rs in records.values() for r in rs if isinstance(r, Failed)):
        return {"error": failed.reason}
    best, _ = protocol.best_by_val([(row, record) for row in tried for record in records[row]])
    for diverged in (r["diverged"] for r in records[best] if "diverged" in r):
        return {"error": diverged}
    val = protocol.summary(records[best], "val")["R@mean"]
    return {"passes": best.run.evaluate.epochs, "student": val["mean"], "spread": val["std"], **best.costs}


def _sheet(rows: Sequence[dict[str, Any]]) -> Sheet:
    """Draw the rows: what students learn along the x axis, one colour per kind of phases, a line for one phase."""
    *several, one = rows
    names = list(dict.fromkeys(row["order"] for row in several))
    groups = {}
    for kind in dict.fromkeys(row["phases"] for row in several):
        by_name = {row["order"]: row for row in several if row["phases"] == kind}
        groups[kind] = scores_of([by_name.get(name, {}) for name in names])
    sheet = Sheet(1, width=1.5 + 1.1 * len(names))
    ax = sheet.rows(0, "students by phases and order", names, groups, "val R@mean, %")
    if "student" in one:
        ax.axhline(one["student"], color="black", ls="--", lw=1, label=ONE)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return sheet
