"""Bootstrap confidence intervals of recalls and of their differences, over the images of a gallery.

Images are drawn with replacement together with their captions. Captions of one image succeed or fail together, so
drawing captions one by one would give intervals that are too narrow. For a difference between two groups of students,
both groups are scored on the same draws of images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rmdd.core.seeding import generator
from rmdd.evaluate.retrieval import KS, Ranks

# Letters in shapes: I images, R bootstrap draws, S recalls

DRAWS = 2000
STRIDE = 100
"""Number of bootstrap draws processed at once."""
METRICS = (*(f"IR@{k}" for k in KS), *(f"TR@{k}" for k in KS), "R@mean")


@dataclass(frozen=True)
class Interval:
    """A retrieval metric and its confidence bounds in percent, or a difference of metrics in percentage points."""

    mean: float
    low: float
    high: float


def interval(
    ranks: Sequence[Ranks], metric: str = "R@mean", draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the bootstrap interval of the mean of `metric` (IR@K, TR@K or R@mean) over students.

    Raise `ValueError` if `metric` is unknown, or if `ranks` is empty or holds ranks of different galleries.
    """
    return intervals(ranks, (metric,), draws, seed, level)[metric]


def difference(
    a: Sequence[Ranks],
    b: Sequence[Ranks],
    metric: str = "R@mean",
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the bootstrap interval of the mean metric of students `a` minus that of `b`, both on the same draws."""
    return differences(a, b, (metric,), draws, seed, level)[metric]


def intervals(
    ranks: Sequence[Ranks],
    metrics: Sequence[str] = METRICS,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Return the bootstrap interval of each metric in `metrics`, as `interval` does for one metric."""
    _check(ranks, draws, level)
    return _bootstrapped([_hits(ranks, metric) for metric in metrics], metrics, _captions(ranks[0]), draws, seed, level)


def differences(
    a: Sequence[Ranks],
    b: Sequence[Ranks],
    metrics: Sequence[str] = METRICS,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Return the interval of `a` minus `b` for each metric in `metrics`, as `difference` does for one metric."""
    _check([*a, *b] if a and b else [], draws, level)
    hits = [{k: h - other[k] for k, h in _hits(a, m).items()} for m in metrics for other in (_hits(b, m),)]
    return _bootstrapped(hits, metrics, _captions(a[0]), draws, seed, level)


def _check(ranks: Sequence[Ranks], draws: int, level: float) -> None:
    if not ranks:
        raise ValueError("the list of ranks is empty; give the ranks of at least one student per group")
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 1 and level between 0 and 1; found {draws} and {level:g}")
    if not all(torch.equal(ranks[0].image_of, r.image_of) for r in ranks):
        raise ValueError("the ranks come from different galleries; score all students on the same split, in one order")


def _captions(ranks: Ranks) -> Float[Tensor, " I"]:
    return torch.bincount(ranks.image_of, minlength=len(ranks.text)).double()


def _hits(ranks: Sequence[Ranks], metric: str) -> dict[str, Float[Tensor, " I"]]:
    """Return for each direction (IR, TR) how many queries of each image are hits, averaged over students and all K."""
    kind, _, k = metric.partition("@")
    if metric != "R@mean" and (kind not in ("IR", "TR") or not k.isdigit() or int(k) < 1):
        raise ValueError(f"unknown metric '{metric}'; available: IR@K, TR@K and R@mean")
    ks = KS if metric == "R@mean" else (int(k),)
    by_side: dict[str, Tensor] = {}
    if kind != "TR":
        hits = _mean([r.image for r in ranks], ks)
        total = torch.zeros(len(ranks[0].text), dtype=torch.float64)
        by_side["IR"] = total.index_add_(0, ranks[0].image_of, hits)
    if kind != "IR":
        by_side["TR"] = _mean([r.text for r in ranks], ks)
    return by_side


def _mean(ranks: Sequence[Tensor], ks: Sequence[int]) -> Tensor:
    return torch.stack([(r < k).double() for r in ranks for k in ks]).mean(0)


def _bootstrapped(
    hits: Sequence[dict[str, Tensor]],
    metrics: Sequence[str],
    captions: Float[Tensor, " I"],
    draws: int,
    seed: int,
    level: float,
) -> dict[str, Interval]:
    """Return the bootstrap interval of each metric from the numbers of hits (`hits`) and captions of each image."""
    names = [(m, side) for m, by_side in enumerate(hits) for side in by_side]
    columns = torch.stack([captions, *(hits[m][side] for m, side in names)], dim=1)
    drawn_RS = torch.cat([counts @ columns for counts in _counts(len(captions), draws, seed)])
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    result = {}
    for m, metric in enumerate(metrics):
        column_of = {side: 1 + s for s, (of, side) in enumerate(names) if of == m}
        low, high = torch.quantile(_mean_of_sides(drawn_RS, column_of, len(captions)), tail).tolist()
        observed = _mean_of_sides(columns.sum(0, keepdim=True), column_of, len(captions))
        result[metric] = Interval(float(observed), low, high)
    return result


def _mean_of_sides(sums: Tensor, columns: dict[str, int], images: int) -> Tensor:
    """Return the recall of each bootstrap draw in percent, averaged over the directions IR and TR.

    Column 0 of `sums` holds the number of drawn captions; `columns` maps a direction to the column of its hits.
    """
    sides = [sums[:, c] / (sums[:, 0] if side == "IR" else images) for side, c in columns.items()]
    return 100 * torch.stack(sides).mean(0)


def _counts(images: int, draws: int, seed: int) -> Iterator[Float[Tensor, "r I"]]:
    """Yield how often each bootstrap draw contains each image; the draws depend only on `images` and `seed`."""
    for start in range(0, draws, STRIDE):
        rows = min(STRIDE, draws - start)
        index = torch.randint(images, (rows, images), generator=generator(seed, "bootstrap", start))
        ones = torch.ones(rows, images, dtype=torch.float64)
        yield torch.zeros(rows, images, dtype=torch.float64).scatter_add_(1, index, ones)
