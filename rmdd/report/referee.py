"""What stands beside the result table: certainty over images, the gap of peeking, scores against equal help, and cost.

Each is a table of words, or absent where an evaluation does not have it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Words = dict[str, Any]
"""title, heads, rows (a label and its cells) and note."""


def tables(evaluation: Mapping[str, Any], labels: Mapping[str, str], recalls: Sequence[str]) -> list[Words]:
    """All tables that `evaluation` has the numbers of; `labels` names the rows."""
    parts = (_certainty(evaluation, labels, recalls), _reference(evaluation), _scores(evaluation))
    return [table for table in parts if table]


def cost_rows(evaluation: Mapping[str, Any], cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the clock told, and what the set takes."""
    rows = []
    if each := cost.get("seconds_per_iteration"):
        rows.append(("s/iter", f"{each:.3g} s, the median of {cost['iterations_timed']:,} iterations of all subsets"))
    if cost:
        spent = f"{cost['distill_gpu_hours']:.3g} for distilling, {cost['gpu_hours']:.3g} for the whole run"
        rows.append(("GPU-hours", f"{spent} on {cost['gpus']:g} GPUs" if cost["gpus"] else "none; it ran on CPUs"))
    if size := evaluation.get("size"):
        rows.append(("bytes of the set", f"{size['set_bytes']:,} in float32 for {size['pairs']:,} pairs"))
    return rows


def lines(evaluation: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """The same in a few lines, R@mean alone."""
    rows = []
    for table in tables(evaluation, labels, ("R@mean",)):
        rows += [f"{label}: {', '.join(cells)}" for label, *cells in table["rows"]]
    return rows


def between(interval: Mapping[str, float], sign: str = "") -> str:
    return f"{interval['mean']:{sign}.1f} [{interval['low']:{sign}.1f}, {interval['high']:{sign}.1f}]"


def _certainty(evaluation: Mapping[str, Any], labels: Mapping[str, str], recalls: Sequence[str]) -> Words | None:
    if not (certainty := evaluation.get("certainty")):
        return None
    rows = [
        (f"{labels.get(row, row)}, test [95 %]", *(between(scores[r]) for r in recalls))
        for row, scores in certainty["test_last"].items()
    ]
    rows += [
        (f"{labels.get(row, row)} minus random pairs [95 %]", *(between(scores[r], "+") for r in recalls))
        for row, scores in certainty["minus_random"].items()
    ]
    note = f"Intervals over {certainty['over']}. Differences are paired: both sides see the same images."
    return {"title": "How certain this is", "heads": ("", *recalls), "rows": rows, "note": note}


def _reference(evaluation: Mapping[str, Any]) -> Words | None:
    if not (reference := evaluation.get("reference")):
        return None
    row = (
        f"test_best_reference by {reference['protocol']} ({reference['reported']} of {reference['scorings']}) "
        "minus test_last",
        f"{reference['minus_test_last']:+.1f}",
    )
    own = ("the same minus the last pass of the same students", f"{reference['minus_own_last']:+.1f}")
    note = "Points of R@mean: the papers' protocol over the honest one, and of that what picking on test alone gives."
    return {"title": "What picking on test adds", "heads": ("", "R@mean"), "rows": [row, own], "note": note}


def _scores(evaluation: Mapping[str, Any]) -> Words | None:
    if not (scores := evaluation.get("scores")):
        return None
    names = {
        "HLR": "HLR: full data minus the set, hard labels",
        "IOR": "IOR: the set minus random pairs by the same recipe",
        "augmented": f"the same, students augmented ({scores['augment']})",
        "plain": "the same, students not augmented",
    }
    rows = [(label, between(scores["points"][key], "+")) for key, label in names.items()]
    rows += [(f"{name}, 0 to 100", f"{scores[name]:.1f}") for name in ("LRS", "ARS")]
    note = (
        f"Points of R@mean on test, 95 % over images. Hard labels: InfoNCE, identity similarity, the experts' rates. "
        f"The similarity of random pairs by the same recipe: {scores['similarity']}; their rate was chosen on val."
    )
    return {"title": "What the recipe adds, and what the pairs", "heads": ("", "R@mean"), "rows": rows, "note": note}
