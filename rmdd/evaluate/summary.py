"""Sections of `evaluation.json`: result table, choices on val, confidence intervals, reference protocol, size, cost."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rmdd import config
from rmdd.config import budget
from rmdd.evaluate.bootstrap import DRAWS, METRICS, differences, intervals
from rmdd.evaluate.protocol import Job, StudentProtocol, summary
from rmdd.evaluate.references import Reference
from rmdd.evaluate.retrieval import Ranks, chance
from rmdd.models.prepared import SplitSource

FLOAT = 4
"""Number of bytes of a float32 number."""

ROWS = {"random": "baseline", "": "student", "full": "full"}
"""Kind of jobs whose scores fill each row of the result table; in the table, the row "" has the name of the method."""


def by_kind(rows: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return, for each kind of job in the result table, the records of its students."""
    return {kind: [r for job, r in rows if job.kind == kind] for kind in (*ROWS.values(), "reference")}


def table_of(
    method: str, records: Mapping[str, Sequence[dict[str, Any]]], probes: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the result table: mean and standard deviation of the scores in each row, on val, test and each probe.

    The row of the method also has the scores by the reference protocol, if there is one.
    """
    table: dict[str, dict[str, Any]] = {}
    for row, kind in ROWS.items():
        scores: dict[str, Any] = {key: summary(records[kind], key) for key in ("val", "test_last")}
        if probes:
            probe_scores = [record["probes"] for record in records[kind]]
            scores["probes"] = {name: summary(probe_scores, name) for name in probes}
        table[row or method] = scores
    if records["reference"]:
        table[method]["test_best_reference"] = summary(records["reference"], "test_best_reference")
    return table


def examples_by_row(method: str, records: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return for each row of the result table the retrieval examples of its first student, if it has some."""
    firsts = {row or method: next(iter(records[kind]), {}) for row, kind in ROWS.items()}
    return {row: record["test_examples"] for row, record in firsts.items() if "test_examples" in record}


def gallery_sections(splits: SplitSource) -> dict[str, Any]:
    """Return the section `galleries`, sizes of the splits, and `chance`, recalls of random rankings."""
    opened = {name: splits.open(name).split for name in ("train", "val", "test")}
    expected = {name: chance(torch.from_numpy(opened[name].image_of)).as_dict() for name in ("val", "test")}
    return {"galleries": {name: split.facts() for name, split in opened.items()}, "chance": expected}


def choices_section(
    protocol: StudentProtocol,
    candidates: Sequence[tuple[int, ...]],
    chosen: int,
    curve: Mapping[int, float],
    baseline: tuple[str, float],
    tried: Mapping[tuple[str, float], float],
) -> dict[str, Any]:
    """Return the choices made on val: the snapshot of the set, and the loss and learning rate of the random baseline.

    `curve` maps snapshots, and `tried` maps (loss, learning rate), to their mean R@mean on val.
    """
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


def further_sections(
    protocol: StudentProtocol,
    method: str,
    table: Mapping[str, Any],
    rows: Sequence[tuple[Job, Mapping[str, Any]]],
    ranks: Mapping[Job, Ranks],
    size: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the sections `certainty`, `size` and, if a reference protocol was scored, `reference`."""
    of_rows = {row or method: [r for job, r in ranks.items() if job.kind == kind] for row, kind in ROWS.items()}
    sections = {"certainty": certainty(of_rows), "size": dict(size)}
    reference_records = [record for job, record in rows if job.kind == "reference"]
    if reference_records and (reference := protocol.reference):
        test_last = table[method]["test_last"]["R@mean"]["mean"]
        sections["reference"] = reference_section(reference, protocol.layout, reference_records, test_last)
    return sections


def certainty(ranks: Mapping[str, Sequence[Ranks]], random: str = "random") -> dict[str, Any]:
    """Return 95 % intervals over the test images for each table row, and for its difference from the row `random`."""
    return {
        "over": f"95 % intervals of the mean over students; test images are drawn with their captions {DRAWS} times",
        "test_last": {row: {m: asdict(i) for m, i in intervals(students).items()} for row, students in ranks.items()},
        "minus_random": {
            row: {m: asdict(i) for m, i in differences(students, ranks[random], METRICS).items()}
            for row, students in ranks.items()
            if row != random
        },
        "ties": {row: max(r.recalls().gap for r in students) for row, students in ranks.items()},
    }


def reference_section(
    reference: Reference, layout: str | None, records: Sequence[Mapping[str, Any]], test_last: float
) -> dict[str, Any]:
    """Return the settings of the reference protocol, and how much R@mean it gains by selecting a pass on test.

    `minus_test_last` is the protocol's R@mean minus that of our protocol; `minus_own_last` is the protocol's R@mean
    minus that of the same students after their last pass.
    """
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
    """Return how many numbers the set holds, including similarity and learning rates, and their bytes as float32."""
    pairs = [p.pairs for p in rule.phases]
    numbers = budget.cost(pairs, stored_size, text_width, rule.similarity.kind, rule.similarity.rank)
    return {
        "pairs": sum(pairs),
        "numbers": numbers,
        "set_bytes": FLOAT * numbers,
        "iterations": [p.iterations for p in rule.phases],
    }


def measured_cost(
    runtime: config.Runtime, logs: Sequence[Path], store_bytes: int, steps: Mapping[str, float]
) -> dict[str, Any]:
    """Return the measured cost, which varies between equal runs: seconds per iteration, GPU-hours, bytes of experts ...

    `distill_gpu_hours` counts the GPUs of one worker during each iteration. `gpu_hours` counts all GPUs of the run
    during all steps (ingest, experts, distill ...), busy or idle.
    """
    seconds = [
        json.loads(line)["seconds"] for log in logs if log.is_file() for line in log.read_text().splitlines() if line
    ]
    gpus_per_worker, workers = runtime.gpus_per_worker, _workers(runtime)
    return {
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "iterations_timed": len(seconds),
        "distill_gpu_hours": sum(seconds) / 3600 * gpus_per_worker,
        "wall_hours": {step: duration / 3600 for step, duration in steps.items()},
        "gpus": gpus_per_worker * workers,
        "gpu_hours": sum(steps.values()) / 3600 * gpus_per_worker * workers,
        "store_bytes": store_bytes,
    }


def _workers(runtime: config.Runtime) -> int:
    """Return the number of parallel workers: the configured one, or one per GPU of this machine."""
    if runtime.workers is not None or runtime.gpus_per_worker == 0:
        return runtime.workers or 1
    import torch

    return max(1, int(torch.cuda.device_count() / runtime.gpus_per_worker))
