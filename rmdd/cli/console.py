"""Tables and lists that the commands print on the terminal."""

import math
import os
from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rmdd.cli.table import FittedTable
from rmdd.config import as_yaml
from rmdd.report import referee
from rmdd.report.rows import COLUMNS, NAMES, score_rows

PAD = "  "
TABLE_WIDTH = 80
"""Width in characters of the tables of methods and of presets; on a narrower console they are as wide as it is."""


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # Rich would end the process here


def stdout() -> Console:
    """Return a console as wide as the terminal. For a file or pipe, it has the width in the variable `COLUMNS`; without
    this variable, it is 132 characters wide, and longer lines are not broken."""
    console = _Stdout()
    wide = console.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return console if wide else _Stdout(width=132, soft_wrap=True)


def results(evaluation: Mapping[str, Any]) -> RenderableType:
    """Return the tables of an evaluation: recalls, then the scores of each probe."""
    return Group(result_table(evaluation), *(probe_table(evaluation, name) for name in evaluation.get("probes", ())))


def probe_table(evaluation: Mapping[str, Any], name: str) -> Table:
    """Return a table of one probe: scores, chance level and, for kind vqa, the score of the most frequent answer."""
    facts = evaluation["probes"][name]
    table = FittedTable(title=f"Probe {name} ({facts['kind']}), in %", title_justify="left")
    rows = {row: scores["probes"][name] for row, scores in evaluation["table"].items()}
    metrics = list(next(iter(rows.values())))
    table.add_column("trained on")
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for row, scores in rows.items():
        table.add_row(NAMES.get(row, row), *(_spread(scores[metric]) for metric in metrics))
    table.add_section()
    baselines = {"chance": facts["chance"], "most frequent answer": facts.get("majority", {}).get("all")}
    for label, values in baselines.items():
        if values:
            table.add_row(label, *(f"{values[m]:.1f}" if m in values else "" for m in metrics), style="dim")
    return table


def result_table(evaluation: Mapping[str, Any]) -> Table:
    """Return a table of R@mean on val and recalls on test, with a row for each kind of training set."""
    warning = referee.gallery_warning(evaluation)
    notes = [evaluation["spread"], *([f"warning: {warning}"] if warning else []), *referee.lines(evaluation, NAMES)]
    caption = "\n".join(notes)
    table = FittedTable(title="Recall in %, mean ± spread", caption=caption, caption_justify="left")
    table.add_column("trained on")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    by_paper = "picked on test" if referee.picks_on_test(evaluation) else "last pass"
    for row in score_rows(evaluation):
        cells = [_spread({"mean": row[c], "std": row[f"{c} spread"]}) if c in row else "" for c in COLUMNS]
        picked = row["protocol"] == "test_best_reference"
        if picked:
            table.add_section()
        label = f"{row['trained on']}, reference protocol,\n{by_paper}" if picked else row["trained on"]
        table.add_row(label, *cells, style="dim" if picked else None)
    if expected := evaluation.get("chance"):
        val, test = expected["val"]["R@mean"], expected["test"]
        chance = {"val R@mean": val, "test R@mean": test["R@mean"], **test}
        table.add_section()
        table.add_row("chance", *(f"{chance[column]:.1f}" for column in COLUMNS), style="dim")
    return table


def sweep_table(runs: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with the runs (and the spread over students) above the settings (and the spread over seeds)."""
    table = FittedTable(
        title="R@mean in %, mean ± spread", caption="below the line: spread over seeds", caption_justify="left"
    )
    keys = dict.fromkeys(key for row in runs for key in row["settings"])
    for column in keys:
        table.add_column(column)
    for column in ("val", "test"):
        table.add_column(column, justify="right", no_wrap=True)
    for rows in (runs, groups if len(groups) < len(runs) else ()):
        table.add_section()
        for row in rows:
            words = [str(row["settings"].get(key, "")) for key in keys]
            table.add_row(*words, *(_spread(row[s]) if s in row else "failed" for s in ("val", "test_last")))
    return table


def search_table(rows: Sequence[Mapping[str, Any]], best: Sequence[int], most: int = 12) -> Table:
    """Return a table of the `most` trials with the best val R@mean; its caption counts the trials by state."""
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    table = FittedTable(title="val R@mean in %; test was not read", caption=counts, caption_justify="left")
    keys = dict.fromkeys(key for row in rows for key in row["values"])
    for column in ("trial", *keys, "val", "state"):
        table.add_column(column)
    for row in sorted((r for r in rows if r["val"] is not None), key=lambda r: -r["val"])[:most]:
        words = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row["values"].get(k, "") for k in keys)]
        style = "bold" if row["number"] in best else None
        table.add_row(f"{row['number']:03d}", *words, f"{row['val']:.1f}", row["state"], style=style)
    return table


def _spread(value: Mapping[str, Any]) -> str:
    spread = value["std"]
    has_spread = spread is not None and math.isfinite(spread)
    return f"{value['mean']:.1f} ± {spread:.1f}" if has_spread else f"{value['mean']:.1f}"


def plan(facts: Mapping[str, Any]) -> RenderableType:
    """Return what `rmdd check` prints; `facts` is the result of `rmdd.runs.preflight.examine`."""
    tables = (_facts(facts), *_overridden(facts["recipe"]), _phases(facts), _costs(facts))
    return Group(*tables, *(Text(f"note: {r}") for r in facts["remarks"]))


def _facts(facts: Mapping[str, Any]) -> Table:
    data, model, experts, pay, gpus = (facts[k] for k in ("data", "model", "experts", "budget", "gpus"))
    splits = data["counts"].items()
    counts = ", ".join(f"{split} {images:,} images / {captions:,} captions" for split, (images, captions) in splits)
    grid = Table.grid(padding=(0, 2))
    rows: dict[str, RenderableType] = {
        "run": f"{facts['run']}",
        "data": f"{counts} ({data['origin']})",
        "trained": f"image {model['image']:,} + text {model['text']:,} parameters; frozen {model['frozen']:,}; "
        f"double backward {model['double_backward']}",
        "experts": f"{experts['num']} in total, {experts['complete']} trained; epochs kept {experts['epochs_kept']}; "
        f"store {experts['store'] or 'named after the ingest'}",
        "method": _recipe(facts["recipe"]),
        "rates": ", ".join(f"{name} {rate:g}" for name, rate in facts["recipe"]["rates"].items() if rate is not None),
        "budget": f"{pay['used']:.2f} of {pay['pairs']} pairs ({pay['numbers']:,} of {pay['limit']:,} stored numbers)",
        "GPUs": "none requested"
        if not gpus["each"]
        else f"{gpus['each']:g} per worker; {gpus['experts']:g} for all experts at once, "
        f"{gpus['phases']:g} for all phases at once",
    }
    for part in facts["parts"]:
        size = "size unknown" if part["bytes"] is None else f"{part['bytes'] / 1e9:.2f} GB"
        state = f"MISSING: {', '.join(part['missing'][:4])}" if part["missing"] else f"revision {part['revision'][:15]}"
        rows[part["role"]] = f"{part['id']}, {size}, licence {part['licence'] or 'not stated'}; {state}"
    if search := facts["search"]:
        cost = "the distillation" if search["experts"] == "shared" else "experts and distillation"
        fields, trials = len(search["fields"]), search["trials"]
        rows["search"] = f"{fields} fields, {trials} trials, each trial repeats {cost}"
    if pay["over"]:
        rows["budget"] = Text(pay["over"], style="bold red")
    for name, text in rows.items():
        grid.add_row(name, text)
    return grid


def _recipe(recipe: Mapping[str, Any]) -> str:
    """Return the method of a run and its settings in a line."""
    similarity, shown = dict(recipe["similarity"]), [recipe["method"]]
    size = f" (rank {similarity['rank']}, alpha {similarity['alpha']:g})" if "rank" in similarity else ""
    shown += [f"{name} {recipe[name]}" for name in ("trajectory", "estimator", "loss") if name in recipe]
    shown += [f"similarity {similarity['kind']}{size}"]
    return "; ".join(shown + [f"{name} {recipe[name]}" for name in ("ema", "optimiser") if name in recipe])


def _overridden(recipe: Mapping[str, Any]) -> list[Table]:
    """Return a table of the method's default values that the run replaces; an empty list if it replaces none."""
    if not recipe["overridden"]:
        return []
    table = Table(title=f"Values of {recipe['method']} that are replaced")
    for column in ("field", recipe["method"], "used", "by"):
        table.add_column(column)
    for row in recipe["overridden"]:
        table.add_row(row["field"], *(_value(row[key]) for key in ("own", "used")), row["by"] or "")
    return [table]


def _value(value: Any) -> str:
    """Return a value of a run file as text; of phases, only the numbers of pairs and updates."""
    phases = isinstance(value, list) and value and isinstance(value[0], Mapping)
    if isinstance(value, float):
        return f"{value:g}"
    return " + ".join(f"{p['pairs']} pairs, {p['iterations']} updates" for p in value) if phases else str(value)


def _phases(facts: Mapping[str, Any]) -> Table:
    foreseen = facts["phases_foreseen"]
    table = FittedTable(title="Phases (forecast)" if foreseen else "Phases")
    matched = any("start" in p for p in facts["phases"])
    for column in ("phase", "pairs", *(("starts", "endpoint") if matched else ()), "iterations", "done"):
        table.add_column(column, justify="right")
    for number, p in enumerate(facts["phases"]):
        path = ["planned"] * 2
        if not foreseen:
            path = [f"{p['start']} to {p['stop'] - 1}", str(p["endpoint"])] if matched else []
        table.add_row(str(number), str(p["pairs"]), *path, str(p["iterations"]), "yes" if p["done"] else "no")
    return table


def _costs(facts: Mapping[str, Any]) -> Table:
    disk, time = facts["disk"], facts["time"]
    assumed = f"time: assumes {time['assumed']}; data loading is not included"
    table = FittedTable(title="Estimated cost", caption=assumed, caption_justify="left")
    for column in ("step", "disk", "memory per worker", "FLOPs", "time"):
        table.add_column(column, justify="right")
    step_memory = next(iter(facts["memory"].values()), None)
    rows = (("experts", disk["store"], None), ("distill", disk["phases"], step_memory), ("evaluate", None, None))
    table.add_row("ingest, embed", f"{size(disk['cache'])} + shards", "", "", "")
    for step, stored, memory in rows:
        counted = (f"{time['operations'][step]:.1e}", duration(time["seconds"][step]))
        table.add_row(step, size(stored), size(memory), *(counted if time["operations"][step] else ("", "")))
    return table


def size(number: int | None) -> str:
    if number is None:
        return ""
    power = min(4, max(0, (number.bit_length() - 1) // 10))
    return f"{number / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    """Return a number of seconds as text in the unit s, min, h or days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def comparison(rows: Sequence[Mapping[str, Any]], medians: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of the cosine and the norm ratio of the first-order and exact meta-gradients of every tensor."""
    table = FittedTable(title="first-order and exact meta-gradient: cosine (norm ratio)")
    table.add_column("iteration", justify="right")
    for name in medians:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "stopped" in row:
            table.add_row(str(row["iteration"]), row["stopped"])
            continue
        table.add_row(str(row["iteration"]), *(_pair(row["cosine"][n], row["norm_ratio"][n]) for n in medians))
    table.add_section()
    table.add_row("median", *(_pair(m["cosine"], m["norm_ratio"]) for m in medians.values()))
    return table


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one row per mapping in `rows` and one column per key of these mappings."""
    table = FittedTable()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for name in columns:
        table.add_column(name, justify="right" if isinstance(rows[0].get(name), float | int) else "left")
    for row in rows:
        values = [row.get(name, "") for name in columns]
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    return table


def health_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of how far embeddings have collapsed: a row per metric, a column per snapshot of a set."""
    table = FittedTable()
    for title in ("", *(" ".join(map(str, (row["set"], *row.get("iterations", ())))) for row in rows)):
        table.add_column(title, justify="right" if title else "left")
    for name in dict.fromkeys(key for row in rows for key in row if key not in ("set", "iterations")):
        table.add_row(name, *(f"{row[name]:.4g}" if name in row else "" for row in rows))
    return table


def _pair(cosine: float, ratio: float) -> str:
    return "-" if math.isnan(cosine) else f"{cosine:.2f} ({ratio:.2g})"


def methods(listed: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of distillation methods with family, requirements, paper, and what was verified."""
    caption = (
        "What is not verified needs a GPU, pretrained weights or the datasets.\n"
        "`rmdd methods NAME` prints idea, equations, defaults and presets of a method."
    )
    table = FittedTable(caption=caption, caption_justify="left", most=TABLE_WIDTH)
    for column in ("method", "family", "needs", "card"):
        table.add_column(column, overflow="fold")
    table.add_column("status", ratio=1)
    family = None
    for row in listed:
        if family not in (None, row["family"]):
            table.add_section()
        family = row["family"]
        needs, card = "\n".join(row["needs"]) or "-", row["card"].removeprefix("arXiv ")
        table.add_row(row["name"], family or "?", needs, card or "-", row["status"] or "-")
    return table


def method(facts: Mapping[str, Any]) -> list[str]:
    """Return the lines that describe a distillation method: docstring, defaults, options and presets."""
    lines = [facts["text"], "", f"from: {facts['place']}"]
    lines += [f"family: {facts['family']}; needs: {', '.join(facts['needs']) or 'nothing'}"]
    lines += [f"status: {facts['status']}"] if facts["status"] else []
    if facts["defaults"]:
        lines += ["defaults of this method:", *indent(as_yaml(facts["defaults"]), PAD).splitlines()]
    if facts["options"]:
        lines += ["distill.options:", *(f"{PAD}{key}: {meaning}" for key, meaning in facts["options"].items())]
    return [*lines, f"presets: {', '.join(facts['presets']) or 'none'}"]
