"""Herding and k-center: one item after another, each the best against all picked before.

    herding    w_1 = mu;  pick argmax <w_t, x>;  w_{t+1} = w_t + mu - x_t          (Welling 2009, over all items)
    k-center   pick the item farthest from its nearest pick (Gonzalez 1985; radius at most twice the optimum)

Both hand out picks without end, so the first j of k are the picks of j, and both go on after picks made before with
the bits of a run that was never stopped. D features.
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
    """Look at all rows. Raises `ValueError` that names rows that are zero or not finite, or when there are none."""
    checks: list[Check] = ranks.call("check")
    bad = sum(c.bad for c in checks)
    if bad:
        first = sorted(i for c in checks for i in c.first_bad)[:MAX_SHOWN]
        raise ValueError(
            f"{bad} of {sum(c.rows for c in checks)} features are zero or not finite (first ids: {first}); leave these "
            "items out, or use another encoder"
        )
    if not (rows := sum(c.rows for c in checks)):
        raise ValueError("there are no features to choose from")
    return Check(rows, max(c.largest for c in checks), 0, ())


def mean(ranks: WorkerParts, largest: float) -> Float64[np.ndarray, " D"]:
    """Of all kept rows, whose entries are at most `largest`: the same bits however they lie."""
    count = sum(ranks.call("count"))
    size = math.ceil(math.log2(largest)) + 1
    bits = min(52 - size, 62 - size - math.ceil(math.log2(count + 1)))
    return np.ldexp(np.sum(ranks.call("total", bits), axis=0).astype(np.float64), -bits) / count


def rows_of(ranks: WorkerParts, ids: Sequence[int]) -> Float32[np.ndarray, "n D"]:
    """The rows of `ids`, in their order. Raises `ValueError` when one is nowhere."""
    row_of: dict[int, np.ndarray] = {}
    for numbers, rows in ranks.call("rows_of", np.asarray(ids, dtype=np.int64)):
        row_of.update(zip(numbers.tolist(), rows, strict=True))
    if missing := [i for i in ids if i not in row_of]:
        raise ValueError(f"{len(missing)} ids have no features (first: {missing[:MAX_SHOWN]})")
    return np.stack([row_of[i] for i in ids])


def herding(
    ranks: WorkerParts, mu: Float64[np.ndarray, " D"], begun: Sequence[int] = (), explicit: bool = False
) -> Iterator[Best]:
    """The picks after those `begun` with, until no item is left.

    `explicit` minimises the distance of the mean of the picks to `mu`, which is the same for rows of equal length.
    """
    w, new = mu.copy(), list(begun)
    for row in rows_of(ranks, new) if new else ():
        w += mu - row
    while (best := best_of(ranks.call("along", w, new, explicit))) is not None:
        yield best
        w += mu - best.row
        new = [best.id]


def k_center(ranks: WorkerParts, first: Best, begun: Sequence[int] = ()) -> Iterator[Best]:
    """The picks after those `begun` with, until no item is left, `first` being the very first.

    The value of a pick is its squared distance to the picks before: the squared radius that these cover all with.
    """
    if not begun:
        yield first
    new = list(begun) or [first.id]
    centres = rows_of(ranks, new) if begun else first.row[None]
    while (best := best_of(ranks.call("farthest", centres, new))) is not None:
        yield best
        centres, new = best.row[None], [best.id]


def start_of(ranks: WorkerParts, rule: Start, seed: int, mu: Float64[np.ndarray, " D"]) -> Best:
    """The first centre: a seeded random item, or the one nearest the mean."""
    if rule == "mean":
        best = best_of(ranks.call("nearest", mu))
        assert best is not None
    else:
        import torch

        ids = np.sort(np.concatenate(ranks.call("ids")))
        drawn = int(ids[int(torch.randint(len(ids), (), generator=generator(seed, "coreset start")))])
        best = Best(0.0, drawn, rows_of(ranks, [drawn])[0])
    return Best(math.inf, best.id, best.row)
