"""What `evaluation.json` says beside the table: certainty over images, the gap of peeking, and what it cost."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.config import budget
from rmdd.evaluate.bootstrap import DRAWS, METRICS, differences, intervals
from rmdd.evaluate.protocol import Job, StudentProtocol, summary
from rmdd.evaluate.references import Reference
from rmdd.evaluate.retrieval import Ranks

FLOAT = 4


ROWS = {"random": "baseline", "": "student", "full": "full"}
"""Kind of students of each row of the table; "" stands for the method."""


def by_kind(rows: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The records of the kinds that the table tells of."""
    return {kind: [r for job, r in rows if job.kind == kind] for kind in (*ROWS.values(), "reference")}


def table_of(
    method: str, records: Mapping[str, Sequence[dict[str, Any]]], probes: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Mean and spread of each row: val, test at the last pass, the reference where it was scored, and probes."""
    table: dict[str, dict[str, Any]] = {}
    for row, kind in ROWS.items():
        scores: dict[str, Any] = {key: summary(records[kind], key) for key in ("val", "test_last")}
        if probes:
            answers = [record["probes"] for record in records[kind]]
            scores["probes"] = {name: summary(answers, name) for name in probes}
        table[row or method] = scores
    if records["reference"]:
        table[method]["test_best_reference"] = summary(records["reference"], "test_best_reference")
    return table


def choices(
    protocol: StudentProtocol,
    candidates: Sequence[tuple[int, ...]],
    chosen: int,
    curve: Mapping[int, float],
    baseline: tuple[str, float],
    tried: Mapping[tuple[str, float], float],
) -> dict[str, Any]:
    """What was chosen on val: the snapshot of the set, by `curve`, and loss and rate of random pairs, by `tried`."""
    loss, lr = baseline
    return {
        "iterations": list(candidates[chosen]),
        "selection": {
            "rule": protocol.rule.selection,
            "val": [{"iterations": list(candidates[s]), "R@mean": v} for s, v in curve.items()],
        },
        "baseline": {
            "pairs": protocol.budget,
            "loss": loss,
            "lr": lr,
            "val": [{"loss": c[0], "lr": c[1], "R@mean": v} for c, v in tried.items()],
        },
    }


def beside(
    protocol: StudentProtocol,
    method: str,
    table: Mapping[str, Any],
    rows: Sequence[tuple[Job, Mapping[str, Any]]],
    ranks: Mapping[Job, Ranks],
    size: Mapping[str, Any],
) -> dict[str, Any]:
    """`certainty`, `size` and, where a reference was scored, `reference`, from all final students and their records."""
    of_rows = {row or method: [r for job, r in ranks.items() if job.kind == kind] for row, kind in ROWS.items()}
    sections = {"certainty": certainty(of_rows), "size": dict(size)}
    by_reference = [record for job, record in rows if job.kind == "reference"]
    if by_reference and (reference := protocol.reference):
        honest = table[method]["test_last"]["R@mean"]["mean"]
        sections["reference"] = peeking(reference, protocol.layout, by_reference, honest)
    return sections


def certainty(ranks: Mapping[str, Sequence[Ranks]], random: str = "random") -> dict[str, Any]:
    """95 % intervals of `test_last` per row of the table, over the images of test, and of each row minus `random`."""
    return {
        "over": f"images of test, drawn with their captions {DRAWS} times; 95 %, of the mean over students",
        "test_last": {row: {m: asdict(i) for m, i in intervals(students).items()} for row, students in ranks.items()},
        "minus_random": {
            row: {m: asdict(i) for m, i in differences(students, ranks[random], METRICS).items()}
            for row, students in ranks.items()
            if row != random
        },
        "ties": {row: max(r.recalls().gap for r in students) for row, students in ranks.items()},
    }


def peeking(
    reference: Reference, layout: str | None, records: Sequence[Mapping[str, Any]], test_last: float
) -> dict[str, Any]:
    """The protocol, and how far its number lies above the honest one, and above the last pass of its own students."""
    best = statistics.fmean(r["test_best_reference"]["R@mean"] for r in records)
    last = [r["curve"][-1]["test"]["R@mean"] if r["curve"] and "diverged" not in r else 0.0 for r in records]
    return {
        "protocol": reference.name,
        "split": reference.split(layout),
        "reported": reference.reported,
        "scorings": max(len(r["curve"]) for r in records),
        "students": len(records),
        "minus_test_last": best - test_last,
        "minus_own_last": best - statistics.fmean(last),
    }


def size(rule: config.Distill, stored_size: int, text_width: int) -> dict[str, Any]:
    """Numbers and float32 bytes of the set, similarity and rates included."""
    pairs = [p.pairs for p in rule.phases]
    numbers = budget.cost(pairs, stored_size, text_width, rule.similarity.kind, rule.similarity.rank)
    return {
        "pairs": sum(pairs),
        "numbers": numbers,
        "set_bytes": FLOAT * numbers,
        "iterations": [p.iterations for p in rule.phases],
    }


def clocks(
    runtime: config.Runtime, logs: Sequence[Path], store_bytes: int, steps: Mapping[str, float]
) -> dict[str, Any]:
    """What was measured, and so differs from one run to the next: seconds per iteration, GPU-hours, bytes of the store.

    GPU-hours are wall hours times GPUs: of distilling, over its iterations, each on one worker; of all steps, as long
    as they took with every GPU that the run had, busy or not.
    """
    seconds = [
        json.loads(line)["seconds"] for log in logs if log.is_file() for line in log.read_text().splitlines() if line
    ]
    each, workers = runtime.gpus_per_worker, _workers(runtime)
    return {
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "iterations_timed": len(seconds),
        "distill_gpu_hours": sum(seconds) / 3600 * each,
        "wall_hours": {step: duration / 3600 for step, duration in steps.items()},
        "gpus": each * workers,
        "gpu_hours": sum(steps.values()) / 3600 * each * workers,
        "store_bytes": store_bytes,
    }


def _workers(runtime: config.Runtime) -> int:
    """Workers side by side: as configured, else one per GPU that this machine has."""
    if runtime.workers is not None or runtime.gpus_per_worker == 0:
        return runtime.workers or 1
    import torch

    return max(1, int(torch.cuda.device_count() / runtime.gpus_per_worker))
