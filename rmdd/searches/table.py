"""Write the results of a search: a row per trial, the best run file and the HTML page with its plots."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from rmdd import config
from rmdd.core.files import atomic_path, write_json
from rmdd.core.storage import address_of, run_folder
from rmdd.report.search import write_page
from rmdd.report.sheets import write_csv
from rmdd.searches.loading import TrialLoader
from rmdd.searches.samplers import trials_of
from rmdd.searches.space import Space, decoded
from rmdd.searches.study import INFEASIBLE, PARTS

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "open",
    TrialState.WAITING: "open",
}
COSTS = ("iterations", "seconds")


@dataclass(frozen=True, repr=False)
class TrialTable:
    """The results of all trials of a search."""

    rows: list[dict[str, Any]]
    """A row per trial, in the order of the numbers of the trials."""
    best: list[int]
    """Numbers of the best trials: one trial or, if cost is minimised too (`search.cost`), the Pareto front."""
    importance: dict[str, float]
    """Importance of each field: the share (0 to 1) of the variance of val R@mean that the field explains."""

    @property
    def winner(self) -> dict[str, Any] | None:
        """Row of the trial with the best val R@mean (if equal, the first trial); None if no trial has finished."""
        rows = [row for row in self.rows if row["number"] in self.best]
        return max(rows, key=lambda row: row["val"], default=None)

    def __repr__(self) -> str:
        best = f", best val R@mean {self.winner['val']:.1f}" if self.winner else ""
        return f"TrialTable({len(self.rows)} trials{best})"


def write_table(loader: TrialLoader, folder: Path, study: optuna.Study) -> TrialTable:
    """Write `results.json`, `trials.csv`, `report.html` and, if a trial has finished, `best.yaml`."""
    table, base = table_of(loader, study), loader.base
    best = table.winner
    if best is not None:
        with atomic_path(folder / "best.yaml") as temporary:
            temporary.write_text(config.dump(loader.load(best["values"])), encoding="utf-8")
    write_json(
        folder / "results.json",
        {"schema_version": 1, "best": table.best, "importance": table.importance, "trials": table.rows},
    )
    fields = list(base.search.space)
    columns = ["number", "state", *fields, "val", "rungs", *COSTS, "run", "error"]
    flat = [{**row, **row["values"], **row["cost"], "rungs": len(row["curve"])} for row in table.rows]
    write_csv(folder / "trials.csv", flat, columns)
    write_page(folder / "report.html", base.name, base.search, table.rows, table.best, table.importance)
    return table


def table_of(loader: TrialLoader, study: optuna.Study) -> TrialTable:
    trials, search = trials_of(study), loader.base.search
    rows = [_row(loader, Space(search), t) for t in trials]
    done = [row for row in rows if row["state"] == "complete"]
    return TrialTable(rows, _best(done, search.cost), _importance(study, trials))


def _row(loader: TrialLoader, space: Space, trial: FrozenTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    values = {f: decoded(space.dimensions[f], trial.params[f]) for f in space.dimensions if f in trial.params}
    state = "infeasible" if attrs.get(INFEASIBLE) else STATES[trial.state]
    curve = attrs.get("curve", [])
    row: dict[str, Any] = {"number": trial.number, "state": state, "values": values, "curve": curve}
    row["val"] = trial.values[0] if trial.values else curve[-1] if curve else None
    row["cost"] = {kind: attrs[kind] for kind in COSTS if kind in attrs}
    if state != "infeasible" and trial.state.is_finished():
        row["run"] = address_of(loader.base.runtime, run_folder(loader.load(values)))
    return row | {name: attrs[name] for name in (*PARTS, "error") if name in attrs}


def _best(done: Sequence[Mapping[str, Any]], cost: str) -> list[int]:
    """Return the numbers of the trials on the Pareto front; if `cost` is none, the trial with the best val R@mean."""

    def key(row: Mapping[str, Any]) -> tuple[float, float]:
        return row["val"], 0.0 if cost == "none" else -row["cost"][cost]

    def beaten(row: Mapping[str, Any]) -> bool:
        val, cost = key(row)
        others = [key(other) for other in done]
        return any(o != (val, cost) and o[0] >= val and o[1] >= cost for o in others)

    best = [row["number"] for row in done if not beaten(row)]
    return best if cost != "none" else best[:1]


def _importance(study: optuna.Study, trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Return the share of the variance of val R@mean that each field explains (fANOVA), by field."""
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    if len(done) < 3 or len({t.values[0] for t in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda trial: trial.values[0]
            )
    except (ValueError, RuntimeError):  # Optuna raises this if no field is in all trials, or if no field varies
        return {}
    return {field: float(share) for field, share in shares.items()}
