"""Plots of the HTML report as inline SVG. They load no URL and use the page's text colour and font.

M is the number of pairs of a subset.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGE, TEXT, REST = "#e8590c", "#1c7ed6", "#868e96"  # colours that are readable on white and on near-black
FULL = "#2f9e44"
INK = "#010203"  # placeholder that is replaced by the page's text colour
LEGEND = 40  # maximum number of letters of a legend with one row; longer legends have two columns
POINTS = 75  # maximum number of points of a curve; longer curves are averaged in bins
CELLS = 160  # maximum number of rows of a heat map; larger matrices are averaged in blocks

STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rmdd",
    "lines.linewidth": 1.6,
}


class Drawing:
    """A matplotlib figure with one plot; `svg()` returns it as inline SVG for HTML."""

    def __init__(self, title: str, xlabel: str = "", ylabel: str = "", size: tuple[float, float] = (4.0, 2.6)):
        self.title = title
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=size, layout="constrained")
            self.ax: Axes = self.figure.add_subplot()
            self.ax.set(title=title, xlabel=xlabel, ylabel=ylabel)

    def svg(self) -> str:
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE):
            if labels := self.ax.get_legend_handles_labels()[1]:
                columns = len(labels) if sum(map(len, labels)) <= LEGEND else 2
                self.figure.legend(loc="outside lower center", ncols=columns)
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        return _inline(buffer.getvalue(), self.title)


def _inline(svg: str, title: str) -> str:
    """Remove the parts that only a separate SVG file needs: prolog, metadata, namespaces, fixed size, fonts, ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    width, height = (float(v) for v in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    shape = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{title}"'
    svg = re.sub(r"<svg[^>]*>", f"<svg {shape}>", svg, count=1)
    return svg.replace(INK, "currentColor")


def curves(
    title: str,
    x: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    xlabel: str,
    *,
    level: tuple[float, str] | None = None,
) -> str:
    """Draw up to three named lines over `x`. Lines show the means of bins of points, bands the ranges of the bins.

    `level` (value and label) is drawn as a dotted horizontal line.
    """
    drawing = Drawing(title, xlabel)
    with matplotlib.rc_context(STYLE):
        for (name, y), colour in zip(lines.items(), (IMAGE, TEXT, FULL), strict=False):
            at, mean, low, high = _binned(np.asarray(x, float), np.asarray(y, float))
            drawing.ax.plot(at, mean, color=colour, label=name)
            drawing.ax.fill_between(at, low, high, color=colour, alpha=0.16, lw=0)
        if level is not None:
            drawing.ax.axhline(level[0], color=INK, lw=0.8, ls=":", label=level[1])
        drawing.ax.margins(x=0.01)
    return drawing.svg()


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    parts = [p for p in np.array_split(np.arange(len(x)), POINTS) if len(p)]
    mean, low, high = (np.array([reduce(y[p]) for p in parts]) for reduce in (np.mean, np.min, np.max))
    return np.array([x[p].mean() for p in parts]), mean, low, high


def snapshots(val: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> str:
    """Draw val R@mean of the set's snapshots against iterations of the longest phase; mark the exported snapshot."""
    drawing = Drawing("choice of the exported snapshot", "iterations", "val R@mean")
    points = sorted((max(v["iterations"]), v["R@mean"], list(v["iterations"]) == list(chosen)) for v in val)
    with matplotlib.rc_context(STYLE):
        drawing.ax.plot([p[0] for p in points], [p[1] for p in points], color=IMAGE, marker="o", ms=4)
        for x, y, is_chosen in points:
            if is_chosen:
                drawing.ax.plot([x], [y], color=IMAGE, marker="o", ms=10, mfc="none", ls="", label="exported")
    return drawing.svg()


def students(curves: Sequence[Sequence[Mapping[str, Any]]], epochs: int, levels: Mapping[str, float]) -> str:
    """Draw the val R@mean of every student over its training passes, with a dotted line where a new stage begins.

    A point of a curve has the number of its stage in the field `subset`.
    """
    drawing = Drawing("students during training", "passes", "val R@mean")
    with matplotlib.rc_context(STYLE):
        for i, curve in enumerate(curves):
            x = [p["subset"] * epochs + p["passes"] for p in curve]
            y = [p["val"]["R@mean"] for p in curve]
            label = None if i else "students"
            drawing.ax.plot(x, y, color=IMAGE, lw=1.1, alpha=0.75, marker=".", ms=4, label=label)
        for (name, value), colour in zip(levels.items(), (REST, FULL), strict=False):
            drawing.ax.axhline(value, color=colour, lw=1.2, ls="--", label=name)
        for stage in range(1, 1 + max((p["subset"] for c in curves for p in c), default=0)):
            drawing.ax.axvline(stage * epochs, color=INK, lw=0.8, ls=":")
        drawing.ax.set_ylim(bottom=0)
    return drawing.svg()


def tuning(val: Sequence[Mapping[str, Any]]) -> str:
    """Draw val R@mean against the learning rate, for students trained on random pairs, with one line per loss."""
    drawing = Drawing("random pairs, tuned on val", "student learning rate", "val R@mean")
    with matplotlib.rc_context(STYLE):
        for loss, colour in zip(dict.fromkeys(v["loss"] for v in val), (REST, TEXT, FULL), strict=False):
            points = sorted((v["lr"], v["R@mean"]) for v in val if v["loss"] == loss)
            drawing.ax.plot(*zip(*points, strict=True), color=colour, marker="o", ms=4, label=loss)
        drawing.ax.set_xscale("log")
    return drawing.svg()


def heat_map(matrix: Float[np.ndarray, "M M"], limit: float) -> str:
    """Draw a similarity matrix (images by texts) with colours from -limit to limit."""
    drawing = Drawing("", "text", "image", size=(3.6, 3.1))
    size, block = len(matrix), math.ceil(len(matrix) / CELLS)
    if block > 1:
        edges = np.arange(0, size, block)
        counts = np.diff(np.append(edges, size))
        matrix = np.add.reduceat(np.add.reduceat(matrix, edges, 0), edges, 1) / np.outer(counts, counts)
    with matplotlib.rc_context(STYLE):
        extent = (-0.5, size - 0.5, size - 0.5, -0.5)
        heat = drawing.ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none", extent=extent)
        bar = drawing.figure.colorbar(heat, ax=drawing.ax, shrink=0.85, extend="both")
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_linewidth(0.4)
    return drawing.svg()
