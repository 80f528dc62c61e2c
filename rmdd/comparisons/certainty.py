"""How sure a row is: intervals over images, from the ranks that students leave."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def interval(ranks: Sequence[Path]) -> dict[str, float] | None:
    """95 % interval of R@mean over test images, of the mean student; None where ranks were not kept."""
    return _told("interval", ranks) if ranks else None


def difference(ours: Sequence[Path], others: Sequence[Path]) -> dict[str, float] | None:
    """The same of a paired difference: students by number, images resampled together."""
    number = min(len(ours), len(others))
    return _told("difference", ours[:number], others[:number]) if number else None


def _told(what: str, *sides: Sequence[Path]) -> dict[str, float] | None:
    try:
        bootstrap = importlib.import_module("rmdd.evaluate.bootstrap")
        load: Any = importlib.import_module("rmdd.evaluate.retrieval").Ranks.load
    except (ImportError, AttributeError):  # ranks come with the bootstrap
        return None
    found = getattr(bootstrap, what)(*([load(file) for file in side] for side in sides))
    return {"mean": found.mean, "low": found.low, "high": found.high}
