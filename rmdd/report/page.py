"""Write `report.html`, one file about a finished run: scores, pairs before and after distillation, curves, cost."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rmdd.artefact import card
from rmdd.artefact.distilled import DistilledSet, Subset
from rmdd.config.order import in_words
from rmdd.config.recipes import TITLES
from rmdd.core.files import atomic_path, read_json
from rmdd.data.images import denormalise
from rmdd.data.shards import MANIFEST, Dataset
from rmdd.distill.sets import load_set
from rmdd.distill.trajectory.planning import PLAN
from rmdd.experts.store import stored_bytes
from rmdd.methods import method_of
from rmdd.report import examples, health, plots, referee
from rmdd.report.pictures import data_uri
from rmdd.runs.paths import EXAMPLES

if TYPE_CHECKING:
    from torch import Tensor

    from rmdd import config
    from rmdd.methods.base import BaseMethod
    from rmdd.runs.paths import RunPaths

RECALLS = ("R@mean", "IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")
GALLERY = 60  # maximum number of pairs in the gallery
FIRST = 8  # number of pairs of all subsets that are shown at once; the others are folded away
EXACT_BYTES = 1_500_000  # galleries with fewer bytes of pixels are stored losslessly as PNG
SIDE = 96  # side in pixels of the images of larger galleries, stored as JPEG
STRONGEST = 3  # number of largest off-diagonal similarities that are listed under a heat map


def write_report(
    page: Path,
    run: config.Run,
    paths: RunPaths,
    set_path: Path,
    evaluation: dict[str, Any],
    seconds: dict[str, float],
    measured: dict[str, Any],
    test_pixels: examples.Pixels,
) -> None:
    """Write the HTML page of a run; it loads no URL. `measured` says whether the embeddings of the set collapsed."""
    distilled = DistilledSet.load(set_path)
    logs = [_read_log(paths.phase(p) / "metrics.jsonl") for p in range(len(distilled.subsets))]
    method, name = method_of(run), TITLES.get(distilled.method, distilled.method)
    labels = _labels(name, distilled, evaluation)
    cost, found = page.with_name("cost.json"), page.with_name(EXAMPLES)
    facts = {
        "run": run,
        "method": method,
        "name": name,
        "distilled": distilled,
        "evaluation": evaluation,
        "headline": headline(distilled, evaluation),
        "tiles": _tiles(distilled, evaluation, seconds),
        "groups": _result_groups(name, distilled, evaluation),
        "probes": _probes(name, distilled, evaluation),
        "recalls": RECALLS,
        "order": in_words(distilled.order, distilled.between) if len(distilled.subsets) > 1 else "",
        "referee": referee.tables(evaluation, labels, RECALLS),
        "cost_rows": referee.cost_rows(evaluation, read_json(cost) if cost.is_file() else {}),
        "sizes": referee.split_sizes(evaluation),
        "gallery_warning": referee.gallery_warning(evaluation),
        "bars": _bars(name, distilled, evaluation),
        "gallery": _gallery(paths, distilled),
        "queries": examples.queries(read_json(found), labels, test_pixels) if found.is_file() else [],
        "first_pairs": max(2, FIRST // len(distilled.subsets)),
        "moved": [
            sum(a != b for a, b in zip(s.captions, s.captions_before, strict=bool(s.captions_before)))
            for s in distilled.subsets
        ],
        "plan": _plan(page.with_name(PLAN)) if run.distill.plan.plans else [],
        "last_starts": [p.stop - (run.distill.start_rule == "exclusive") for p in run.distill.phases],
        "similarity": _similarity(distilled.subsets),
        "matching": [_curves(method, lines) for lines in logs],
        "val_plots": _val_plots(run.evaluate.epochs, evaluation),
        "health": [Markup(drawing) for drawing in health.drawings(measured)],
        "warnings": measured["warnings"],
        "remarks": Dataset.open(paths.data).remarks(run.data) if (paths.data / MANIFEST).is_file() else [],
        "steps": seconds,
        "total_seconds": sum(seconds.values()),
        "speed": [_speed(lines) for lines in logs],
        "budget": distilled.budget(),
        "experts_bytes": stored_bytes(paths.store),
        "config_yaml": yaml.safe_dump(distilled.config, sort_keys=False, width=110, allow_unicode=True),
        "provenance": _flat(distilled.provenance | {"text encoder": distilled.model.get("text_encoder", "unknown")}),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "size": size, "number": number, "pm": plus_minus}
    source = (resources.files("rmdd.report") / "page.html.j2").read_text(encoding="utf-8")
    with atomic_path(page) as temporary:
        temporary.write_text(environment.from_string(source).render(facts), encoding="utf-8")


HIGH_CHANCE = 10
"""R@mean of random rankings, in percent, above which ratios of scores mean little, because the test split is tiny."""


def headline(distilled: DistilledSet, evaluation: dict[str, Any]) -> str:
    """Return one sentence with the main result of a run. It compares test scores after the last training pass."""
    table, name = evaluation["table"], TITLES.get(distilled.method, distilled.method)
    ours, random, full = (table[row]["test_last"]["R@mean"] for row in (distilled.method, "random", "full"))
    reach = f"train a student to {ours['mean']:.1f} R@mean on unseen test pairs"
    pairs = evaluation["baseline"]["pairs"]
    chance = evaluation.get("chance", {}).get("test", {}).get("R@mean", 0)
    difference = evaluation.get("certainty", {}).get("minus_random", {}).get(distilled.method, {}).get("R@mean")
    if ours["mean"] <= random["mean"]:
        against = f"not better than {pairs} random real pairs ({random['mean']:.1f})"
    elif ours["mean"] - _spread(ours) <= random["mean"] + _spread(random):
        against = f"better than {pairs} random real pairs ({random['mean']:.1f}), but the spreads overlap"
    elif difference and difference["low"] <= 0:
        interval = "but the 95 % interval of the difference includes 0"
        against = f"better than {pairs} random real pairs ({random['mean']:.1f}), {interval}"
    elif chance > HIGH_CHANCE:
        against = f"{ours['mean'] - random['mean']:.1f} points above {pairs} random real pairs ({random['mean']:.1f})"
    elif random["mean"] > 0:
        against = f"{ours['mean'] / random['mean']:.1f} times the {random['mean']:.1f} of {pairs} random real pairs"
    else:
        against = f"{pairs} random real pairs reach 0"
    total = card.train_pairs(distilled)
    all_pairs = f"all {total:,} training pairs" if total else "all training pairs"
    bound = ""
    if chance > HIGH_CHANCE:
        bound = f"; {all_pairs} reach {full['mean']:.1f}, and chance is {chance:.1f}"
    elif full["mean"] > 0:
        bound = f", and {100 * ours['mean'] / full['mean']:.0f} % of the score of {all_pairs} ({full['mean']:.1f})"
    memory = f", in the memory of {pairs}," if distilled.num_pairs > pairs else ""
    return f"{distilled.num_pairs} pairs distilled by {name}{memory} {reach}: {against}{bound}."


# -- formatted numbers and table rows -----------------------------------------------------------------------------


def duration(seconds: float | int) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: float | int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def number(value: float | int) -> str:
    return (f"{value:,}" if isinstance(value, int) else f"{value:.3g}").replace("-", "\N{MINUS SIGN}")


def plus_minus(score: dict[str, float]) -> str:
    """Return mean and spread of a score as text; the score of a single student has no spread."""
    return f"{score['mean']:.1f}" + ("" if _no_spread(score) else f" ± {score['std']:.1f}")


def _no_spread(score: dict[str, float]) -> bool:
    return score["std"] is None or math.isnan(score["std"])


def _spread(score: dict[str, float]) -> float:
    return 0.0 if _no_spread(score) else score["std"]


def _tiles(distilled: DistilledSet, evaluation: dict[str, Any], seconds: dict[str, float]) -> list[tuple[str, str]]:
    table = evaluation["table"]
    ours, full = (table[row]["test_last"]["R@mean"]["mean"] for row in (distilled.method, "full"))
    train_pairs, total = card.train_pairs(distilled), distilled.budget()["total"]
    share = f"{100 * distilled.num_pairs / train_pairs:.1f} %" if train_pairs else "unknown"
    return [
        (f"{ours:.1f}", "R@mean on test, after the last pass"),
        (f"{100 * ours / full:.0f} %" if full > 0 else "unknown", "of the score of all training pairs"),
        (share, "of the number of training pairs"),
        (size(total["bytes"]), "size of the distilled set on disk"),
        (duration(sum(seconds.values())), "time of the whole run"),
    ]


def _labels(name: str, distilled: DistilledSet, evaluation: dict[str, Any]) -> dict[str, str]:
    train_pairs = card.train_pairs(distilled)
    return {
        "random": f"random pairs ({evaluation['baseline']['pairs']})",
        distilled.method: f"{name} ({distilled.num_pairs})",
        "full": f"full data ({train_pairs:,})" if train_pairs else "full data",
    }


def _bars(name: str, distilled: DistilledSet, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one bar per row of the result table: R@mean on test and its spread, in percent of the longest bar."""
    scores = {row: evaluation["table"][row]["test_last"]["R@mean"] for row in ("random", distilled.method, "full")}
    kinds = {"random": "random", distilled.method: "ours", "full": "full"}
    labels = _labels(name, distilled, evaluation)
    share = 100 / max(1.0, *(score["mean"] + _spread(score) for score in scores.values()))
    bars = []
    for row, score in scores.items():
        low, high = max(0.0, score["mean"] - _spread(score)), score["mean"] + _spread(score)
        lengths = {"width": score["mean"] * share, "left": low * share, "spread": (high - low) * share}
        percent = {part: f"{max(0.0, length):.1f}" for part, length in lengths.items()}
        bars.append({"label": labels[row], "kind": kinds[row], "value": f"{score['mean']:.1f}", **percent})
    return bars


def _result_groups(name: str, distilled: DistilledSet, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the result table in groups, one for each split and scoring protocol."""
    labels, table = _labels(name, distilled, evaluation), evaluation["table"]
    by_paper = "The best pass, picked on the test set" if referee.picks_on_test(evaluation) else "The last pass"
    titles = {
        "test_last": "Test, read once after the last training pass (test_last)",
        "val": "Validation split, on which all choices were made (val)",
        "test_best_reference": f"{by_paper} by the paper's protocol (test_best_reference), "
        "only for comparison with its numbers",
    }
    return [
        {
            "title": title,
            "kind": kind,
            "rows": [
                {"label": label, "ours": row == distilled.method, "scores": table[row][kind]}
                for row, label in labels.items()
                if kind in table[row]
            ],
            "chance": evaluation.get("chance", {}).get({"val": "val", "test_last": "test"}.get(kind, "")),
        }
        for kind, title in titles.items()
        if any(kind in table[row] for row in labels)
    ]


def _probes(name: str, distilled: DistilledSet, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each probe (extra evaluation task), the students' scores, the description (`facts`) and baselines."""
    labels, table = _labels(name, distilled, evaluation), evaluation["table"]
    return [
        {
            "name": probe,
            "facts": facts,
            "metrics": list(table["random"]["probes"][probe]),
            "rows": [
                {"label": label, "ours": row == distilled.method, "scores": table[row]["probes"][probe]}
                for row, label in labels.items()
            ],
            "baselines": {
                label: values
                for label, values in (
                    ("chance", facts["chance"]),
                    ("most frequent train answer per question type", facts.get("majority", {}).get("all")),
                )
                if values
            },
        }
        for probe, facts in evaluation.get("probes", {}).items()
    ]


def _plan(path: Path) -> list[str]:
    """Return the reasons for the planned phases, and the decisions about phases that were made on val."""
    plan = read_json(path) if path.is_file() else {}
    return [*plan.get("reasons", []), *(decision["reason"] for decision in plan.get("decisions", []))]


# -- images of pairs ----------------------------------------------------------------------------------------------


def _shown(pairs: Sequence[int]) -> list[list[int]]:
    """Return, for each subset, the indices of the pairs to show: evenly spaced, about `GALLERY` in total."""
    share = min(1.0, GALLERY / sum(pairs))
    counts = [max(1, int(m * share)) for m in pairs]
    return [[i * m // n for i in range(n)] for m, n in zip(pairs, counts, strict=True)]


def _gallery(paths: RunPaths, distilled: DistilledSet) -> list[list[dict[str, Any]]]:
    """Return the pairs of each subset in the gallery: images (data URIs) and captions before and after distillation."""
    rows = _shown([s.pairs for s in distilled.subsets])
    _, _, height, width = distilled.subsets[0].images.shape
    exact = 2 * sum(map(len, rows)) * 3 * height * width <= EXACT_BYTES
    gallery = []
    for p, (subset, index) in enumerate(zip(distilled.subsets, rows, strict=True)):
        start = load_set(paths.start(p)).images[index]
        before, after = (_pictures(t, distilled, exact) for t in (start, subset.images[index]))
        gallery.append([
            {
                "index": i,
                "before": b,
                "after": a,
                "caption_before": subset.captions_before[i] if subset.captions_before else None,
                "caption": subset.captions[i],
                "source": subset.source_ids[i],
            }
            for i, b, a in zip(index, before, after, strict=True)
        ])  # fmt: skip
    return gallery


def _pictures(images: Tensor, distilled: DistilledSet, exact: bool) -> list[str]:
    pixels = denormalise(images, distilled.mean, distilled.std).numpy()
    return [data_uri(picture, None if exact else SIDE) for picture in pixels]


def _similarity(subsets: Sequence[Subset]) -> list[dict[str, Any]]:
    """Return per subset the heat map, value ranges and largest off-diagonal entries of the similarity matrix."""
    import torch

    maps: list[dict[str, Any]] = []
    for subset in subsets:
        matrix, m = subset.matrix, subset.pairs
        others = ~torch.eye(m, dtype=torch.bool)
        off = matrix[others] if m > 1 else torch.zeros(1)
        order = matrix.masked_fill(~others, -torch.inf).flatten().topk(min(STRONGEST, m * (m - 1))).indices.tolist()
        before = subset.captions_before or subset.captions
        maps.append({
            "kind": subset.kind,
            "matrix": matrix.numpy(),
            "scale": float(off.abs().quantile(0.995)) if len(off) <= 2**24 else float(off.abs().max()),
            "diagonal": (float(matrix.diag().min()), float(matrix.diag().max())),
            "off": (float(off.min()), float(off.max())),
            "links": [
                {"value": float(matrix[i, j]), "image": i, "text": j, "of": before[i], "with": subset.captions[j]}
                for i, j in (divmod(n, m) for n in order)
            ],
        })  # fmt: skip
    limit = max(entry["scale"] for entry in maps) or 1.0
    for entry in maps:
        entry["limit"] = limit
        entry["plot"] = Markup(plots.heat_map(entry.pop("matrix"), limit)) if entry["kind"] != "identity" else None
    return maps


# -- plots of the logs --------------------------------------------------------------------------------------------


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the metrics log at `path`, except a truncated last line; none if the file does not exist."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict) and "iteration" in line]


def _curves(method: BaseMethod, lines: list[dict[str, Any]]) -> list[Markup]:
    """Draw the plots that `method` defines. `lines` are the lines of the metrics log of one phase."""
    drawn, logged = [], {name: None for line in lines for name in line}
    for title, labels, level in method.curves(logged):
        shown = {key: label for key, label in labels.items() if any(key in line for line in lines)}
        rows = [line for line in lines if all(key in line for key in shown)]
        if shown and rows:
            series = {label: [row[key] for row in rows] for key, label in shown.items()}
            drawn.append(Markup(plots.curves(title, [r["iteration"] for r in rows], series, "iteration", level=level)))
    return drawn


def _val_plots(epochs: int, evaluation: dict[str, Any]) -> list[Markup]:
    table, drawn = evaluation["table"], []
    if curves := [c for c in evaluation["student_curves"] if c]:
        rows = {"random pairs": "random", "full data": "full"}
        levels = {label: table[row]["val"]["R@mean"]["mean"] for label, row in rows.items()}
        drawn.append(plots.students(curves, epochs, levels))
    if evaluation["selection"]["val"]:
        drawn.append(plots.snapshots(evaluation["selection"]["val"], evaluation["iterations"]))
    if evaluation["baseline"]["val"]:
        drawn.append(plots.tuning(evaluation["baseline"]["val"]))
    return [Markup(d) for d in drawn]


def _speed(lines: list[dict[str, Any]]) -> float | None:
    """Return the median seconds per iteration over the lines of a metrics log; None if no line contains this time."""
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return statistics.median(seconds) if seconds else None


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows
