"""The feature rows of one worker, and the operations on rows that selection methods use.

The result for a row is computed from that row alone (`numpy.vecdot` computes one dot product per row), so results are
bit-identical for any chunk size, number of workers and order of rows. One exception: the assignment of rows to clusters
uses a matrix product, whose rounding can decide between two centroids at nearly equal distance. N rows of this worker,
D features, K centroids, C centres.
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
"""Largest number of ids to list in an error message."""


class Best(NamedTuple):
    """Result of a search for the row with the largest value: the value, the id of the row, and its features."""

    value: float
    id: int
    row: Float32[np.ndarray, " D"]


@dataclass(frozen=True)
class Check:
    """Result of checking that the rows of one worker are finite and not zero."""

    rows: int
    """Number of rows checked."""
    largest: float
    """Largest absolute value in the rows that are finite and not zero."""
    bad: int
    """Number of rows that are zero or not finite."""
    first_bad: tuple[int, ...]
    """Ids of the first few rows that are zero or not finite."""


class Shard:
    """The feature rows of one worker. Dropped rows are ignored everywhere; taken rows cannot be chosen again."""

    def __init__(self, rows: Rows, chunk: int | None = None):
        self.rows, self.chunk = rows, chunk
        self.included = np.ones(len(rows), bool)
        self.free = np.ones(len(rows), bool)
        self._near: np.ndarray | None = None
        self._squares: np.ndarray | None = None
        self._cells: np.ndarray | None = None
        self._order = np.argsort(rows.ids, kind="stable")
        self._sorted = rows.ids[self._order]

    # -- checking, dropping and taking rows ----------------------------------------------------------------------

    def check(self) -> Check:
        """Count the rows that are zero or not finite, and find the largest absolute value of the others."""
        largest, bad = 0.0, []
        for where, x in self.rows.chunks(self.chunk):
            high = np.abs(x).max(axis=1, initial=0.0)
            wrong = ~np.isfinite(high) | (high == 0)
            bad += self.rows.ids[where][wrong].tolist()
            largest = max(largest, float(high[~wrong].max(initial=0.0)))
        return Check(len(self.rows), largest, len(bad), tuple(sorted(bad)[:MAX_SHOWN]))

    def count(self) -> int:
        """Return the number of rows that were not dropped."""
        return int(self.included.sum())

    def total(self, bits: int) -> Int64[np.ndarray, " D"]:
        """Return the sum of all rows that were not dropped, as integers in units of 2^-`bits`.

        A sum of integers is the same in any order.
        """
        total = np.zeros(self.rows.width, np.int64)
        for where, x in self.rows.chunks(self.chunk):
            total += np.rint(np.ldexp(x[self.included[where]].astype(np.float64), bits)).astype(np.int64).sum(axis=0)
        return total

    def ids(self) -> Int64[np.ndarray, " n"]:
        """Return the ids of the rows that were not dropped, in ascending order."""
        return np.sort(self.rows.ids[self.included])

    def drop(self, ids: Ids) -> None:
        """Drop the rows of this worker whose id is in `ids`; later operations ignore them."""
        positions = self._positions(ids)
        self.included[positions] = self.free[positions] = False

    def take(self, ids: Ids) -> None:
        """Mark the rows of this worker whose id is in `ids` as taken."""
        self.free[self._positions(ids)] = False

    def release(self) -> None:
        """Forget all earlier picks: no row is taken any more, and k-center has no centres."""
        self.free, self._near = self.included.copy(), None

    def rows_of(self, ids: Ids) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n D"]]:
        """Return those of the `ids` whose rows belong to this worker, and these rows."""
        positions = self._positions(ids)
        return self.rows.ids[positions], self.rows.at(positions)

    def _positions(self, ids: Ids) -> np.ndarray:
        numbers = np.asarray(ids, dtype=np.int64)
        if not len(self._sorted):
            return np.zeros(0, np.int64)
        indices = np.searchsorted(self._sorted, numbers)
        match = (indices < len(self._sorted)) & (self._sorted[np.minimum(indices, len(self._sorted) - 1)] == numbers)
        return self._order[indices[match]]

    # -- searching the next pick ---------------------------------------------------------------------------------

    def along(self, w: Float64[np.ndarray, " D"], chosen: Ids, explicit: bool = False) -> Best | None:
        """Mark `chosen` as taken; return the untaken row x with the largest <w, x> (`explicit`: <w, x> - |x|^2 / 2)."""
        self.take(chosen)
        direction = w.astype(np.float32)
        squares = self.squares() if explicit else None
        search = _Search(self)
        for where, x in self.rows.chunks(self.chunk):
            value = np.vecdot(x, direction)
            search.offer(where, x, value if squares is None else value - squares[where] / 2)
        return search.best

    def nearest(self, point: Float64[np.ndarray, " D"], chosen: Ids = ()) -> Best | None:
        """Mark `chosen` as taken; return the untaken row x nearest to `point`; its value is -|x - point|^2."""
        self.take(chosen)
        search = _Search(self)
        for where, x in self.rows.chunks(self.chunk):
            search.offer(where, x, -self._distances(where, x, point.astype(np.float32)))
        return search.best

    def farthest(self, centres: Float32[np.ndarray, "C D"], chosen: Ids) -> Best | None:
        """Mark `chosen` as taken, add `centres`, and return the untaken row that is farthest from its nearest centre.

        The value of that row is its squared distance to the nearest centre.
        """
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
        """Return the squared length |x|^2 of every row x."""
        if self._squares is None:
            self._squares = np.empty(len(self.rows), np.float32)
            for where, x in self.rows.chunks(self.chunk):
                self._squares[where] = np.vecdot(x, x)
        return self._squares

    def _distances(self, where: slice, x: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Return |x|^2 + |c|^2 - 2 <x, c> for each row x, which is exactly 0 for a row equal to the centre c."""
        return np.maximum(self.squares()[where] + np.vecdot(centre, centre) - 2 * np.vecdot(x, centre), 0)

    # -- k-means clusters ----------------------------------------------------------------------------------------

    def assigned(
        self, centroids: Float32[np.ndarray, "K C"], first: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Assign the rows that were not dropped to centroids; return ids, nearest centroids and squared distances.

        Distances use as many columns of a row as a centroid has, from column `first` on.
        """
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
        """Return for each cluster this worker's row nearest to the centroid, as its squared distance and its id."""
        return _first_of(*self.assigned(centroids))

    # -- clusters of images and of texts -------------------------------------------------------------------------

    def overlap(self, images: Float32[np.ndarray, "K U"], texts: Float32[np.ndarray, "K V"]) -> np.ndarray:
        """Return a matrix (K, K); entry (i, j) is the number of rows in both image cluster i and text cluster j.

        The columns of the image embedding come first in a row. Dropped rows are not counted.
        """
        self._cells = np.stack([self.assigned(images)[1], self.assigned(texts, images.shape[1])[1]])
        counts = np.zeros((len(images), len(images)), np.int64)
        np.add.at(counts, tuple(self._cells), 1)
        return counts

    def sums(self, partner: Int64[np.ndarray, " K"], bits: int) -> np.ndarray:
        """Return for each c the sum of the rows in image cluster c and text cluster `partner[c]`, times 2^`bits`."""
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
        """Return for each image cluster c the squared distance and the id of the row nearest to `points[c]`.

        Only rows in image cluster c and text cluster `partner[c]` are considered.
        """
        inside = self._inside(partner)
        distance = np.zeros(len(self.rows), np.float32)
        for where, x in self.rows.chunks(self.chunk):
            gap = x - points[inside[where]]
            distance[where] = np.vecdot(gap, gap)
        chosen = inside >= 0
        return _first_of(self.rows.ids[chosen], inside[chosen], distance[chosen])

    def _inside(self, partner: np.ndarray) -> Int64[np.ndarray, " N"]:
        """Return for each row its image cluster c if its text cluster is `partner[c]`, otherwise -1."""
        assert self._cells is not None
        image, text = self._cells
        cluster = np.full(len(self.rows), -1, np.int64)
        cluster[self.included] = np.where(partner[image] == text, image, -1)
        return cluster


def _first_of(ids: np.ndarray, label: np.ndarray, distance: np.ndarray) -> dict[int, tuple[float, int]]:
    """Return for each cluster (`label`) the smallest distance of any of its rows, and the id of that row."""
    order = np.lexsort((ids, distance, label))
    labels, first = np.unique(label[order], return_index=True)
    return {int(c): (float(distance[order[i]]), int(ids[order[i]])) for c, i in zip(labels, first, strict=True)}


class _Search:
    """A search for the row with the largest value among the rows not taken; of equal values, the smallest id wins."""

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
        candidate = Best(float(values[position]), int(ids[position]), x[free[position]].copy())
        self.best = best_of([self.best, candidate])


def best_of(candidates: Iterable[Best | None]) -> Best | None:
    """Return the candidate with the largest value (of equal ones, with the smallest id); None without candidates."""
    return max((b for b in candidates if b is not None), key=lambda b: (b.value, -b.id), default=None)


def split_rows(rows: Rows, ranks: int = 1, chunk: int | None = None) -> LocalParts:
    """Divide rows into `ranks` consecutive shares, one for each worker; all workers are in this process."""
    return LocalParts([Shard(rows.share(rank, ranks), chunk) for rank in range(ranks)])
