"""Modes of fused latents: k-means over all pairs, and of every cluster a latent and the caption that speaks for it.

T caption records, D numbers of a latent, K clusters, F text width, P components.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int64

from rmdd.core.seeding import derive
from rmdd.core.threads import one_thread
from rmdd.coresets.clusters import fit, sampled
from rmdd.coresets.draws import smallest
from rmdd.coresets.rows import Rows

REDUCED_FROM = 16_384
"""Rows that principal components are found from at most."""


@dataclass(frozen=True)
class Modes:
    latents: Float32[np.ndarray, "K D"]
    records: list[int]
    """Of each cluster the record whose caption lies nearest the mean of its captions."""
    members: list[int]
    """How many records are in each; 0 where coinciding latents left one empty, and a free record stands in."""


def modes_of(
    rows: Rows,
    texts: Float[np.ndarray, "T F"],
    k: int,
    seed: int,
    *,
    components: int | None = 256,
    kind: Literal["centre", "nearest"] = "centre",
) -> Modes:
    """Cluster rows, whose ids are caption records, in their first `components` principal components (None: as they
    are). `centre` is the mean latent of a cluster, `nearest` the member nearest to it."""
    if k > len(rows):
        raise ValueError(f"{k} pairs are asked for but there are {len(rows)} latents; lower distill.phases.*.pairs")
    low = reduced(rows, components, seed)
    ids = rows.ids
    positions = np.arange(len(rows))
    label = assigned(low, fit(np.ascontiguousarray(low[sampled(positions, k, seed, "modes")]), k, seed))
    count = np.bincount(label, minlength=k)
    centres = _means(rows, label, k, count)
    nearest = _nearest(rows, label, centres)
    captions = [_central_caption(texts, ids[label == cluster]) if count[cluster] else -1 for cluster in range(k)]
    free = np.flatnonzero(~np.isin(ids, captions))
    free = free[np.argsort(np.isin(free, nearest[count > 0]), kind="stable")]  # those that stand for no mode first
    for cluster, position in zip(np.flatnonzero(count == 0), free, strict=False):
        nearest[cluster], captions[cluster] = position, int(ids[position])
        centres[cluster] = rows.at(free[free == position])[0]
    latents = centres if kind == "centre" else rows.at(nearest)
    return Modes(latents.astype(np.float32), captions, count.tolist())


def reduced(rows: Rows, components: int | None, seed: int) -> Float32[np.ndarray, "T P"]:
    """Rows in their principal components, found from some of them; no more than they have."""
    from sklearn.decomposition import PCA

    count = len(rows)
    if components is None or components >= min(count, rows.width):
        return np.concatenate([block.copy() for _, block in rows.chunks()])  # chunks share a buffer
    some = np.arange(count) if count <= REDUCED_FROM else np.sort(smallest(np.arange(count), REDUCED_FROM, seed, "pca"))
    out = np.empty((count, components), np.float32)
    with one_thread():
        solver = PCA(components, svd_solver="randomized", random_state=derive(seed, "pca") >> 31).fit(rows.at(some))
        for where, block in rows.chunks():
            out[where] = solver.transform(block)
    return out


def assigned(
    rows: Float32[np.ndarray, "T P"], centres: Float32[np.ndarray, "K P"], chunk: int = 8192
) -> Int64[np.ndarray, " T"]:
    """The centre nearest to each row; of equally near ones the first."""
    length = (centres.astype(np.float64) ** 2).sum(1)
    nearest = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), chunk):
        block = rows[start : start + chunk].astype(np.float64)
        nearest[start : start + chunk] = (length - 2 * block @ centres.T.astype(np.float64)).argmin(1)
    return nearest


def _means(rows: Rows, label: np.ndarray, k: int, count: np.ndarray) -> np.ndarray:
    total = np.zeros((k, rows.width))
    for where, block in rows.chunks():
        np.add.at(total, label[where], block)
    return total / np.maximum(count, 1)[:, None]


def _nearest(rows: Rows, label: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The position of the member nearest to each centre; 0 for clusters without one."""
    best, nearest = np.full(len(centres), np.inf), np.zeros(len(centres), np.int64)
    for where, block in rows.chunks():
        distance = ((block - centres[label[where]]) ** 2).sum(1)
        for position in np.argsort(distance, kind="stable"):
            cluster = label[where][position]
            if distance[position] < best[cluster]:
                best[cluster], nearest[cluster] = distance[position], where.start + position
    return nearest


def _central_caption(texts: np.ndarray, members: np.ndarray) -> int:
    """The member whose text has the largest cosine with the mean of all members' unit texts."""
    own = np.asarray(texts[members], dtype=np.float64)
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
    return int(members[(own @ own.mean(0)).argmax()])
