"""Tables that take a distillation per cell: the collapse of late starts, and the ablations of PTM-ST's phases.

Each cell is an ordinary run with another `distill.phases`, run side by side as a sweep, so it is resumed, shared and
scored like one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.analyse.drawing import Sheet, write_csv
from rmdd.analyse.setting import TRAJECTORIES, check_every_epoch
from rmdd.artefact import budget
from rmdd.distill.planning import stated
from rmdd.distill.signals import val_curve
from rmdd.experts.store import Store
from rmdd.models.text import text_width
from rmdd.pipeline import open_pipeline
from rmdd.places import run_folder
from rmdd.progress import Progress
from rmdd.sweeps import Member, Swept, members, run_all

TABLES = ("shift", "endpoints", "delta")


def collapse_members(
    run: config.Run, epochs: Sequence[int], trajectories: Sequence[str], iterations: int | None = None
) -> list[Member]:
    """One run per trajectory and last start epoch: all pairs in one phase, starts uniform in 0 .. e - 1."""
    first, last = run.distill.phases[0], run.experts.epochs
    wrong = [e for e in epochs if not 1 <= e <= last - run.distill.match_epochs + 1]
    if wrong:
        raise ValueError(
            f"starts below epoch {wrong[0]} do not fit experts of {last} epochs; give epochs from 1 to "
            f"{last - run.distill.match_epochs + 1}"
        )
    pairs = _pairs_in_one(run)
    settings = []
    for trajectory in trajectories:
        for e in epochs:
            phase = first.model_dump(mode="json") | {"pairs": pairs, "start": 0, "stop": e, "endpoint": last}
            phase |= {"iterations": iterations} if iterations else {}
            settings.append({"distill.trajectory": trajectory, "distill.phases": [phase]})
    return _members(run, settings)


def collapse(
    run: config.Run,
    progress: Progress,
    *,
    epochs: Sequence[int] | None = None,
    iterations: int | None = None,
    trajectories: Sequence[str] = ("original",),
) -> dict[str, Any]:
    """Teacher against student by last start epoch (PTM-ST, figure 2a and Table 7); scored on val.

    Writes collapse.csv and collapse.svg to the run's folder `analyse`.
    """
    folder, (run, store) = run_folder(run), _prepared(run, progress)
    if "original" in trajectories:
        check_every_epoch(store)
    last = run.experts.epochs
    epochs = sorted(set(epochs or [max(1, round(last * i / 5)) for i in range(1, 6)]))
    wrong = sorted(set(trajectories) - set(TRAJECTORIES))
    if wrong or not trajectories:
        raise ValueError(f"no trajectory '{', '.join(wrong)}'; give one or both of {', '.join(TRAJECTORIES)}")
    cells = collapse_members(run, epochs, trajectories, iterations)
    swept = run_all(cells, progress)
    teacher = val_curve(store, [e for e in store.complete() if e < run.experts.num])
    rows: list[dict[str, Any]] = []
    for member, found in zip(cells, swept.runs, strict=True):
        stop = member.run.distill.phases[0].stop
        row = {"trajectory": member.run.distill.trajectory, "epoch": stop, "teacher": float(teacher[stop])}
        rows.append(row | _student(found))
    sheet = Sheet(1, width=4.4)
    lines = {"teacher": [float(teacher[e]) for e in epochs]}
    for trajectory in trajectories:
        of_one = [r for r in rows if r["trajectory"] == trajectory]
        lines[f"student, {trajectory}"] = [r.get("student", float("nan")) for r in of_one]
    sheet.lines(
        0, "teacher and student", epochs, lines, "epoch of the teacher, last start of the student", "val R@mean"
    )
    return _left(folder, "collapse", rows, sheet, swept)


def table_settings(run: config.Run, table: str) -> dict[str, list[dict[str, Any]]]:
    """Phases of each row of a table, by its name.

    `shift` (Table 13): ranges, or endpoints, as the first phase has them in all phases. `endpoints` (Table 14): all
    endpoints earlier and later by the distance of two phases, or by one epoch. `delta` (Table 15): ranges that move on
    by 0, 1 and 2 epochs a phase. Rows that do not fit the experts are left out.
    """
    if table not in TABLES:
        raise ValueError(f"no table '{table}'; give one of {', '.join(TABLES)}")
    phases = [p.model_dump(mode="json") for p in run.distill.phases]
    first, own = phases[0], {"as given": phases}
    if table != "endpoints" and len(phases) < 2:
        raise ValueError(
            f"the table '{table}' moves phases against each other and the run has one; give it two or more"
        )
    if table == "shift":
        still = {key: first[key] for key in ("start", "stop")}
        rows = own | {
            "ranges not shifted": [p | still for p in phases],
            "endpoints not shifted": [p | {"endpoint": first["endpoint"]} for p in phases],
        }
    elif table == "endpoints":
        step = phases[1]["endpoint"] - first["endpoint"] if len(phases) > 1 else 1
        rows = {
            "+".join(str(p["endpoint"] + d) for p in phases): [p | {"endpoint": p["endpoint"] + d} for p in phases]
            for d in (-step, 0, step)
        }
    else:
        rows = {
            f"delta {d}": [
                p | {"start": first["start"] + d * i, "stop": first["stop"] + d * i} for i, p in enumerate(phases)
            ]
            for d in (0, 1, 2)
        }
    return {name: row for name, row in rows.items() if all(_fits(run, p) for p in row)}


def sweep(run: config.Run, progress: Progress, table: str) -> dict[str, Any]:
    """One of the tables of `table_settings`, scored on val. Writes sweep-TABLE.csv and .svg to the folder `analyse`."""
    folder, (run, _) = run_folder(run), _prepared(run, progress)
    settings = table_settings(run, table)
    distinct: dict[str, str] = {}
    for name, phases in settings.items():
        distinct.setdefault(json.dumps(phases), name)
    cells = _members(run, [{"distill.phases": json.loads(phases)} for phases in distinct])
    swept = run_all(cells, progress)
    rows = [{"row": name, **_student(found)} for name, found in zip(distinct.values(), swept.runs, strict=True)]
    sheet = Sheet(1, width=1.5 + 1.3 * len(rows))
    places = list(range(len(rows)))
    ax = sheet.lines(0, table, places, {"": [r.get("student", float("nan")) for r in rows]}, "", "val R@mean")
    ax.set_xticks(places)
    ax.set_xticklabels([r["row"] for r in rows])
    return _left(folder, f"sweep-{table}", rows, sheet, swept)


def _pairs_in_one(run: config.Run) -> int:
    rule = run.distill
    paid = (rule.budget, run.data.image_size, text_width(run.model.text), rule.similarity.kind, rule.similarity.rank)
    return budget.largest(*paid, stored_size=run.stored_size)


def _fits(run: config.Run, phase: dict[str, Any]) -> bool:
    if not 1 <= phase["endpoint"] - (run.distill.endpoint_rule == "exclusive") <= run.experts.epochs:
        return False
    limit = run.experts.epochs if run.distill.trajectory == "original" else phase["endpoint"]
    return run.distill.reach(config.Phase(**phase)) <= limit


def _members(run: config.Run, settings: list[dict[str, Any]]) -> list[Member]:
    """Runs on the experts of `run`: what the store keeps stays as it is, lest others be trained."""
    raw = run.model_dump(mode="json")
    return members(lambda chosen: config.load(raw, chosen), {}, settings)


def _student(found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        return {"error": found["error"]}
    return {"student": found["val"]["mean"], "spread": found["val"]["std"]}


def _prepared(run: config.Run, progress: Progress) -> tuple[config.Run, Store]:
    """The run with its phases as if written by hand, and its experts."""
    with open_pipeline(run, progress) as pipeline:
        return stated(pipeline.plan()), pipeline.experts()


def _left(folder: Path, name: str, rows: list[dict[str, Any]], sheet: Sheet, swept: Swept) -> dict[str, Any]:
    files = [str(folder / "analyse" / f"{name}.{kind}") for kind in ("csv", "svg")]
    write_csv(Path(files[0]), rows)
    sheet.save(Path(files[1]))
    return {"rows": rows, "files": files, "sweep": str(swept.folder)}
