"""Matched prototypes (PDS) as a coreset: clusters of images matched one to one with clusters of texts.

Rows hold images and texts end to end. Each side is put into K k-means clusters; the Hungarian algorithm pairs them so
that as many rows as can be lie in both clusters of a pair. The prototype of a pair is the mean of these rows, and the
row among them that is nearest to it is chosen. A pair of clusters without a common row has both centroids for a
prototype, and the nearest row that was not chosen yet.

N rows, D features, K clusters a side.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from rmdd.coresets.clusters import centroids_of, nearest_members
from rmdd.coresets.greedy import checked
from rmdd.execution.parts import WorkerParts


def matched(ranks: WorkerParts, k: int, seed: int, image_width: int) -> tuple[list[int], dict[str, Any]]:
    """Ids of `k` rows, those of the largest overlap first, and how well the sides agree.

    The first `image_width` columns are those of the image.
    """
    if not k:
        return [], {"overlap": 0.0, "empty": 0}
    images = centroids_of(ranks, k, seed, slice(image_width))
    texts = centroids_of(ranks, k, seed, slice(image_width, None))
    overlap = np.sum(ranks.call("overlap", images, texts), axis=0)
    partner = match(overlap)
    common = overlap[np.arange(k), partner]
    points = _prototypes(ranks, partner, common, np.concatenate([images, texts[partner]], axis=1))
    chosen = nearest_members(ranks, points, ranks.call("inner", partner, points))
    order = np.argsort(-common, kind="stable").tolist()
    agreed = float(common.sum() / overlap.sum())
    return [chosen[cluster] for cluster in order], {"overlap": agreed, "empty": int((common == 0).sum())}


def match(overlap: Int64[np.ndarray, "K K"]) -> Int64[np.ndarray, " K"]:
    """The column of every row, each taken once, with the largest sum (Kuhn 1955)."""
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(overlap, maximize=True)[1], np.int64)


def _prototypes(
    ranks: WorkerParts, partner: np.ndarray, common: np.ndarray, without: Float32[np.ndarray, "K D"]
) -> Float32[np.ndarray, "K D"]:
    """Means of the common rows of every pair, the same bits however rows lie; `without` any, that row."""
    largest = checked(ranks).largest
    size = math.ceil(math.log2(largest)) + 1
    bits = min(52 - size, 62 - size - math.ceil(math.log2(int(common.max()) + 1)))
    total = np.sum(ranks.call("sums", partner, bits), axis=0).astype(np.float64)
    mean = np.ldexp(total, -bits) / np.maximum(common, 1)[:, None]
    return np.where(common[:, None] > 0, mean, without).astype(np.float32)
