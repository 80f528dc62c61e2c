"""Bootstrap intervals over test images for the rows of a comparison, computed from the test ranks of students."""

from collections.abc import Sequence
from pathlib import Path

from rmdd.evaluate import bootstrap
from rmdd.evaluate.bootstrap import Interval
from rmdd.evaluate.retrieval import Ranks


def interval(ranks: Sequence[Path]) -> dict[str, float] | None:
    """Return the 95 % interval of the students' mean R@mean over test images; None if `ranks` is empty."""
    return _plain(bootstrap.interval(_loaded(ranks))) if ranks else None


def difference(ours: Sequence[Path], others: Sequence[Path]) -> dict[str, float] | None:
    """Return the 95 % interval of the R@mean of `ours` minus that of `others`; None if either is empty.

    Students are paired by number, and both are resampled with the same test images.
    """
    number = min(len(ours), len(others))
    if not number:
        return None
    return _plain(bootstrap.difference(_loaded(ours[:number]), _loaded(others[:number])))


def _plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _loaded(files: Sequence[Path]) -> list[Ranks]:
    return [Ranks.load(file) for file in files]
