"""Tables of the report after the result table: bootstrap intervals, the gain from picking the best pass on test,
LRS/ARS scores, and cost; a warning about small galleries.

A table is left out if the evaluation has no numbers for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

SMALL_GALLERY = 100
"""Number of images below which chance is above 10 % at IR@10."""
TextTable = dict[str, Any]
"""A table whose cells are text: `title`, column `heads`, `rows` (lists of a label and cells) and `note`."""


def tables(evaluation: Mapping[str, Any], labels: Mapping[str, str], recalls: Sequence[str]) -> list[TextTable]:
    """Return all tables whose numbers are in `evaluation`; `labels` maps keys of rows to displayed names."""
    parts = (_certainty(evaluation, labels, recalls), _reference(evaluation), _scores(evaluation))
    return [table for table in parts if table]


def cost_rows(evaluation: Mapping[str, Any], cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the cost table: seconds per iteration, GPU-hours and bytes of the set."""
    rows = []
    if median := cost.get("seconds_per_iteration"):
        rows.append(("s/iter", f"{median:.3g} s, the median of {cost['iterations_timed']:,} iterations of all subsets"))
    if cost:
        hours = f"{cost['distill_gpu_hours']:.3g} for distillation, {cost['gpu_hours']:.3g} for the whole run"
        rows.append(("GPU-hours", f"{hours} on {cost['gpus']:g} GPUs" if cost["gpus"] else "none; the run used CPUs"))
    if size := evaluation.get("size"):
        rows.append(("bytes of the set", f"{size['set_bytes']:,} in float32 for {size['pairs']:,} pairs"))
    return rows


def lines(evaluation: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """Return the rows of all tables as lines of text; of the recall scores, they include only R@mean."""
    rows = []
    for table in tables(evaluation, labels, ("R@mean",)):
        rows += [f"{label}: {', '.join(cells)}" for label, *cells in table["rows"]]
    return rows


def split_sizes(evaluation: Mapping[str, Any]) -> str:
    """Return the sizes of the splits as text; empty if the evaluation lacks them."""
    sizes = evaluation.get("galleries", {}).items()
    return ", ".join(f"{split} {n['pairs']:,} images ({n['captions']:,} captions)" for split, n in sizes)


def gallery_warning(evaluation: Mapping[str, Any]) -> str:
    """Return a warning if val or test has few images, so that recalls at 5 and 10 say little; otherwise empty text."""
    galleries, expected = evaluation.get("galleries", {}), evaluation.get("chance", {})
    small = {split: galleries[split]["pairs"] for split in expected if galleries[split]["pairs"] < SMALL_GALLERY}
    if not small:
        return ""
    smallest = expected[min(small, key=lambda split: small[split])]
    sizes = " and ".join(f"{split} has only {n} images" for split, n in small.items())
    return (
        f"{sizes}: recalls at 5 and 10 say little, "
        f"because chance reaches IR@5 {smallest['IR@5']:.1f} and IR@10 {smallest['IR@10']:.1f}"
    )


def between(interval: Mapping[str, float], sign: str = "") -> str:
    return f"{interval['mean']:{sign}.1f} [{interval['low']:{sign}.1f}, {interval['high']:{sign}.1f}]"


def _certainty(evaluation: Mapping[str, Any], labels: Mapping[str, str], recalls: Sequence[str]) -> TextTable | None:
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
    note = f"{certainty['over']}. Differences are paired: both scores use the same images."
    return {"title": "Uncertainty", "heads": ("", *recalls), "rows": rows, "note": note}


def picks_on_test(evaluation: Mapping[str, Any]) -> bool:
    """Return whether the reference protocol reports the best of several passes on test, and not the last pass."""
    return bool(evaluation.get("reference", {}).get("reported", "best") == "best")


def _reference(evaluation: Mapping[str, Any]) -> TextTable | None:
    if not (reference := evaluation.get("reference")):
        return None
    rows = [
        (
            f"test_best_reference by {reference['protocol']} ({reference['reported']} of {reference['scorings']}) "
            "minus test_last",
            f"{reference['minus_test_last']:+.1f}",
        )
    ]
    title, note = "Difference of the paper's protocol", "Points of R@mean. The protocol reports the last pass."
    if picks_on_test(evaluation):
        same_students = "test_best_reference minus the last pass of the same students"
        rows.append((same_students, f"{reference['minus_own_last']:+.1f}"))
        title = "Gain from picking on test"
        note = (
            "Points of R@mean. First row: gain of the papers' protocol over test_last. Second row: the part of the "
            "gain that comes from picking the pass on test."
        )
    return {"title": title, "heads": ("", "R@mean"), "rows": rows, "note": note}


def _scores(evaluation: Mapping[str, Any]) -> TextTable | None:
    if not (scores := evaluation.get("scores")):
        return None
    names = {
        "HLR": "HLR: full data minus the set, hard labels",
        "IOR": "IOR: the set minus random pairs with the same recipe",
        "augmented": f"IOR with augmentation ({scores['augment']})",
        "plain": "IOR without augmentation",
    }
    rows = [(label, between(scores["points"][key], "+")) for key, label in names.items()]
    rows += [(f"{name}, 0 to 100", f"{scores[name]:.1f}") for name in ("LRS", "ARS")]
    note = (
        "Points of R@mean on test, with 95 % intervals over images. Hard labels: InfoNCE, identity similarity, the "
        f"experts' learning rates. Random pairs with the same recipe: similarity {scores['similarity']}, learning rate "
        "chosen on val."
    )
    return {
        "title": "Contribution of the recipe and of the pairs",
        "heads": ("", "R@mean"),
        "rows": rows,
        "note": note,
    }
