"""Scored rows as plain values: what tables, pages and other programs are written from."""

import statistics
from collections.abc import Sequence
from typing import Any

from rmdd.comparisons import certainty
from rmdd.comparisons.engine import Row, Scored
from rmdd.config.recipes import TITLES
from rmdd.evaluate.protocol import summary

SPLITS = ("val", "test_last")
RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")
NAMES = {"random": "random pairs", "full": "all pairs", "tensors": "bare tensors", **TITLES}


def plain(row: Row, scored: Scored) -> dict[str, Any]:
    """One row: scores with mean, sample standard deviation and number, or `error`."""
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


def against(ours: tuple[dict[str, Any], Scored], other: tuple[dict[str, Any], Scored]) -> dict[str, Any] | None:
    """Paired difference in test R@mean: students that have the same number and so began alike, where both rows have
    them; None where one failed, and for full data, whose experts are no such students."""
    (row, scored), (base, its) = ours, other
    if any("error" in r or r["kind"] == "full" for r in (row, base)):
        return None
    gains = [a - b for a, b in zip(row["students"], base["students"], strict=False)]
    gain = {
        "to": base["name"],
        "mean": statistics.fmean(gains),
        "std": statistics.stdev(gains) if len(gains) > 1 else None,
        "n": len(gains),
    }
    return gain | {"interval": certainty.difference(scored.ranks, its.ranks)}


def of_full(rows: Sequence[dict[str, Any]]) -> None:
    """Give every row the ratio of its mean test R@mean to that of the full data, where that is a row, in percent."""
    bounds = [r["test_last"]["R@mean"]["mean"] for r in rows if r["kind"] == "full" and "error" not in r]
    for row in rows:
        has_ratio = bounds and bounds[0] > 0 and "error" not in row and row["kind"] != "full"
        row["of_full"] = 100 * row["test_last"]["R@mean"]["mean"] / bounds[0] if has_ratio else None
