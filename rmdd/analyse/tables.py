"""Tables of PTM-ST with one distillation per cell: students by the end of the start range, and ablations of phases.

Each cell is a run with changed `distill.phases`. All cells run as one sweep, so they can be resumed, and they share
experts and evaluation.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.analyse.setting import TRAJECTORIES, missing_epochs, stored_epochs
from rmdd.config import budget, recipes
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.distill.trajectory.planning import with_explicit_phases
from rmdd.distill.trajectory.statistics import val_curve
from rmdd.experts.store import Store
from rmdd.experts.train import kept_epochs
from rmdd.models.text import text_width
from rmdd.pipeline import open_pipeline
from rmdd.report.sheets import Sheet, write_csv
from rmdd.searches.sweeps import Member, SweepResult, members, run_all

TITLES = {
    "shift": "whether start ranges and endpoints move from phase to phase",
    "endpoints": "endpoints of the phases",
    "delta": "epochs by which start ranges move from phase to phase",
}
TABLES = tuple(TITLES)
STOP = "exclusive end of the start range"

FROM_THETA_0 = {
    "distill.path_start": "theta_0",
    **dict.fromkeys(("distill.path_lag", "distill.path_epochs", "distill.path_order")),
}
"""Fields of a run whose phases are independent."""


def collapse_members(
    run: config.Run, epochs: Sequence[int], trajectories: Sequence[str], iterations: int | None = None
) -> list[Member]:
    """Return one run per kind of trajectory and exclusive end `stop` of the start range.

    Each run has one phase with all pairs and integer start epochs in 0..stop - 1.
    """
    rule = run.distill
    phase: dict[str, Any] = {
        "pairs": pairs_of_budget(rule, run.data.image_size, run.model.text),
        "endpoint": run.experts.epochs + (rule.endpoint_rule == "exclusive"),
        "iterations": iterations or rule.phases[0].iterations,
    }
    options = {**rule.options, **recipes.find(rule.method).plain_options}
    plain: dict[str, Any] = {"start_rule": "exclusive", "options": options}
    run = run.model_copy(update={"distill": rule.model_copy(update=plain)})
    settings = {
        f"{trajectory}, {stop}": {
            **FROM_THETA_0,
            "distill.trajectory": trajectory,
            "distill.phases": [phase | {"start": 0, "stop": stop}],
        }
        for trajectory in trajectories
        for stop in epochs
    }
    return runs_with(run.model_dump(mode="json"), kept_epochs(run.experts, run.endpoints), settings)


def pairs_of_budget(rule: config.Distill, image_size: int, text: config.TextTower) -> int:
    """Return how many pairs the budget pays for, if all of them are in one phase."""
    similarity = (rule.similarity.kind, rule.similarity.rank)
    return budget.largest(rule.budget, image_size, text_width(text), *similarity, stored_size=rule.stored_size)


def collapse_axes(
    trained: int, stored: Collection[int], reach: int, epochs: Sequence[int] | None, trajectories: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Return both axes of the table: values of `stop`, the exclusive end of the start range (five by default), and
    kinds of trajectories.

    The experts are trained for `trained` epochs and keep the epochs `stored`; a target lies `reach` epochs after its
    start. Raise one `ConfigError` that lists all values, on both axes, that do not fit the experts.
    """
    last = trained - reach + 1
    chosen = sorted(set(epochs or [max(1, round(last * i / 5)) for i in range(1, 6)]))
    mistakes = [
        f"--epochs: stop {stop} ({STOP}) does not fit experts with {trained} epochs; give stops from 1 to {last}"
        for stop in chosen
        if not 1 <= stop <= last
    ]
    unknown = sorted(set(trajectories) - set(TRAJECTORIES))
    if unknown or not trajectories:
        mistakes.append(f"unknown trajectory '{', '.join(unknown)}'; give one or both of {', '.join(TRAJECTORIES)}")
    if "original" in trajectories:
        mistakes += missing_epochs(trained, stored)
    if mistakes:
        raise config.ConfigError(mistakes, "analyse")
    return chosen, list(dict.fromkeys(trajectories))


def collapse(
    run: config.Run,
    progress: Progress,
    *,
    epochs: Sequence[int] | None = None,
    iterations: int | None = None,
    trajectories: Sequence[str] = ("original",),
) -> dict[str, Any]:
    """Compare experts and students for each `stop`, the exclusive end of the start range (PTM-ST, figure 2a, Table 7).

    Experts and students are scored on val. Write collapse.csv and collapse.svg to the run's folder `analyse`; return
    the rows.
    """
    stored = stored_epochs(run.experts.epochs, kept_epochs(run.experts, run.endpoints))
    reach = run.distill.match_epochs
    epochs, trajectories = collapse_axes(run.experts.epochs, stored, reach, epochs, trajectories)
    if run.distill.phases:
        collapse_members(run, epochs, trajectories, iterations)  # this call raises `ConfigError` before any training
    folder, (run, store) = run_folder(run), _prepared(run, progress)
    cells = collapse_members(run, epochs, trajectories, iterations)
    swept = run_all(cells, progress)
    teacher = val_curve(store, [e for e in store.complete() if e < run.experts.num])
    rows: list[dict[str, Any]] = []
    for member, result in zip(cells, swept.runs, strict=True):
        stop = member.run.distill.phases[0].stop
        row = {"trajectory": member.run.distill.trajectory, "stop": stop, "teacher": float(teacher[stop])}
        rows.append(row | _student(result))
    sheet = Sheet(1, width=4.4)
    lines, spreads = {"teacher": [float(teacher[e]) for e in epochs]}, {}
    for trajectory in trajectories:
        name = f"student, {trajectory}"
        lines[name], spreads[name] = scores_of([r for r in rows if r["trajectory"] == trajectory])
    xlabel = f"students: stop ({STOP}); teacher: epoch"
    sheet.lines(0, "teacher and student", epochs, lines, xlabel, "val R@mean, %", spreads)
    return _write_table(folder, "collapse", rows, sheet, swept)


def table_settings(rule: config.Distill, epochs: int, table: str) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return the phases of each row of a PTM-ST table, by row name. Also return the names of rows left out.

    - `shift` (Table 13): all phases get the start range, or the endpoint, of the first phase
    - `endpoints` (Table 14): all endpoints move earlier and later, by the distance between two phases or by one epoch
    - `delta` (Table 15): start ranges move by 0, 1 and 2 epochs per phase

    A row is left out if the experts lack epochs for it. Raise `ConfigError` if the run has too few phases for `table`.
    """
    check_table(rule, table)
    phases = [p.model_dump(mode="json") for p in rule.phases]
    first, unchanged = phases[0], {"as given": phases}
    if table != "endpoints" and len(phases) < 2:
        raise config.ConfigError(
            [f"the table '{table}' compares shifts between phases, but distill.phases has one; list two or more"],
            "analyse",
        )
    if table == "shift":
        rows = unchanged | {"ranges not shifted": [p | _moved(first, 0) for p in phases]}
        if rule.trajectory == "shortcut":
            rows["endpoints not shifted"] = [p | {"endpoint": first["endpoint"]} for p in phases]
    elif table == "endpoints":
        step = phases[1]["endpoint"] - first["endpoint"] if len(phases) > 1 else 0
        rows = {
            "+".join(str(p["endpoint"] + d) for p in phases): [p | {"endpoint": p["endpoint"] + d} for p in phases]
            for d in (-(step or 1), 0, step or 1)
        }
    else:
        rows = {f"delta {d}": [p | _moved(first, d * i) for i, p in enumerate(phases)] for d in (0, 1, 2)}
    fit = {name: row for name, row in rows.items() if all(_fits(rule, epochs, p) for p in row)}
    return fit, [name for name in rows if name not in fit]


def check_table(rule: config.Distill, table: str) -> None:
    """Raise `ConfigError` if the table is unknown or does not exist for the run's kind of trajectory."""
    if table not in TABLES:
        raise config.ConfigError([f"unknown table '{table}'; give one of {', '.join(TABLES)}"], "analyse")
    if table == "endpoints" and rule.trajectory != "shortcut":
        mistake = f"trajectory '{rule.trajectory}' has no endpoint to move; set distill.trajectory: shortcut"
        raise config.ConfigError([f"the table 'endpoints': {mistake}"], "analyse")


def _moved(first: dict[str, Any], by: int) -> dict[str, Any]:
    """Return the fields `start`, `stop`, ... of the phase `first`, moved by `by` epochs."""
    ranges = ("start", "stop", "start_text", "stop_text", "grow_from")
    return {key: None if first[key] is None else first[key] + by for key in ranges}


def sweep(run: config.Run, progress: Progress, table: str) -> dict[str, Any]:
    """Run the PTM-ST table `table`, scored on val; write sweep-TABLE.csv and .svg to the run's folder `analyse`."""
    check_table(run.distill, table)
    if run.distill.phases:
        table_members(run, table)  # this call raises `ConfigError` before any training
    folder, (run, _) = run_folder(run), _prepared(run, progress)
    names, cells, skipped = table_members(run, table)
    for name in skipped:
        progress.say(f"skipped the row '{name}': its phases need epochs that the experts do not have")
    swept = run_all(cells, progress)
    rows = [{"row": name, **_student(result)} for name, result in zip(names, swept.runs, strict=True)]
    sheet = Sheet(1, width=1.5 + 1.3 * len(rows))
    sheet.rows(0, f"students by {TITLES[table]}", names, {"": scores_of(rows)}, "val R@mean, %")
    return _write_table(folder, f"sweep-{table}", rows, sheet, swept)


def table_members(run: config.Run, table: str) -> tuple[list[str], list[Member], list[str]]:
    """Return the names and runs of the table's distinct rows, and the names of rows that do not fit the experts."""
    rows, skipped = table_settings(run.distill, run.experts.epochs, table)
    distinct: dict[str, str] = {}
    for name, phases in rows.items():
        distinct.setdefault(json.dumps(phases), name)
    if not distinct:
        raise config.ConfigError([f"no row of the table '{table}' fits the experts; train them for longer"], "analyse")
    settings = {name: {"distill.phases": json.loads(phases)} for phases, name in distinct.items()}
    cells = runs_with(run.model_dump(mode="json"), kept_epochs(run.experts, run.endpoints), settings)
    return list(distinct.values()), cells, skipped


def _fits(rule: config.Distill, epochs: int, phase: dict[str, Any]) -> bool:
    """Return whether experts trained for `epochs` epochs have all epochs that the phase `phase` reads."""
    if not 1 <= phase["endpoint"] - (rule.endpoint_rule == "exclusive") <= epochs:
        return False
    limit = epochs if rule.trajectory == "original" else phase["endpoint"]
    return rule.reach(config.Phase(**phase)) <= limit


def runs_with(
    raw: dict[str, Any], kept: Collection[int] | None, settings: Mapping[str, dict[str, Any]]
) -> list[Member]:
    """Return one named run per entry of `settings`, which maps names to the fields changed in the run `raw`.

    All runs use the same experts, which keep the epochs `kept` (None: all epochs).
    """
    raw = raw | {"experts": raw["experts"] | {"keep": "all" if kept is None else list(kept)}}
    runs = members(lambda values: config.load(raw, values), {}, settings.values())
    return [replace(member, name=name) for name, member in zip(settings, runs, strict=True)]


def _student(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        return {"error": result["error"]}
    return {"student": result["val"]["mean"], "spread": result["val"]["std"]}


def scores_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Return the means and the spreads of val R@mean over the students of each row; NaN where there is none."""
    nan = float("nan")
    spreads = [r.get("spread") for r in rows]
    return [r.get("student", nan) for r in rows], [nan if s is None else s for s in spreads]


def _prepared(run: config.Run, progress: Progress) -> tuple[config.Run, Store]:
    """Train missing experts and plan the phases; return the run with its phases listed, and the experts' store."""
    with open_pipeline(run, progress) as pipeline:
        return with_explicit_phases(pipeline.plan()), pipeline.experts()


def _write_table(
    folder: Path, name: str, rows: list[dict[str, Any]], sheet: Sheet, swept: SweepResult
) -> dict[str, Any]:
    files = [str(folder / "analyse" / f"{name}.{kind}") for kind in ("csv", "svg")]
    write_csv(Path(files[0]), rows)
    sheet.save(Path(files[1]))
    return {"rows": rows, "files": files, "sweep": str(swept.folder)}
