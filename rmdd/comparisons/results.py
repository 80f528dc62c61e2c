"""Convert scored rows to JSON values, from which tables and pages are written."""

import statistics
from collections.abc import Sequence
from typing import Any

from rmdd.comparisons import certainty
from rmdd.comparisons.engine import Row, ScoredRow
from rmdd.config.recipes import TITLES
from rmdd.evaluate.protocol import summary

SPLITS = ("val", "test_last")
RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")
NAMES = {"random": "random pairs", "full": "all pairs", "tensors": "bare tensors", **TITLES}


def row_values(row: Row, scored: ScoredRow) -> dict[str, Any]:
    """Return a scored row as JSON values: mean, sample standard deviation and number of students, or `error`."""
    method = row.entry.method
    values: dict[str, Any] = {
        "name": row.name,
        "kind": row.entry.kind,
        "method": NAMES.get(method, method),
        "rates": row.rates,
        "costs": row.costs,
        "remarks": list(row.remarks),
        "from": row.entry.address,
    }
    if scored.error is not None:
        return values | {"error": scored.error}
    if diverged := sum("diverged" in r for r in scored.records):
        values["remarks"].append(f"{diverged} of {len(scored.records)} students diverged and count as 0")
    values |= {split: summary(scored.records, split) for split in SPLITS}
    values["students"] = [r["test_last"]["R@mean"] for r in scored.records]
    values["interval"] = certainty.interval(scored.ranks if len(scored.ranks) == len(scored.records) else [])
    if scored.chosen is not None:
        values["chosen"] = scored.chosen
    return values


def difference(
    ours: tuple[dict[str, Any], ScoredRow], other: tuple[dict[str, Any], ScoredRow]
) -> dict[str, Any] | None:
    """Return the difference of two rows in test R@mean, over students paired by number (equal initial weights).

    Returns None if a row failed, and for full data, because experts cannot be paired with students.
    """
    (row, scored), (base, base_scored) = ours, other
    if any("error" in r or r["kind"] == "full" for r in (row, base)):
        return None
    gains = [a - b for a, b in zip(row["students"], base["students"], strict=False)]
    gain = {
        "to": base["name"],
        "mean": statistics.fmean(gains),
        "std": statistics.stdev(gains) if len(gains) > 1 else None,
        "n": len(gains),
    }
    return gain | {"interval": certainty.difference(scored.ranks, base_scored.ranks)}


def add_ratio_to_full(rows: Sequence[dict[str, Any]]) -> None:
    """Set `of_full` of each row to its test R@mean in percent of the full-data row's; None without a full-data row."""
    bounds = [r["test_last"]["R@mean"]["mean"] for r in rows if r["kind"] == "full" and "error" not in r]
    for row in rows:
        has_ratio = bounds and bounds[0] > 0 and "error" not in row and row["kind"] != "full"
        row["of_full"] = 100 * row["test_last"]["R@mean"]["mean"] / bounds[0] if has_ratio else None
