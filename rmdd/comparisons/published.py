"""Results printed in papers, with their sources and known problems, read from `published_results.csv`.

The file has a row per number: method (a variant in brackets), dataset, pairs (nominal budget, `full`, or empty if not
printed), the student's encoders, metric, mean and std as printed, source, note.
"""

import csv
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from rmdd.comparisons.results import RECALLS
from rmdd.comparisons.tables import ResultTable

PERCENT = (*RECALLS, "R@mean", "ACC@1", "ACC@5", "ACC@10")
UNITS = {
    **dict.fromkeys(PERCENT, "%"),
    "s_per_iter": "s",
    "peak_GB": "GB",
    "avg_GB": "GB",
    "buffer_min_per_traj": "min",
    "buffer_GB_per_traj": "GB",
    "iters_to_best": "iterations",
    "total_min": "min",
}
LAYOUTS = {"flickr30k": "Flickr30k", "flickr8k": "Flickr8k", "coco": "COCO", "cc3m": "LLaVA-CC3M"}
"""Name that papers use for a dataset, by the `data.layout` of the dataset in a run file."""

PICKED = "best of several passes, picked on test"
PROTOCOLS = {
    "MTT-VL": "last pass",
    "LoRS": PICKED,
    "RepBlend": PICKED,
    "PTM-ST": PICKED,
    "MDM": "last pass",
    "EDGE": "prints every 5th pass; the choice is not in its code",
    "Full-data": "a trained expert",
}
UNKNOWN = "not stated"
NOTES = (
    "Published numbers were not measured here. They come from different students, schedules and budgets; their spread "
    "is only over students. Several protocols pick the best pass on test.",
    "An R@mean in brackets is not in the paper; it is the mean of the six printed recalls.",
    "The full-data result of one paper is no upper bound for the results of another paper.",
)


@dataclass(frozen=True)
class PublishedNumber:
    """One number of a published table, with its method, dataset, metric and source."""

    method: str
    dataset: str
    pairs: str
    image_encoder: str
    text_encoder: str
    metric: str
    mean: float
    std: float | None
    source: str
    note: str

    @property
    def base_method(self) -> str:
        """Name of the method without the variant in brackets."""
        return self.method.partition("[")[0]

    @property
    def protocol(self) -> str:
        """Rule by which the paper chose the pass whose score it reports, according to its released code."""
        return PROTOCOLS.get(self.base_method, UNKNOWN)

    @property
    def unit(self) -> str:
        return UNITS[self.metric]


@functools.cache
def cells() -> tuple[PublishedNumber, ...]:
    """Return all rows of `published_results.csv`."""
    text = (resources.files("rmdd.comparisons") / "published_results.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(
        PublishedNumber(**row | {"mean": float(row["mean"]), "std": float(row["std"]) if row["std"] else None})  # type: ignore[arg-type]
        for row in rows
    )


def published(
    dataset: str | None = None, pairs: str | int | None = None, method: str | None = None
) -> list[dict[str, Any]]:
    """Return published results, one row per method, budget, encoders and source.

    A row's `metrics` map the name of a metric to its mean, std and unit. `dataset` is a layout of a run file or a
    printed name, `method` a name such as LoRS, without a variant; case is ignored. Raises `ValueError` for unknown
    names, listing the known ones.
    """
    datasets = {cell.dataset for cell in cells()}
    if dataset is not None:
        printed = LAYOUTS.get(dataset.lower(), dataset)
        dataset = next((name for name in datasets if name.lower() == printed.lower()), None)
        if dataset is None:
            raise ValueError(f"no published results for dataset '{printed}'; available: {', '.join(sorted(datasets))}")
    methods = {cell.base_method for cell in cells()}
    if method is not None and method.lower() not in {f.lower() for f in methods}:
        raise ValueError(f"no published results of method '{method}'; available: {', '.join(sorted(methods))}")
    if pairs is not None and str(pairs) not in (choices := budgets(dataset)):
        raise ValueError(f"no published results at a budget of '{pairs}'; available: {', '.join(choices)}")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in cells():
        matches = dataset in (None, cell.dataset) and (pairs is None or cell.pairs == str(pairs))
        if not matches or (method is not None and cell.base_method.lower() != method.lower()):
            continue
        facts = {k: v for k, v in asdict(cell).items() if k not in ("metric", "mean", "std", "note")}
        row = rows.setdefault(tuple(facts.values()), facts | {"protocol": cell.protocol, "metrics": {}, "notes": []})
        row["metrics"][cell.metric] = {"mean": cell.mean, "std": cell.std, "unit": cell.unit}
        if cell.note and cell.note not in row["notes"]:
            row["notes"].append(cell.note)
    return list(rows.values())


def budgets(dataset: str | None = None) -> list[str]:
    """Return the budgets in pairs with published results on a dataset (or on any); words such as full come last."""
    sizes = {cell.pairs for cell in cells() if dataset in (None, cell.dataset)}
    return sorted(sizes, key=lambda b: (not b.isdigit(), int(b) if b.isdigit() else 0, b))


def for_dataset(layout: str | None, budget: int) -> list[dict[str, Any]]:
    """Return the published recalls on a run file's dataset, at its budget and for full data; variants are left out.

    The list is empty for a dataset without published results.
    """
    if layout not in LAYOUTS:
        return []
    sizes = [size for size in (str(budget), "full") if size in budgets(LAYOUTS[layout])]
    rows = [row for size in sizes for row in published(layout, size) if "[" not in row["method"]]
    return [row for row in rows if row["metrics"].keys() & {*RECALLS, "R@mean"}]


def table(title: str, rows: Sequence[dict[str, Any]]) -> ResultTable:
    """Return published rows as one table: the recalls or, if no row has recalls, all metrics of the rows."""
    metrics = ["R@mean", *RECALLS]
    if not any(m in row["metrics"] for m in metrics for row in rows):
        metrics = [m for m in UNITS if any(m in row["metrics"] for row in rows)]
    rows = [row for row in rows if any(m in row["metrics"] for m in metrics)]
    lines = []
    for row in rows:
        encoders = " + ".join(filter(None, (row["image_encoder"], row["text_encoder"]))) or "not stated"
        cells_ = [_cell(row["metrics"], metric) for metric in metrics]
        lines.append([row["method"], row["pairs"], encoders, *cells_, row["protocol"], row["source"]])
    notes = [*NOTES, *dict.fromkeys(f"{row['method']}, {row['source']}: {n}" for row in rows for n in row["notes"])]
    return ResultTable(title, ["method", "pairs", "encoders", *metrics, "protocol", "source"], lines, notes, apart=True)


def _cell(metrics: dict[str, Any], metric: str) -> str:
    if metric in metrics:
        std = metrics[metric]["std"]
        return f"{metrics[metric]['mean']:g}" + ("" if std is None else f" ± {std:g}")
    if metric == "R@mean" and all(m in metrics for m in RECALLS):
        return f"({sum(metrics[m]['mean'] for m in RECALLS) / len(RECALLS):.1f})"
    return ""


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a published row with the columns of `tables.flat`, marked as published; it has no scores on val."""
    out = {"name": row["method"], "kind": "published", "method": row["method"], "published": True}
    for metric in ("R@mean", *RECALLS):
        if metric in row["metrics"]:
            out |= {f"test_published_{metric}_{part}": row["metrics"][metric][part] for part in ("mean", "std")}
    encoders = {"image_encoder": row["image_encoder"], "text_encoder": row["text_encoder"]}
    return out | {"pairs": row["pairs"], **encoders, "protocol": row["protocol"], "source": row["source"]}
