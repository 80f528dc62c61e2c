"""The gate of a planned chain (`distill.plan.chain`): phases that do not raise the val score are dropped.

After each phase, students learn all subsets so far, in each order of `ORDERS`, and are scored on val. The better order
gives the score of these subsets. If the score with phase p is not above the score without it, or if phase p diverges,
phase p is dropped: the run is planned again with p phases, which share all pairs and updates. The new phases
have other sizes, so they get a folder of their own. A plan of one phase has no gate. When all phases are kept,
the better order for all subsets becomes that of the final students and of the set.

The records of the students are in the run folder, and decisions depend on nothing else. So a resumed run takes the same
decisions and trains no student twice. The decisions are written to plan.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.config.order import Order
from rmdd.core.files import atomic_path, read_json, write_json
from rmdd.distill.chain import is_chained
from rmdd.distill.guard import PhaseDiverged
from rmdd.distill.trajectory.planning import PLAN, with_explicit_phases, with_plan
from rmdd.evaluate.protocol import Job, best_by_val
from rmdd.runs.items import TaskItem
from rmdd.runs.paths import candidates_of

ORDERS: tuple[Order, ...] = ("cumulative", "union")
"""Orders that are compared on val; the first one wins a tie."""


def is_gated(rule: config.Distill) -> bool:
    """Return whether the phases are a planned chain, of which the gate may drop phases."""
    return rule.plans_chain and is_chained(rule)


def is_decided(plan: Mapping[str, Any]) -> bool:
    """Return whether no phase of a plan will be dropped: phases are independent, or the gate has kept each of them."""
    phases = len(plan["phases"])
    kept = [d for d in plan.get("decisions", []) if d["kept"] and d["phases"] == phases]
    return "path_start" not in plan or len(kept) == phases


def orders_at_gate(subsets: int) -> tuple[Order, ...]:
    """Return the orders that are compared for this number of subsets; for a single subset, all orders are equal."""
    return ORDERS if subsets > 1 else ORDERS[:1]


def students_at_gate(item: TaskItem, subsets: int) -> list[TaskItem]:
    """Return the inputs of the students that learn the first `subsets` subsets and choose on val."""
    rule, phases = item.run.evaluate, len(item.run.distill.phases)
    students = []
    for order in orders_at_gate(subsets):
        run = item.run.model_copy(update={"evaluate": rule.model_copy(update={"order": order})})
        for i in range(rule.selection_students):
            job = Job("select", i, gate=f"{subsets}of{phases}-{order}")
            students.append(replace(item, run=run, job=job, iterations=candidates_of(run)[-1][:subsets]))
    return students


def decision(
    item: TaskItem, students: Sequence[TaskItem], records: Sequence[dict[str, Any]], before: float | None
) -> dict[str, Any]:
    """Return the decision about the last phase that `students` learned; `before` is the score without that phase."""
    orders = [student.run.evaluate.order for student in students]
    order, val = best_by_val(list(zip(orders, records, strict=True)))
    subsets, score = len(students[0].iterations), val[order]
    scores = ", ".join(f"{name} {value:.2f}" for name, value in val.items())
    kept = before is None or score > before
    if before is None:
        reason = f"phase 0: students of its subset reach {score:.2f} on val"
    else:
        against = f"{'above' if kept else 'not above'} the {before:.2f} without it"
        reason = (
            f"phase {subsets - 1} is {'kept' if kept else 'dropped'}: students of the first {subsets} subsets reach "
            f"{score:.2f} on val ({scores}), {against}"
        )
    return _decision(item, subsets, kept, reason) | {"order": order, "score": score, "val": val}


def diverged(item: TaskItem, subsets: int, error: PhaseDiverged) -> dict[str, Any]:
    """Return the decision to drop phase `subsets - 1`, because it diverged.

    The stored reason is the first clause of the error message. The rest of the message gives advice and names files.
    """
    what = str(error).partition("; ")[0]
    return _decision(item, subsets, False, f"phase {subsets - 1} is dropped, because it diverged: {what}")


def _decision(item: TaskItem, subsets: int, kept: bool, reason: str) -> dict[str, Any]:
    facts = {"phases": len(item.run.distill.phases), "subsets": subsets, "kept": kept, "reason": reason}
    return facts | {"folder": item.paths.phases.name}


def write_plan(folder: Path, run: config.Run, plan: Mapping[str, Any]) -> None:
    """Write a plan to the folder of `run`; for `phases: auto`, also write `planned.yaml`, which lists the phases."""
    if run.distill.plan.kind == "auto":
        with atomic_path(folder / "planned.yaml") as temporary:
            temporary.write_text(config.dump(with_explicit_phases(with_plan(run, plan))), encoding="utf-8")
    write_json(folder / PLAN, plan)


def logs_of(item: TaskItem) -> list[Path]:
    """Return the metrics logs of all phases of a run, also of those that were distilled before a phase was dropped."""
    plan = item.paths.run / PLAN
    decisions = read_json(plan).get("decisions", []) if item.run.distill.plan.plans and plan.is_file() else []
    folders = dict.fromkeys([*(item.paths.phases.with_name(d["folder"]) for d in decisions), item.paths.phases])
    return [log for folder in folders for log in sorted(folder.glob("phase-*/metrics.jsonl"))]
