"""Write plots and tables of analyses as SVG and CSV files."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rmdd.core.files import atomic_path

COLOURS = ("#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5", "#868e96")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "rmdd",
}


class Sheet:
    """A figure with a row of panels; `save` writes it as an SVG file."""

    def __init__(self, panels: int, width: float = 3.6, height: float = 3.0):
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=(width * panels, height), layout="constrained")
            self.panels: list[Axes] = list(np.atleast_1d(self.figure.subplots(1, panels)))

    def save(self, path: Path) -> None:
        with matplotlib.rc_context(STYLE), atomic_path(path) as temporary:
            self.figure.savefig(temporary, format="svg", metadata={"Date": None})

    def lines(
        self,
        panel: int,
        title: str,
        x: Sequence[int | float],
        y: Mapping[str, Sequence[int | float]],
        xlabel: str,
        ylabel: str,
        spreads: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> Axes:
        """Draw named lines `y` over `x`, with error bars for names in `spreads`; ticks are integers if all `x` are."""
        ax = self.panels[panel]
        with matplotlib.rc_context(STYLE):
            for (name, values), colour in zip(y.items(), COLOURS * (1 + len(y)), strict=False):
                ax.errorbar(x, values, spreads.get(name), marker="o", ms=3, capsize=2, color=colour, label=name)
            ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if all(isinstance(value, int) for value in x):
                ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if len(y) > 1:
                ax.legend()
        return ax

    def rows(
        self,
        panel: int,
        title: str,
        names: Sequence[str],
        groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        ylabel: str,
    ) -> Axes:
        """Draw one point with an error bar per name and group, side by side; each group has means and spreads."""
        ax, ticks = self.panels[panel], np.arange(len(names))
        with matplotlib.rc_context(STYLE):
            for i, (group, (means, spreads)) in enumerate(groups.items()):
                at, colour = ticks + 0.15 * (i - (len(groups) - 1) / 2), COLOURS[i % len(COLOURS)]
                ax.errorbar(at, means, spreads, fmt="o", ms=5, capsize=4, color=colour, label=group)
            ax.set(title=title, ylabel=ylabel, xlim=(-0.5, len(names) - 0.5))
            ax.set_xticks(ticks, names)
        return ax

    def points(
        self,
        panel: int,
        title: str,
        groups: Mapping[str, tuple[Sequence[int | float], Sequence[int | float]]],
        xlabel: str,
        ylabel: str,
        legend: str,
    ) -> None:
        """Draw a scatter plot of named groups of points, with one colour per group; `legend` is the legend's title."""
        ax, shades = self.panels[panel], matplotlib.colormaps["viridis"]
        with matplotlib.rc_context(STYLE):
            for i, (name, (x, y)) in enumerate(groups.items()):
                ax.scatter(x, y, s=12, color=shades(i / max(1, len(groups) - 1)), label=name)
            ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
            ax.legend(ncols=2, title=legend, title_fontsize=8)

    def matrix(self, panel: int, title: str, values: np.ndarray, ticks: Sequence[int | float], label: str) -> None:
        """Draw a square matrix of cosines with colours from -1 to 1."""
        ax = self.panels[panel]
        with matplotlib.rc_context(STYLE):
            heat = ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
            positions = range(len(ticks))
            names = [f"{t:g}" for t in ticks]
            ax.set(title=title, xlabel=label, ylabel=label, xticks=positions, yticks=positions)
            ax.set_xticklabels(names)
            ax.set_yticklabels(names)
            self.figure.colorbar(heat, ax=ax, shrink=0.8, label="cosine")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write `rows` as CSV; without `columns`, the columns are all keys of the rows, in order of first appearance."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def draw_plan(plan: Mapping[str, Any], path: Path) -> None:
    """Draw what phases were planned from: gain on val and straightness of expert trajectories, gradient cosines."""
    signals = plan["signals"]
    sheet = Sheet(3 + len(signals["agreement"]))
    epochs = list(range(len(signals["val"])))
    ax = sheet.lines(0, "teacher's progress", epochs, {"": signals["share"]}, "epoch", "share of the gain on val")
    kinds = dict.fromkeys(zip(plan["endpoints"], map(tuple, plan["starts"]), strict=True))  # equal in a chain
    for p, (end, (first, last)) in enumerate(kinds):
        colour = COLOURS[(p + 1) % len(COLOURS)]
        ax.axvline(end, color=colour, ls="--", label=f"phase {p}: endpoint")
        ax.axvspan(first - 0.1, last + 0.1, color=colour, alpha=0.15, label=f"phase {p}: starts")
    ax.legend(fontsize=8)
    sheet.lines(
        1, "val gain per arc length", epochs[1:], {"": signals["gain_per_arc"]}, "epoch", "points per arc length"
    )
    straight = {int(e): s for e, s in signals["straightness"].items()}
    ax = sheet.lines(2, "straightness", list(straight), {"": list(straight.values())}, "endpoint", "chord over path")
    ax.set_ylim(0, 1.02)
    for p, matrix in enumerate(signals["agreement"]):
        sheet.matrix(3 + p, f"cosine of gradients: phase {p}", np.array(matrix), range(len(matrix)), "start epoch")
    sheet.save(path)
