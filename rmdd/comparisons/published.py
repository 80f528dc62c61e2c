"""Published numbers as printed, with their sources and what speaks against them.

`published_results.csv` has a row per cell: method (a variant in brackets), dataset, pairs (nominal; `full`; empty where
the source does not print it), the encoders of the student, metric, mean and std as printed, source, note.
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
"""What a run file calls a dataset, and what the papers do."""

PICKED = "best of several passes, picked on test"
PROTOCOLS = {
    "MTT-VL": "last pass",
    "LoRS": PICKED,
    "RepBlend": PICKED,
    "PTM-ST": PICKED,
    "MDM": "last pass",
    "EDGE": "every 5 passes printed, choice not coded",
    "Full-data": "a trained expert",
}
UNKNOWN = "not stated"
NOTES = (
    "Published numbers were not measured here. They come from other students, schedules and budgets, and their spread "
    "is over students alone; several protocols pick the best pass on test.",
    "An R@mean in brackets was not printed and is the mean of the six recalls.",
    "Full-data bounds of one paper are no bound for the numbers of another.",
)


@dataclass(frozen=True)
class PublishedNumber:
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
        """The method without its variant."""
        return self.method.partition("[")[0]

    @property
    def protocol(self) -> str:
        """How the number was taken, by the code that was released for the method."""
        return PROTOCOLS.get(self.base_method, UNKNOWN)

    @property
    def unit(self) -> str:
        return UNITS[self.metric]


@functools.cache
def cells() -> tuple[PublishedNumber, ...]:
    """All published cells."""
    text = (resources.files("rmdd.comparisons") / "published_results.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(
        PublishedNumber(**row | {"mean": float(row["mean"]), "std": float(row["std"]) if row["std"] else None})  # type: ignore[arg-type]
        for row in rows
    )


def published(
    dataset: str | None = None, pairs: str | int | None = None, method: str | None = None
) -> list[dict[str, Any]]:
    """Published results, one row per method, budget, encoders and source: `metrics` by name with mean, std and unit.

    `dataset` is a layout of a run file or a name as printed, `method` a family such as LoRS; case does not matter.
    Raises ValueError for one that is not there.
    """
    datasets = {cell.dataset for cell in cells()}
    if dataset is not None:
        printed = LAYOUTS.get(dataset.lower(), dataset)
        dataset = next((name for name in datasets if name.lower() == printed.lower()), None)
        if dataset is None:
            raise ValueError(f"no published numbers of dataset '{printed}'; there are: {', '.join(sorted(datasets))}")
    methods = {cell.base_method for cell in cells()}
    if method is not None and method.lower() not in {f.lower() for f in methods}:
        raise ValueError(f"no published numbers of method '{method}'; there are: {', '.join(sorted(methods))}")
    if pairs is not None and str(pairs) not in (choices := budgets(dataset)):
        raise ValueError(f"no published numbers at a budget of '{pairs}'; there are: {', '.join(choices)}")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in cells():
        wanted = dataset in (None, cell.dataset) and (pairs is None or cell.pairs == str(pairs))
        if not wanted or (method is not None and cell.base_method.lower() != method.lower()):
            continue
        facts = {k: v for k, v in asdict(cell).items() if k not in ("metric", "mean", "std", "note")}
        row = rows.setdefault(tuple(facts.values()), facts | {"protocol": cell.protocol, "metrics": {}, "notes": []})
        row["metrics"][cell.metric] = {"mean": cell.mean, "std": cell.std, "unit": cell.unit}
        if cell.note and cell.note not in row["notes"]:
            row["notes"].append(cell.note)
    return list(rows.values())


def budgets(dataset: str | None = None) -> list[str]:
    """Of the cells of a dataset as printed, or of all; words and blanks after numbers."""
    sizes = {cell.pairs for cell in cells() if dataset in (None, cell.dataset)}
    return sorted(sizes, key=lambda b: (not b.isdigit(), int(b) if b.isdigit() else 0, b))


def beside(layout: str | None, budget: int) -> list[dict[str, Any]]:
    """Recalls published for the dataset of a run file, at its budget and of full data; none for other datasets.

    Variants of a method are left out.
    """
    if layout not in LAYOUTS:
        return []
    sizes = [size for size in (str(budget), "full") if size in budgets(LAYOUTS[layout])]
    rows = [row for size in sizes for row in published(layout, size) if "[" not in row["method"]]
    return [row for row in rows if row["metrics"].keys() & {*RECALLS, "R@mean"}]


def table(title: str, rows: Sequence[dict[str, Any]]) -> ResultTable:
    """A table apart from ours, of recalls where there are any, else of what there is."""
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
    """A row in the columns of our own, marked as published; val was never read."""
    out = {"name": row["method"], "kind": "published", "method": row["method"], "published": True}
    for metric in ("R@mean", *RECALLS):
        if metric in row["metrics"]:
            out |= {f"test_published_{metric}_{part}": row["metrics"][metric][part] for part in ("mean", "std")}
    encoders = {"image_encoder": row["image_encoder"], "text_encoder": row["text_encoder"]}
    return out | {"pairs": row["pairs"], **encoders, "protocol": row["protocol"], "source": row["source"]}
