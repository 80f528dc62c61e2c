"""Modes of fused latents. K-means clusters the caption records; each cluster has a latent (the mode) and a caption.

Shapes: T caption records, D numbers of a latent, K clusters, F features of a text, P principal components.
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
"""Maximum number of latents from which principal components are computed; of more latents, a sample is used."""


@dataclass(frozen=True)
class Modes:
    latents: Float32[np.ndarray, "K D"]
    records: list[int]
    """For each cluster, the caption record whose text embedding is nearest to the cluster's mean text embedding."""
    members: list[int]
    """Number of caption records in each cluster; an empty cluster takes latent and caption from an unused record."""


def modes_of(
    rows: Rows,
    texts: Float[np.ndarray, "T F"],
    k: int,
    seed: int,
    *,
    components: int | None = 256,
    kind: Literal["centre", "nearest"] = "centre",
) -> Modes:
    """Cluster fused latents by k-means in their first `components` principal components (None: in all dimensions).

    The ids of `rows` are the numbers of caption records. Each mode is the mean latent of its cluster (`kind` centre) or
    the latent nearest to the mean (`kind` nearest). Raises `ValueError` if there are fewer latents than clusters.
    """
    if k > len(rows):
        raise ValueError(f"{k} pairs need at least {k} latents, found {len(rows)}; lower distill.phases.*.pairs")
    low = reduced(rows, components, seed)
    ids = rows.ids
    positions = np.arange(len(rows))
    label = assigned(low, fit(np.ascontiguousarray(low[sampled(positions, k, seed, "modes")]), k, seed))
    count = np.bincount(label, minlength=k)
    centres = _means(rows, label, k, count)
    nearest = _nearest(rows, label, centres)
    captions = [_central_caption(texts, ids[label == cluster]) if count[cluster] else -1 for cluster in range(k)]
    free = np.flatnonzero(~np.isin(ids, captions))
    free = free[np.argsort(np.isin(free, nearest[count > 0]), kind="stable")]  # prefer latents that are not yet a mode
    for cluster, position in zip(np.flatnonzero(count == 0), free, strict=False):
        nearest[cluster], captions[cluster] = position, int(ids[position])
        centres[cluster] = rows.at(free[free == position])[0]
    latents = centres if kind == "centre" else rows.at(nearest)
    return Modes(latents.astype(np.float32), captions, count.tolist())


def reduced(rows: Rows, components: int | None, seed: int) -> Float32[np.ndarray, "T P"]:
    """Project rows on their first `components` principal components, computed from a sample.

    Nothing is projected if `components` is None, or if `components` is at least the number of rows or of columns.
    """
    from sklearn.decomposition import PCA

    count = len(rows)
    if components is None or components >= min(count, rows.width):
        return np.concatenate([block.copy() for _, block in rows.chunks()])  # all chunks share one buffer, so copy
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
    """Return the number of the centre nearest to each row; of equally near centres, the first."""
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
    """For each cluster, return the position of its row nearest to its centre, or 0 if the cluster is empty."""
    best, nearest = np.full(len(centres), np.inf), np.zeros(len(centres), np.int64)
    for where, block in rows.chunks():
        distance = ((block - centres[label[where]]) ** 2).sum(1)
        for position in np.argsort(distance, kind="stable"):
            cluster = label[where][position]
            if distance[position] < best[cluster]:
                best[cluster], nearest[cluster] = distance[position], where.start + position
    return nearest


def _central_caption(texts: np.ndarray, members: np.ndarray) -> int:
    """Average the text embeddings of the caption records `members`, each scaled to unit length. Return the record whose
    text embedding has the highest cosine with this average."""
    units = np.asarray(texts[members], dtype=np.float64)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    return int(members[(units @ units.mean(0)).argmax()])
