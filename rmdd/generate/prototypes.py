"""Matched prototypes: clusters of images and of captions, paired one to one, each pair the mean of what they share.

Records are caption records: record n shows image `image_of[n]` and says caption n. N records that are kept, M pairs,
D feature width (U of images, V of captions where they differ).
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
from rmdd.coresets.shard import Shard, here
from rmdd.coresets.spaces import Sides
from rmdd.execution.parts import OpenParts, WorkerParts

MINI_BATCH = 10_000
CHUNK = 8192
RANKS_FROM = 256 * 2**20
"""Bytes of features from which their rows are held by ranks."""

Pairless = Literal["topup", "keep_centres", "drop"]
RecordIds = Int64[np.ndarray, " _"]


@dataclass(frozen=True)
class PairMembers:
    """The records that one pair stands for; both are the same unless two clusters share none."""

    images: RecordIds
    texts: RecordIds

    @property
    def shared(self) -> bool:
        return self.images is self.texts


@dataclass(frozen=True)
class Prototypes:
    """M means of raw features, and the records behind each."""

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
    """The prototypes, those whose sides agree most first, and the records that pruning left.

    Raises `ValueError` where fewer records than `pairs` are left.
    """
    image_of = sides.split.image_of.astype(np.int64)
    records = np.arange(len(image_of))
    if rm_ratio:
        records = np.setdiff1d(records, worst(records, raw_cosines(sides), rm_ratio))
    if len(records) < pairs:
        raise ValueError(
            f"{len(image_of)} caption records, of which rm_ratio {rm_ratio} leaves {len(records)}, make no {pairs} "
            "pairs; lower rm_ratio or the pairs, or ingest more data"
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
        cells = topped_up(cells, pairs, label["image"], label["text"], joint, seed)
    images = np.stack([_mean(sides.images, of["image"][c.images], rescale) for c in cells])
    texts = np.stack([_mean(sides.texts, of["text"][c.texts], rescale) for c in cells])
    if images.shape[1] == texts.shape[1]:
        agreement = np.vecdot(_unit(images), _unit(texts))
    else:  # two spaces have no cosine
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
    """Of every caption record. Raises `ValueError` when the sides lie in different spaces, or features are zero."""
    if sides.images.width != sides.texts.width:
        widths = f"{sides.images.width} and {sides.texts.width}"
        raise ValueError(f"image and text features of {widths} numbers have no cosine; set rm_ratio: 0, or take a CLIP")
    cosines = np.empty(len(sides.texts), np.float32)
    for where, texts in sides.texts.chunks():
        cosines[where] = np.vecdot(_unit(sides.images.at(sides.split.image_of[where])), _unit(texts))
    if not np.isfinite(cosines).all():
        bad = sides.split.pair_ids[int(sides.split.image_of[np.flatnonzero(~np.isfinite(cosines))[0]])]
        raise ValueError(f"the features of pair {bad} are not finite; leave it out, or use another encoder")
    return cosines


# -- clusters of one side --------------------------------------------------------------------------------------------


def partition(
    rows: Rows, of: RecordIds, k: int, seed: int, ranks: OpenParts, starts: int = 20, normalize: bool = False
) -> RecordIds:
    """The k-means cluster of every record, whose features are row `of[n]`; fitted on a sample of them.

    No cluster is empty as long as there are enough distinct rows.
    """
    sample = rows.at(of[sampled(np.arange(len(of)), k, seed)])
    centroids = fit(_unit(sample) if normalize else sample, k, seed, starts=starts, mini_batch=MINI_BATCH)
    if rows.folder is not None and 4 * len(rows) * rows.width >= RANKS_FROM:
        with ranks(functools.partial(open_side, rows.folder, normalize)) as held:
            label, distance = _nearest(held, centroids, len(rows))
    else:
        label, distance = _nearest(here(_units(rows) if normalize else rows), centroids, len(rows))
    return refilled(label, distance, of, k)[of]


def open_side(folder: Path, normalize: bool, rank: int, size: int) -> Shard:
    """The rows of one rank."""
    rows = Rows.open(folder).share(rank, size)
    return Shard(_units(rows) if normalize else rows)


def _nearest(ranks: WorkerParts, centroids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    label, distance = np.empty(count, np.int64), np.empty(count, np.float32)
    for ids, labels, far in ranks.call("assigned", centroids):
        label[ids], distance[ids] = labels, far
    return label, distance


def refilled(label: np.ndarray, distance: np.ndarray, of: RecordIds, k: int) -> RecordIds:
    """Clusters of all rows, where an empty one gets the row in use that lies farthest from its centroid."""
    label, used = label.copy(), np.unique(of)
    count = np.bincount(label[used], minlength=k)
    far = used[np.lexsort((used, -distance[used]))].tolist()
    for empty in np.flatnonzero(count == 0):
        row = next((r for r in far if distance[r] > 0 and count[label[r]] > 1), None)
        if row is None:
            break  # all that is left coincides with its centroid
        count[label[row]] -= 1
        label[row], count[empty] = empty, 1
        far.remove(row)
    return label


# -- pairs of clusters -----------------------------------------------------------------------------------------------


def contingency(a: RecordIds, b: RecordIds, k: int) -> Int64[np.ndarray, "K K"]:
    """How many records lie in image cluster i and text cluster j; clusters without members have zeros."""
    return np.bincount(a * k + b, minlength=k * k).reshape(k, k)


def shared_cells(a: RecordIds, b: RecordIds, partner: RecordIds) -> list[PairMembers]:
    """For every image cluster the records whose text cluster is its partner, where there are any."""
    inside = np.where(partner[a] == b, a, -1)
    return [_same(np.flatnonzero(inside == i)) for i in np.unique(inside[inside >= 0])]


def topped_up(
    cells: Sequence[PairMembers], pairs: int, a: RecordIds, b: RecordIds, joint: Any, seed: int
) -> list[PairMembers]:
    """`pairs` cells: the largest is split in two by 2-means on `joint(members)` until there are enough.

    Where nothing is left to split, the largest cells that were not matched follow.
    """
    result = list(cells)
    matched = np.zeros(len(a), bool)
    for cell in result:
        if cell.shared:
            matched[cell.images] = True
    rest = _unmatched(a, b, matched)
    while len(result) < pairs:
        sizes = [len(c.images) if c.shared else 0 for c in result]
        largest = int(np.argmax(sizes)) if sizes else 0
        if not sizes or sizes[largest] < 2:
            if not rest:
                break
            result.append(_same(rest.pop(0)))
            continue
        members = result[largest].images
        result[largest : largest + 1] = [_same(half) for half in _halves(members, joint(members), seed)]
    return result


def _halves(members: RecordIds, rows: np.ndarray, seed: int) -> list[RecordIds]:
    centroids = fit(rows, 2, derive(seed, "split of a cell", int(members[0]), len(members)))
    _, label, _ = Shard(Rows.of(rows)).assigned(centroids)
    halves = [members[label == half] for half in (0, 1)]
    if not all(len(half) for half in halves):  # members that coincide
        return [members[: len(members) // 2], members[len(members) // 2 :]]
    return halves


def _unmatched(a: RecordIds, b: RecordIds, matched: Bool[np.ndarray, " N"]) -> list[RecordIds]:
    """Records in no matched cell, by their two clusters, the most first."""
    left = np.flatnonzero(~matched)
    _, group = np.unique(np.stack([a[left], b[left]]), axis=1, return_inverse=True)
    groups = [left[group.ravel() == g] for g in range(int(group.max(initial=-1)) + 1)]
    return sorted(groups, key=lambda members: (-len(members), int(members[0])))


def _centres(a: RecordIds, b: RecordIds, partner: RecordIds, empty: RecordIds) -> list[PairMembers]:
    """Both clusters of a match that shares no record; their means stand for their k-means centres."""
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


# -- what is nearest to a prototype ----------------------------------------------------------------------------------


def retrieved(
    queries: Float32[np.ndarray, "M D"], rows: Rows, among: RecordIds, repeats: bool
) -> Int64[np.ndarray, " M"]:
    """For each query the row out of `among` with the highest cosine, the first of equals; without `repeats` each row is
    taken once, such that the sum of cosines is largest. Raises `ValueError` for fewer rows than queries then."""
    count = len(queries)
    if not repeats and len(among) < count:
        raise ValueError(f"{len(among)} rows cannot go to {count} prototypes without repeats; set repeats: allow")
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
    """(M, k): the ids of the k best rows of each query, best first, and their cosines."""
    ids, score = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
    among = np.sort(among)
    for start in range(0, len(among), CHUNK):
        block = among[start : start + CHUNK]
        score = np.concatenate([score, queries @ _unit(rows.at(block)).T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(block, (len(queries), len(block)))], axis=1)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        score, ids = np.take_along_axis(score, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return ids, score
