"""The rows of the result table of a run: `rmdd run` prints them, and `Result.table` returns them."""

from collections.abc import Mapping
from typing import Any

from rmdd.config.recipes import TITLES

METRICS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")
COLUMNS = ("val R@mean", "test R@mean", *METRICS)
NAMES = {"random": "random pairs", "full": "full data", **TITLES}
PROTOCOLS = ("test_last", "test_best_reference")


def score_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row of scores for each kind of training pairs, and each protocol by which its students were scored.

    A row has `trained on`, `protocol` (test_last or test_best_reference), and for each of `COLUMNS` the mean and, under
    `<column> spread`, the spread. A spread is None or NaN if there is only one student.
    """
    return [
        {"trained on": NAMES.get(name, name), "protocol": protocol, **_scores(scores, protocol)}
        for protocol in PROTOCOLS
        for name, scores in evaluation["table"].items()
        if protocol in scores
    ]


def _scores(scores: Mapping[str, Any], protocol: str) -> dict[str, float | None]:
    """Return the mean and the spread of each column; val is left out by a protocol that scores on test only."""
    cells = {"val R@mean": scores["val"]["R@mean"]} if protocol == "test_last" else {}
    cells |= {"test R@mean": scores[protocol]["R@mean"], **{metric: scores[protocol][metric] for metric in METRICS}}
    return {
        key: value
        for name, cell in cells.items()
        for key, value in ((name, cell["mean"]), (f"{name} spread", cell["std"]))
    }
