"""Greedy selection, one item (image or caption record) after another: herding and k-center.

    herding    w_1 = mu;  pick argmax <w_t, x>;  w_{t+1} = w_t + mu - x_t          (Welling 2009, over all items)
    k-center   pick the item farthest from its nearest pick (Gonzalez 1985; radius at most twice the optimum)

Both yield picks until no item is left, so the first j of k picks are the coreset of size j. Both can resume after
earlier picks, with bit-identical results. mu is the mean of all rows. D features.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64

from rmdd.core.seeding import generator
from rmdd.coresets.shard import MAX_SHOWN, Best, Check, best_of
from rmdd.execution.parts import WorkerParts

Start = Literal["random", "mean"]


def checked(ranks: WorkerParts) -> Check:
    """Check the feature rows of all workers. Raises `ValueError` without rows, or if a row is zero or not finite."""
    checks: list[Check] = ranks.call("check")
    bad = sum(c.bad for c in checks)
    if bad:
        first = sorted(i for c in checks for i in c.first_bad)[:MAX_SHOWN]
        raise ValueError(
            f"{bad} of {sum(c.rows for c in checks)} features are zero or not finite (first ids: {first}); remove "
            "these items from the dataset, or use another encoder"
        )
    if not (rows := sum(c.rows for c in checks)):
        raise ValueError("there are no features to choose from; the split is empty")
    return Check(rows, max(c.largest for c in checks), 0, ())


def mean(ranks: WorkerParts, largest: float) -> Float64[np.ndarray, " D"]:
    """Return the mean of all rows that were not dropped; bit-identical for any order of rows and number of workers.

    `largest` is the largest absolute value of the rows.
    """
    count = sum(ranks.call("count"))
    size = math.ceil(math.log2(largest)) + 1
    bits = min(52 - size, 62 - size - math.ceil(math.log2(count + 1)))
    return np.ldexp(np.sum(ranks.call("total", bits), axis=0).astype(np.float64), -bits) / count


def rows_of(ranks: WorkerParts, ids: Sequence[int]) -> Float32[np.ndarray, "n D"]:
    """Return the feature rows with the given `ids`, in the order of `ids`. Raises `ValueError` for a missing row."""
    row_of: dict[int, np.ndarray] = {}
    for numbers, rows in ranks.call("rows_of", np.asarray(ids, dtype=np.int64)):
        row_of.update(zip(numbers.tolist(), rows, strict=True))
    if missing := [i for i in ids if i not in row_of]:
        raise ValueError(f"{len(missing)} ids have no feature row (first ids: {missing[:MAX_SHOWN]})")
    return np.stack([row_of[i] for i in ids])


def herding(
    ranks: WorkerParts, mu: Float64[np.ndarray, " D"], earlier: Sequence[int] = (), explicit: bool = False
) -> Iterator[Best]:
    """Yield herding picks until no item is left, continuing after the `earlier` picks.

    With `explicit`, a pick minimises the distance between `mu` and the mean of all picks; for rows of equal length, the
    picks are the same with and without `explicit`.
    """
    w, new = mu.copy(), list(earlier)
    for row in rows_of(ranks, new) if new else ():
        w += mu - row
    while (best := best_of(ranks.call("along", w, new, explicit))) is not None:
        yield best
        w += mu - best.row
        new = [best.id]


def k_center(ranks: WorkerParts, first: Best, earlier: Sequence[int] = ()) -> Iterator[Best]:
    """Yield k-center picks until no item is left, after the picks `earlier`, or from `first` on if `earlier` is empty.

    The value of a pick is its squared distance to the nearest earlier pick, the squared covering radius so far.
    """
    if not earlier:
        yield first
    new = list(earlier) or [first.id]
    centres = rows_of(ranks, new) if earlier else first.row[None]
    while (best := best_of(ranks.call("farthest", centres, new))) is not None:
        yield best
        centres, new = best.row[None], [best.id]


def start_of(ranks: WorkerParts, rule: Start, seed: int, mu: Float64[np.ndarray, " D"]) -> Best:
    """Return the first pick of k-center: a random item drawn with `seed`, or the item nearest to the mean `mu`."""
    if rule == "mean":
        best = best_of(ranks.call("nearest", mu))
        assert best is not None
    else:
        import torch

        ids = np.sort(np.concatenate(ranks.call("ids")))
        drawn = int(ids[int(torch.randint(len(ids), (), generator=generator(seed, "coreset start")))])
        best = Best(0.0, drawn, rows_of(ranks, [drawn])[0])
    return Best(math.inf, best.id, best.row)
