"""Intervals of a row over test images, from the ranks that its students leave."""

from collections.abc import Sequence
from pathlib import Path

from rmdd.evaluate import bootstrap
from rmdd.evaluate.bootstrap import Interval
from rmdd.evaluate.retrieval import Ranks


def interval(ranks: Sequence[Path]) -> dict[str, float] | None:
    """95 % interval of R@mean over test images, of the mean student; None where ranks were not kept."""
    return _plain(bootstrap.interval(_loaded(ranks))) if ranks else None


def difference(ours: Sequence[Path], others: Sequence[Path]) -> dict[str, float] | None:
    """The same of a paired difference: students by number, images resampled together."""
    number = min(len(ours), len(others))
    if not number:
        return None
    return _plain(bootstrap.difference(_loaded(ours[:number]), _loaded(others[:number])))


def _plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _loaded(files: Sequence[Path]) -> list[Ranks]:
    return [Ranks.load(file) for file in files]
