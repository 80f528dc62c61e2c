"""Write the HTML page of a hyperparameter search: trials, importance of fields, val R@mean by field."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from rmdd import config
from rmdd.config.search import Dimension
from rmdd.core.files import atomic_path
from rmdd.report.plots import IMAGE, INK, REST, STYLE, TEXT, Drawing

Rows = Sequence[Mapping[str, Any]]
"""One row per trial, as written by `rmdd.searches.table`, in the order of the trial numbers."""

BEST = " The run file of the best trial is best.yaml in the folder of this page."
FIRST = 10
"""Number of trials with the best val R@mean that the page shows at once; the others are folded away."""
LABEL = 18
"""Maximum length of the label of a searched value on an axis; the table on the page has the full text."""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }}
body {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word }}
.plots {{ display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0 }} .plots svg {{ width: 22rem; max-width: 100% }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
.table {{ overflow-x: auto; overflow-wrap: normal }} summary {{ cursor: pointer; margin: 1rem 0 }}
th, td {{ padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8884 }} .best {{ font-weight: 700 }}
</style></head><body>
"""


def write_page(
    path: Path, name: str, rule: config.Search, rows: Rows, best: Sequence[int], shares: Mapping[str, float]
) -> None:
    """Write the HTML page of the search `name`. The page loads no URL.

    `best` holds the numbers of the best trials. `shares[field]` is the share of the variance of val R@mean that the
    field explains.
    """
    title = f"search: {name}"
    counts = Counter(row["state"] for row in rows)
    states = ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
    done = [row for row in rows if row["state"] == "complete"]
    drawings = [importance(shares)] if shares else []
    drawings += [
        slice_of(field, values, rows, best)
        for field, values in rule.space.items()
        if any(field in row["values"] for row in done)
    ]
    if rule.cost != "none" and done:
        drawings.append(front(rule.cost, done, best))
    parts = [
        HEAD.format(title=escape(title)),
        f"<h1>{escape(title)}</h1><p>{escape(states)}. Val R@mean in %; test was not read. "
        f"Sampler {rule.sampler}, pruner {rule.pruner}.{BEST if best else ''}</p>",
        _rows(list(rule.space), rows, best),
        f"<p>The importance of a field is estimated from {len(done)} finished trials (fANOVA); with few trials it is "
        "unreliable.</p>"
        if shares
        else "",
        f'<div class="plots">{"".join(drawings)}</div>',
        "</body></html>\n",
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _rows(fields: Sequence[str], rows: Rows, best: Sequence[int]) -> str:
    """Return the table of all trials, best val R@mean first; all but the first trials are folded away."""
    rows = sorted(rows, key=lambda row: -1.0 if row["val"] is None else row["val"], reverse=True)
    table = _table(fields, rows[:FIRST], best)
    if others := rows[FIRST:]:
        table += f"<details><summary>{len(others)} more trials</summary>{_table(fields, others, best)}</details>"
    return table


def _table(fields: Sequence[str], rows: Rows, best: Sequence[int]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("trial", "val", "state", *fields, "iterations"))
    body = ""
    for row in rows:
        cells = [row["number"], row["val"], row["state"], *(row["values"].get(f, "") for f in fields)]
        cells.append(row["cost"].get("iterations", ""))
        style = ' class="best"' if row["number"] in best else ""
        body += f"<tr{style}>" + "".join(f"<td>{escape(_word(cell))}</td>" for cell in cells) + "</tr>\n"
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'


def _word(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _label(choice: Any) -> str:
    """Shorten a searched value for an axis label; `$` is escaped because matplotlib would read it as a formula."""
    text = str(choice).replace("$", r"\$")
    return text if len(text) <= LABEL else f"{text[: LABEL - 3]}..."


def importance(shares: Mapping[str, float]) -> str:
    """Draw one bar per searched field: the share of the variance of val R@mean that the field explains."""
    drawing = Drawing("importance of fields", "share of the variance of val", size=(4.0, 0.8 + 0.3 * len(shares)))
    with matplotlib.rc_context(STYLE):
        names = list(shares)[::-1]
        drawing.ax.barh(range(len(names)), [shares[name] for name in names], 0.62, color=TEXT)
        drawing.ax.set_yticks(range(len(names)), names)
        drawing.ax.set_xlim(0, 1)
    return drawing.svg()


def slice_of(field: str, dimension: Dimension, rows: Rows, best: Sequence[int]) -> str:
    """Draw val R@mean against one field of the search; unfinished trials are grey, and the best have a ring."""
    drawing = Drawing(field, "", "val R@mean")
    rows = [row for row in rows if field in row["values"] and row["val"] is not None]
    choices = [json.dumps(choice) for choice in dimension.choice or ()]
    values = [row["values"][field] for row in rows]
    with matplotlib.rc_context(STYLE):
        _trials(drawing, [choices.index(json.dumps(v)) for v in values] if choices else values, rows, best)
        if choices:
            drawing.ax.set_xticks(range(len(choices)), [_label(choice) for choice in dimension.choice or ()])
        elif dimension.kind.startswith("log"):
            drawing.ax.set_xscale("log")
            ticks = log_ticks(*dimension.ends, integer=dimension.kind == "logint")
            drawing.ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            drawing.ax.xaxis.set_minor_locator(NullLocator())
        elif dimension.kind == "int":
            drawing.ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    return drawing.svg()


def _trials(drawing: Drawing, at: Sequence[float | int], rows: Rows, numbers: Sequence[int]) -> None:
    """Draw one point per trial in the colour of the trial's state, and a ring around each of the best trials."""
    for name, colour, complete in (("complete", IMAGE, True), ("pruned or open", REST, False)):
        points = [(x, r["val"]) for x, r in zip(at, rows, strict=True) if (r["state"] == "complete") == complete]
        if points:
            drawing.ax.plot(*zip(*points, strict=True), "o", ms=4, color=colour, label=name)
    if best := [(x, r["val"]) for x, r in zip(at, rows, strict=True) if r["number"] in numbers]:
        drawing.ax.plot(*zip(*best, strict=True), "o", ms=9, mfc="none", color=INK, label="best")


def log_ticks(low: float | int, high: float | int, integer: bool = False) -> list[float | int]:
    """Return up to four ticks, rounded to two digits and evenly spaced on a logarithmic axis."""
    spread = (float(f"{tick:.2g}") for tick in np.geomspace(low, high, 4))
    return list(dict.fromkeys(round(tick) if integer else tick for tick in spread))


def front(cost: str, done: Rows, best: Sequence[int]) -> str:
    """Draw val R@mean against cost, with one point per trial. Trials on the Pareto front get a ring."""
    drawing = Drawing("val against cost", cost, "val R@mean")
    with matplotlib.rc_context(STYLE):
        _trials(drawing, [row["cost"][cost] for row in done], done, best)
    return drawing.svg()
