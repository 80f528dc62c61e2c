"""Write the embedding health of a set (whether embeddings collapse) as CSV and SVG; plot it for the HTML report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmdd.report import plots
from rmdd.report.sheets import Sheet, write_csv

SIDES = ("image", "text")


def write_health(health: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the embedding health of a run to health.csv and health.svg; return both paths and that of health.json."""
    rows = [row | {"iterations": " ".join(map(str, row.get("iterations", ())))} for row in health["rows"]]
    write_csv(folder / "health.csv", rows)
    files = [folder / "health.json", folder / "health.csv"]
    if not _panels(health):
        return files
    sheet = Sheet(len(_panels(health)))
    for i, (title, x, lines, (level, name)) in enumerate(_panels(health)):
        ax = sheet.lines(i, title, x, lines, "iteration", "")
        ax.axhline(level, color="black", lw=0.8, ls=":", label=name)
        ax.legend(fontsize=8)
    sheet.save(folder / "health.svg")
    return [*files, folder / "health.svg"]


def drawings(health: Mapping[str, Any]) -> list[str]:
    """Return the plots of embedding health as inline SVG."""
    return [plots.curves(title, x, lines, "iteration", level=level) for title, x, lines, level in _panels(health)]


def _panels(
    health: Mapping[str, Any],
) -> list[tuple[str, Sequence[int], dict[str, list[float]], tuple[float, str]]]:
    """Return per embedding-health plot its title, iterations (x axis), lines, and the level of random real pairs."""
    sets = [row for row in health["rows"] if row["set"] == "distilled"]
    real = next(row for row in health["rows"] if row["set"] == "random pairs")
    x = [max(row["iterations"]) for row in sets]
    if any("cosine_image" not in row for row in (*sets, real)):
        return []
    panels = [
        (
            f"mean cosine of {side}s",
            x,
            {side: [row[f"cosine_{side}"] for row in sets]},
            (real[f"cosine_{side}"], "real"),
        )
        for side in SIDES
    ]
    ranks = {side: [row[f"rank_{side}"] / max(real[f"rank_{side}"], 1e-12) for row in sets] for side in SIDES}
    return [
        *panels,
        ("effective rank divided by that of random pairs", x, ranks, (1.0, "random pairs")),
        ("modality gap", x, {"gap": [row["gap"] for row in sets]}, (real["gap"], "random pairs")),
    ]
