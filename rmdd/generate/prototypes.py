"""Matched prototypes. A prototype is the mean of the records in both an image cluster and the matched text cluster.

A record is a caption with its image; record n has image `image_of[n]` and caption n. Shapes: T records, N after
pruning, M prototypes, K clusters of images or captions, D features (U of an image and V of a caption if they differ).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64

from rmdd.core.seeding import derive
from rmdd.coresets.clusters import fit, sampled, worst
from rmdd.coresets.matched import match
from rmdd.coresets.rows import Rows
from rmdd.coresets.shard import Shard, split_rows
from rmdd.coresets.spaces import Sides
from rmdd.execution.parts import OpenParts, WorkerParts

MINI_BATCH = 10_000
CHUNK = 8192
RANKS_FROM = 256 * 2**20
"""Image or caption features of at least this size in bytes are distributed over several workers (ranks)."""

Pairless = Literal["topup", "keep_centres", "drop"]
RecordIds = Int64[np.ndarray, " _"]


@dataclass(frozen=True)
class PairMembers:
    """The records of one prototype (its cell). `images` equals `texts`, unless the matched clusters share no record."""

    images: RecordIds
    texts: RecordIds

    @property
    def shared(self) -> bool:
        return self.images is self.texts


@dataclass(frozen=True)
class Prototypes:
    """M prototypes (mean features of images and of texts, before normalisation), and the records of each prototype."""

    images: Float32[np.ndarray, "M U"]
    texts: Float32[np.ndarray, "M V"]
    cells: tuple[PairMembers, ...]
    facts: dict[str, Any]


def find(
    sides: Sides,
    pairs: int,
    seed: int,
    ranks: OpenParts,
    *,
    rm_ratio: float = 0.2,
    starts: int = 20,
    normalize: bool = False,
    pairless: Pairless = "topup",
    rescale: bool = False,
) -> tuple[Prototypes, RecordIds]:
    """Prune the records, and return the prototypes and the remaining records.

    The prototypes are sorted by the cosine of their image and text features, the largest first.

    Raises `ValueError` if fewer than `pairs` records remain.
    """
    image_of = sides.split.image_of.astype(np.int64)
    records = np.arange(len(image_of))
    if rm_ratio:
        records = np.setdiff1d(records, worst(records, raw_cosines(sides), rm_ratio))
    if len(records) < pairs:
        raise ValueError(
            f"{pairs} pairs need at least as many caption records, but rm_ratio {rm_ratio} leaves {len(records)} of "
            f"{len(image_of)}; lower rm_ratio or distill.phases.*.pairs, or ingest more data"
        )
    of = {"image": image_of[records], "text": records}
    both = (("image", sides.images), ("text", sides.texts))
    label = {
        side: partition(rows, of[side], pairs, derive(seed, f"{side} prototypes"), ranks, starts, normalize)
        for side, rows in both
    }
    overlap = contingency(label["image"], label["text"], pairs)
    partner = match(overlap)
    common = overlap[np.arange(pairs), partner]

    def joint(members: RecordIds) -> Float32[np.ndarray, "n W"]:
        return np.concatenate([_unit(rows.at(of[side][members])) for side, rows in both], axis=1)

    cells = shared_cells(label["image"], label["text"], partner)
    if pairless == "keep_centres":
        cells += _centres(label["image"], label["text"], partner, np.flatnonzero(common == 0))
    if pairless != "drop" and len(cells) < pairs:
        cells = split_largest_cells(cells, pairs, label["image"], label["text"], joint, seed)
    images = np.stack([_mean(sides.images, of["image"][c.images], rescale) for c in cells])
    texts = np.stack([_mean(sides.texts, of["text"][c.texts], rescale) for c in cells])
    if images.shape[1] == texts.shape[1]:
        agreement = np.vecdot(_unit(images), _unit(texts))
    else:  # features of different widths have no cosine, so sort by the number of records
        agreement = np.array([len(c.images) if c.shared else 0 for c in cells], np.float32)
    order = np.argsort(-agreement, kind="stable")
    facts = {
        "records": len(image_of),
        "kept": len(records),
        "overlap": float(common.sum() / overlap.sum()),
        "pairless": int((common == 0).sum()),
        "pairs": len(cells),
        "largest_cell": max(len(c.images) for c in cells),
        "centres": sum(not c.shared for c in cells),
    }
    members = tuple(
        PairMembers(records[c.images], records[c.texts]) if not c.shared else _same(records[c.images]) for c in cells
    )
    return Prototypes(images[order], texts[order], tuple(members[i] for i in order), facts), records


def raw_cosines(sides: Sides) -> Float32[np.ndarray, " T"]:
    """Return the image-text cosine of each record. Raises `ValueError` for different widths or non-finite features."""
    if sides.images.width != sides.texts.width:
        widths = f"{sides.images.width} and {sides.texts.width}"
        raise ValueError(
            f"image and text features of {widths} numbers have no cosine; set rm_ratio: 0, or features: clip:NAME"
        )
    cosines = np.empty(len(sides.texts), np.float32)
    for where, texts in sides.texts.chunks():
        cosines[where] = np.vecdot(_unit(sides.images.at(sides.split.image_of[where])), _unit(texts))
    if not np.isfinite(cosines).all():
        bad = sides.split.pair_ids[int(sides.split.image_of[np.flatnonzero(~np.isfinite(cosines))[0]])]
        raise ValueError(f"the features of pair {bad} are not finite; remove the pair, or use another encoder")
    return cosines


# -- clusters of images or of texts ----------------------------------------------------------------------------------


def partition(
    rows: Rows, of: RecordIds, k: int, seed: int, ranks: OpenParts, starts: int = 20, normalize: bool = False
) -> RecordIds:
    """Return each record's cluster by k-means fitted on a sample of records; record n has the features in row `of[n]`.

    No cluster is empty if there are enough distinct rows.
    """
    sample = rows.at(of[sampled(np.arange(len(of)), k, seed)])
    centroids = fit(_unit(sample) if normalize else sample, k, seed, starts=starts, mini_batch=MINI_BATCH)
    if rows.folder is not None and 4 * len(rows) * rows.width >= RANKS_FROM:
        with ranks(functools.partial(open_side, rows.folder, normalize)) as workers:
            label, distance = _nearest(workers, centroids, len(rows))
    else:
        label, distance = _nearest(split_rows(_units(rows) if normalize else rows), centroids, len(rows))
    return refill_empty_clusters(label, distance, of, k)[of]


def open_side(folder: Path, normalize: bool, rank: int, size: int) -> Shard:
    """Open those feature rows in `folder` for which worker `rank` (of `size` workers) is responsible."""
    rows = Rows.open(folder).share(rank, size)
    return Shard(_units(rows) if normalize else rows)


def _nearest(ranks: WorkerParts, centroids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    label, distance = np.empty(count, np.int64), np.empty(count, np.float32)
    for ids, labels, far in ranks.call("assigned", centroids):
        label[ids], distance[ids] = labels, far
    return label, distance


def refill_empty_clusters(label: np.ndarray, distance: np.ndarray, of: RecordIds, k: int) -> RecordIds:
    """Move the rows farthest from their centroids to the empty clusters, one to each; return each row's cluster."""
    label, used = label.copy(), np.unique(of)
    count = np.bincount(label[used], minlength=k)
    far = used[np.lexsort((used, -distance[used]))].tolist()
    for empty in np.flatnonzero(count == 0):
        row = next((r for r in far if distance[r] > 0 and count[label[r]] > 1), None)
        if row is None:
            break  # no row can move: each row equals its centroid or is alone in its cluster
        count[label[row]] -= 1
        label[row], count[empty] = empty, 1
        far.remove(row)
    return label


# -- pairs of clusters -----------------------------------------------------------------------------------------------


def contingency(a: RecordIds, b: RecordIds, k: int) -> Int64[np.ndarray, "K K"]:
    """Return a matrix whose entry (i, j) is the number of records in both image cluster i and text cluster j."""
    return np.bincount(a * k + b, minlength=k * k).reshape(k, k)


def shared_cells(a: RecordIds, b: RecordIds, partner: RecordIds) -> list[PairMembers]:
    """For each image cluster, return the records shared with the matched text cluster; skip it if there are none."""
    inside = np.where(partner[a] == b, a, -1)
    return [_same(np.flatnonzero(inside == i)) for i in np.unique(inside[inside >= 0])]


def split_largest_cells(
    cells: Sequence[PairMembers], pairs: int, a: RecordIds, b: RecordIds, joint: Any, seed: int
) -> list[PairMembers]:
    """Split the largest cell by 2-means on `joint(members)`, again and again, until there are `pairs` cells.

    A cell is the set of records of a prototype. If no cell can be split, records without a cell form new cells: all
    records with the same image cluster and text cluster become one cell, the largest first.
    """
    result = list(cells)
    matched = np.zeros(len(a), bool)
    for cell in result:
        if cell.shared:
            matched[cell.images] = True
    unmatched = _unmatched(a, b, matched)
    while len(result) < pairs:
        sizes = [len(c.images) if c.shared else 0 for c in result]
        largest = int(np.argmax(sizes)) if sizes else 0
        if not sizes or sizes[largest] < 2:
            if not unmatched:
                break
            result.append(_same(unmatched.pop(0)))
            continue
        members = result[largest].images
        result[largest : largest + 1] = [_same(half) for half in _halves(members, joint(members), seed)]
    return result


def _halves(members: RecordIds, rows: np.ndarray, seed: int) -> list[RecordIds]:
    centroids = fit(rows, 2, derive(seed, "split of a cell", int(members[0]), len(members)))
    _, label, _ = Shard(Rows.of(rows)).assigned(centroids)
    halves = [members[label == half] for half in (0, 1)]
    if not all(len(half) for half in halves):  # 2-means cannot separate equal rows
        return [members[: len(members) // 2], members[len(members) // 2 :]]
    return halves


def _unmatched(a: RecordIds, b: RecordIds, matched: Bool[np.ndarray, " N"]) -> list[RecordIds]:
    """Return the records that belong to no cell, grouped by image cluster and text cluster, largest group first."""
    remaining = np.flatnonzero(~matched)
    _, group = np.unique(np.stack([a[remaining], b[remaining]]), axis=1, return_inverse=True)
    groups = [remaining[group.ravel() == g] for g in range(int(group.max(initial=-1)) + 1)]
    return sorted(groups, key=lambda members: (-len(members), int(members[0])))


def _centres(a: RecordIds, b: RecordIds, partner: RecordIds, empty: RecordIds) -> list[PairMembers]:
    """For each image cluster in `empty`, return all its records and all records of the matched text cluster."""
    cells = [PairMembers(np.flatnonzero(a == i), np.flatnonzero(b == partner[i])) for i in empty]
    return [cell for cell in cells if len(cell.images) and len(cell.texts)]


def _same(members: RecordIds) -> PairMembers:
    return PairMembers(members, members)


def _mean(rows: Rows, members: RecordIds, rescale: bool) -> Float32[np.ndarray, " D"]:
    values = rows.at(members).astype(np.float64)
    mean = values.mean(axis=0)
    if rescale:
        mean *= np.linalg.norm(values, axis=1).mean() / max(float(np.linalg.norm(mean)), 1e-12)
    return mean.astype(np.float32)


def _unit(rows: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "n D"]:
    return rows / np.maximum(np.sqrt(np.vecdot(rows, rows)), np.float32(1e-12))[:, None]


def _units(rows: Rows) -> Rows:
    return Rows.of(np.concatenate([_unit(x) for _, x in rows.chunks()]), rows.ids)


# -- nearest rows of a prototype -------------------------------------------------------------------------------------


def retrieved(
    queries: Float32[np.ndarray, "M D"], rows: Rows, among: RecordIds, repeats: bool
) -> Int64[np.ndarray, " M"]:
    """For each query, return the row number in `among` with the highest cosine; of equal rows, the first is returned.

    Without `repeats`, each row is used at most once, and the sum of the cosines is the highest possible. `ValueError`
    is then raised if there are fewer rows than queries.
    """
    count = len(queries)
    if not repeats and len(among) < count:
        raise ValueError(f"{len(among)} rows are too few for {count} prototypes without repeats; set repeats: allow")
    ids, score = _best(_unit(queries), rows, among, 1 if repeats else count)
    if repeats:
        return ids[:, 0]
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    columns, position = np.unique(ids, return_inverse=True)
    starts = np.arange(count + 1) * count
    cost = csr_array((2 - score.astype(np.float64).ravel(), position.ravel(), starts), shape=(count, len(columns)))
    query, column = min_weight_full_bipartite_matching(cost)
    return columns[column[np.argsort(query)]]


def _best(queries: np.ndarray, rows: Rows, among: RecordIds, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each query, return the ids (M, k) of the k rows with the highest cosines, highest first, and the cosines."""
    ids, score = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
    among = np.sort(among)
    for start in range(0, len(among), CHUNK):
        block = among[start : start + CHUNK]
        score = np.concatenate([score, queries @ _unit(rows.at(block)).T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(block, (len(queries), len(block)))], axis=1)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        score, ids = np.take_along_axis(score, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return ids, score
