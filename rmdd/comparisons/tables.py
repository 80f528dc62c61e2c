"""Write result tables as Markdown, as CSV and as one self-contained HTML page."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rmdd.comparisons.results import RECALLS, SPLITS
from rmdd.core.files import atomic_path

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }}
body {{ max-width: 90rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word }} .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }}
th:first-child, td:first-child, .text {{ text-align: left }}
th:first-child, td:first-child {{ min-width: 7rem; white-space: normal; overflow-wrap: normal }}
@media (max-width: 600px) {{ th, td {{ padding: .25rem .35rem }} }}
.apart {{ border-left: 4px solid #8886; padding-left: 1rem; margin-top: 3rem; color: #888 }}
</style></head><body>
"""


TEXTS = ("method", "rates", "choice", "text encoder", "encoders", "protocol", "source")
"""Names of the columns that hold text, which is aligned to the left."""


@dataclass(frozen=True, repr=False)
class ResultTable:
    """A table of text cells with a title and notes."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """Sentences below the table that explain its columns."""
    apart: bool = False
    """Whether the table holds published results, which are shown separately."""

    def __repr__(self) -> str:
        return f"ResultTable({self.title}: {len(self.rows)} rows, {len(self.columns)} columns)"

    def aligned_left(self) -> list[bool]:
        """Return for each column of the table whether its cells are aligned to the left."""
        return [k == 0 or name in TEXTS for k, name in enumerate(self.columns)]


def markdown(title: str, tables: Sequence[ResultTable]) -> str:
    parts = [f"# {title}"]
    for table in tables:
        parts.append(f"## {table.title}")
        lines = [table.columns, ["---" if left else "---:" for left in table.aligned_left()], *table.rows]
        parts.append("\n".join("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |" for cells in lines))
        if table.notes:
            parts.append("\n".join(f"- {note}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def page(title: str, tables: Sequence[ResultTable]) -> str:
    """Return one HTML page that loads no other file. Columns with R@mean come first, so that a phone shows them."""
    parts = [HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>"]
    for table in tables:
        order = sorted(range(len(table.columns)), key=lambda k: (k > 0, "R@mean" not in table.columns[k]))
        classes = [' class="text"' if c in TEXTS else "" for c in table.columns]
        head = "".join(f"<th{classes[k]}>{escape(table.columns[k])}</th>" for k in order)
        body = "\n".join(
            "<tr>" + "".join(f"<td{classes[k]}>{escape(cells[k])}</td>" for k in order) + "</tr>"
            for cells in table.rows
        )
        notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
        parts.append(
            f'<section{" class=apart" if table.apart else ""}><h2>{escape(table.title)}</h2>\n<div class="wide">'
            f"<table><tr>{head}</tr>\n{body}</table></div>\n<ul>{notes}</ul></section>"
        )
    return "\n".join([*parts, "</body></html>\n"])


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return `rows` as CSV text; the columns are the keys of all rows, in order of first appearance."""
    buffer = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    return buffer.getvalue()


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as one mapping from CSV column to value; the column `published` is False for measured rows."""
    out = {key: row[key] for key in ("name", "kind", "method", "tower", "text", "rates") if key in row}
    out["published"] = False
    for split in SPLITS if "error" not in row else ():
        for metric in ("R@mean", *RECALLS):
            out |= {f"{split}_{metric}_{part}": row[split][metric][part] for part in ("mean", "std", "n")}
    for name in ("interval", "difference"):
        value = row.get(name) or {}
        inner = value.get("interval") or {} if name == "difference" else value
        out |= {f"{name}_{part}": inner.get(part) for part in ("low", "high")}
    out["difference_mean"] = (row.get("difference") or {}).get("mean")
    out["difference_to"] = (row.get("difference") or {}).get("to")
    return out | {"of_full": row.get("of_full"), **row.get("costs", {}), "error": row.get("error")}


def write(folder: Path, title: str, tables: Sequence[ResultTable], rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write `table.md`, `table.html` and `table.csv`; return their paths."""
    texts = {"table.md": markdown(title, tables), "table.html": page(title, tables), "table.csv": csv_of(rows)}
    for name, text in texts.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


# -- cells ---------------------------------------------------------------------------------------------------------


def spread(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def between(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['low']:.1f} to {value['high']:.1f}"


def gain(value: Mapping[str, Any] | None) -> str:
    """Return the difference between two rows, with its 95 % interval, as text."""
    if value is None:
        return ""
    inner = value["interval"]
    return f"{value['mean']:+.1f}" + ("" if inner is None else f" ({inner['low']:+.1f} to {inner['high']:+.1f})")


def count(value: int | float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def recalls(row: Mapping[str, Any]) -> list[str]:
    """Return the table cells for the scores of a row: R@mean on val, R@mean on test and the six recalls on test."""
    if "error" in row:
        return ["failed", *[""] * (1 + len(RECALLS))]
    return [spread(row["val"]["R@mean"]), *(spread(row["test_last"][m]) for m in ("R@mean", *RECALLS))]


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the remarks of all rows, then the errors of failed rows."""
    lines = [f"{row['name']}: {remark}" for row in rows for remark in row["remarks"]]
    return [*lines, *(f"{row['name']} failed: {row['error']}" for row in rows if "error" in row)]
