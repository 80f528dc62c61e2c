"""The rows of one rank, and all that is asked of them while a coreset is chosen.

Every number of a row is computed from that row alone (`numpy.vecdot`: one dot product a row), so neither chunks nor
ranks nor the order of rows change a bit of it; only which of two centroids at equal distance a row goes to, up to
rounding, may (a matrix product). N rows of this rank, D features, K centroids, C centres.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rmdd.coresets.rows import Rows
from rmdd.execution.parts import LocalParts

Ids = Sequence[int] | np.ndarray
MAX_SHOWN = 5
"""Ids that an error names."""


class Best(NamedTuple):
    """A row that no other surpasses."""

    value: float
    id: int
    row: Float32[np.ndarray, " D"]


@dataclass(frozen=True)
class Check:
    """What the rows of one rank are like."""

    rows: int
    largest: float
    """Absolute value."""
    bad: int
    first_bad: tuple[int, ...]


class Shard:
    """One rank's rows. Rows that were dropped count for nothing, rows that were taken cannot be chosen again."""

    def __init__(self, rows: Rows, chunk: int | None = None):
        self.rows, self.chunk = rows, chunk
        self.included = np.ones(len(rows), bool)
        self.free = np.ones(len(rows), bool)
        self._near: np.ndarray | None = None
        self._squares: np.ndarray | None = None
        self._cells: np.ndarray | None = None
        self._order = np.argsort(rows.ids, kind="stable")
        self._sorted = rows.ids[self._order]

    # -- about the rows ------------------------------------------------------------------------------------------

    def check(self) -> Check:
        """Look for rows that are not finite or zero."""
        largest, bad = 0.0, []
        for where, x in self.rows.chunks(self.chunk):
            high = np.abs(x).max(axis=1, initial=0.0)
            wrong = ~np.isfinite(high) | (high == 0)
            bad += self.rows.ids[where][wrong].tolist()
            largest = max(largest, float(high[~wrong].max(initial=0.0)))
        return Check(len(self.rows), largest, len(bad), tuple(sorted(bad)[:MAX_SHOWN]))

    def count(self) -> int:
        """Rows that were not dropped."""
        return int(self.included.sum())

    def total(self, bits: int) -> Int64[np.ndarray, " D"]:
        """The sum of all rows in units of 2^-bits: whole numbers, which add up the same in any order."""
        total = np.zeros(self.rows.width, np.int64)
        for where, x in self.rows.chunks(self.chunk):
            total += np.rint(np.ldexp(x[self.included[where]].astype(np.float64), bits)).astype(np.int64).sum(axis=0)
        return total

    def ids(self) -> Int64[np.ndarray, " n"]:
        """Of rows that were not dropped, ascending."""
        return np.sort(self.rows.ids[self.included])

    def drop(self, ids: Ids) -> None:
        """Leave out the rows of `ids` that are here."""
        positions = self._positions(ids)
        self.included[positions] = self.free[positions] = False

    def take(self, ids: Ids) -> None:
        self.free[self._positions(ids)] = False

    def release(self) -> None:
        """Begin anew: no row is taken, and there is no centre."""
        self.free, self._near = self.included.copy(), None

    def rows_of(self, ids: Ids) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n D"]]:
        """Those of `ids` that are here, and their rows."""
        positions = self._positions(ids)
        return self.rows.ids[positions], self.rows.at(positions)

    def _positions(self, ids: Ids) -> np.ndarray:
        wanted = np.asarray(ids, dtype=np.int64)
        if not len(self._sorted):
            return np.zeros(0, np.int64)
        indices = np.searchsorted(self._sorted, wanted)
        here = (indices < len(self._sorted)) & (self._sorted[np.minimum(indices, len(self._sorted) - 1)] == wanted)
        return self._order[indices[here]]

    # -- choosing ------------------------------------------------------------------------------------------------

    def along(self, w: Float64[np.ndarray, " D"], chosen: Ids, explicit: bool = False) -> Best | None:
        """The free row with the largest <w, x>, or <w, x> - |x|^2 / 2, once `chosen` are not free any more."""
        self.take(chosen)
        direction = w.astype(np.float32)
        squares = self.squares() if explicit else None
        search = _Search(self)
        for where, x in self.rows.chunks(self.chunk):
            value = np.vecdot(x, direction)
            search.offer(where, x, value if squares is None else value - squares[where] / 2)
        return search.best

    def nearest(self, point: Float64[np.ndarray, " D"], chosen: Ids = ()) -> Best | None:
        """The free row nearest to `point`; its value is minus the squared distance."""
        self.take(chosen)
        search = _Search(self)
        for where, x in self.rows.chunks(self.chunk):
            search.offer(where, x, -self._distances(where, x, point.astype(np.float32)))
        return search.best

    def farthest(self, centres: Float32[np.ndarray, "C D"], chosen: Ids) -> Best | None:
        """The free row farthest from all centres so far; its value is the squared distance to the nearest."""
        self.take(chosen)
        if self._near is None:
            self._near = np.full(len(self.rows), np.inf, np.float32)
        search = _Search(self)
        for where, x in self.rows.chunks(self.chunk):
            for centre in centres:
                np.minimum(self._near[where], self._distances(where, x, centre), out=self._near[where])
            search.offer(where, x, self._near[where])
        return search.best

    def squares(self) -> Float32[np.ndarray, " N"]:
        """|x|^2 of every row."""
        if self._squares is None:
            self._squares = np.empty(len(self.rows), np.float32)
            for where, x in self.rows.chunks(self.chunk):
                self._squares[where] = np.vecdot(x, x)
        return self._squares

    def _distances(self, where: slice, x: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """|x|^2 + |c|^2 - 2 <x, c>, which is exactly 0 for a copy of the centre."""
        return np.maximum(self.squares()[where] + np.vecdot(centre, centre) - 2 * np.vecdot(x, centre), 0)

    # -- clusters ------------------------------------------------------------------------------------------------

    def assigned(
        self, centroids: Float32[np.ndarray, "K C"], first: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of kept rows, the nearest centroid of each, by columns from `first`, and the squared distance to it."""
        label = np.empty(len(self.rows), np.int32)
        distance = np.empty(len(self.rows), np.float32)
        half = np.vecdot(centroids, centroids) / 2
        for where, x in self.rows.chunks(min(self.chunk or self.rows.chunk, max(1, 2**23 // len(centroids)))):
            x = x[:, first : first + centroids.shape[1]]
            label[where] = (half - x @ centroids.T).argmin(axis=1)
            gap = x - centroids[label[where]]
            distance[where] = np.vecdot(gap, gap)
        return self.rows.ids[self.included], label[self.included], distance[self.included]

    def medoids(self, centroids: Float32[np.ndarray, "K D"]) -> dict[int, tuple[float, int]]:
        """Per cluster that has members here, the squared distance and the id of the member nearest the centroid."""
        return _first_of(*self.assigned(centroids))

    # -- two sides -----------------------------------------------------------------------------------------------

    def overlap(self, images: Float32[np.ndarray, "K U"], texts: Float32[np.ndarray, "K V"]) -> np.ndarray:
        """(K, K): kept rows by the nearest image and text centroid; the columns of images come first."""
        self._cells = np.stack([self.assigned(images)[1], self.assigned(texts, images.shape[1])[1]])
        counts = np.zeros((len(images), len(images)), np.int64)
        np.add.at(counts, tuple(self._cells), 1)
        return counts

    def sums(self, partner: Int64[np.ndarray, " K"], bits: int) -> np.ndarray:
        """(K, D): of the rows in image cluster c and text cluster `partner[c]`, as whole numbers; see `total`."""
        total = np.zeros((len(partner), self.rows.width), np.int64)
        inside = self._inside(partner)
        for where, x in self.rows.chunks(self.chunk):
            chosen = inside[where] >= 0
            numbers = np.rint(np.ldexp(x[chosen].astype(np.float64), bits)).astype(np.int64)
            np.add.at(total, inside[where][chosen], numbers)
        return total

    def inner(
        self, partner: Int64[np.ndarray, " K"], points: Float32[np.ndarray, "K D"]
    ) -> dict[int, tuple[float, int]]:
        """Per c, of the same rows the squared distance and the id of the one nearest `points[c]`."""
        inside = self._inside(partner)
        distance = np.zeros(len(self.rows), np.float32)
        for where, x in self.rows.chunks(self.chunk):
            gap = x - points[inside[where]]
            distance[where] = np.vecdot(gap, gap)
        chosen = inside >= 0
        return _first_of(self.rows.ids[chosen], inside[chosen], distance[chosen])

    def _inside(self, partner: np.ndarray) -> Int64[np.ndarray, " N"]:
        """The image cluster of rows whose text cluster is its partner, else -1."""
        assert self._cells is not None
        image, text = self._cells
        cluster = np.full(len(self.rows), -1, np.int64)
        cluster[self.included] = np.where(partner[image] == text, image, -1)
        return cluster


def _first_of(ids: np.ndarray, label: np.ndarray, distance: np.ndarray) -> dict[int, tuple[float, int]]:
    """Per label the smallest distance, and its id."""
    order = np.lexsort((ids, distance, label))
    labels, first = np.unique(label[order], return_index=True)
    return {int(c): (float(distance[order[i]]), int(ids[order[i]])) for c, i in zip(labels, first, strict=True)}


class _Search:
    """The best free row so far: the largest value, and of equal ones the smallest id."""

    def __init__(self, shard: Shard):
        self.shard = shard
        self.best: Best | None = None

    def offer(self, where: slice, x: np.ndarray, value: np.ndarray) -> None:
        free = np.flatnonzero(self.shard.free[where])
        if not len(free):
            return
        ids, values = self.shard.rows.ids[where][free], value[free]
        equal = np.flatnonzero(values == values.max())
        position = equal[ids[equal].argmin()]
        one = Best(float(values[position]), int(ids[position]), x[free[position]].copy())
        self.best = best_of([self.best, one])


def best_of(candidates: Iterable[Best | None]) -> Best | None:
    """The lexicographic maximum of (value, -id); None when there is none."""
    return max((b for b in candidates if b is not None), key=lambda b: (b.value, -b.id), default=None)


def here(rows: Rows, ranks: int = 1, chunk: int | None = None) -> LocalParts:
    """Rows cut over so many ranks of this process."""
    return LocalParts([Shard(rows.share(rank, ranks), chunk) for rank in range(ranks)])
