"""Matched prototypes (PDS) as a coreset: image clusters are matched one to one with text clusters.

A row is an image embedding followed by a text embedding. Images and texts are clustered separately, into K k-means
clusters each. The Hungarian algorithm matches image clusters to text clusters so that as many rows as possible lie in
two matched clusters. The prototype of two matched clusters is the mean of their common rows; the common row nearest to
it is chosen. Without common rows, the prototype joins the two centroids, and the nearest row not yet chosen is taken.

N rows, D features, K clusters of images and of texts.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from rmdd.coresets.clusters import centroids_of, nearest_members
from rmdd.coresets.greedy import checked
from rmdd.execution.parts import WorkerParts


def matched(ranks: WorkerParts, k: int, seed: int, image_width: int) -> tuple[list[int], dict[str, Any]]:
    """Choose one row for each pair of matched clusters; return the ids of the rows and statistics of the matching.

    The first `image_width` columns are the image embedding. Pairs with more common rows come first. Statistics:
    `overlap` (share of rows in two matched clusters), `empty` (number of pairs without a common row).
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
    share = float(common.sum() / overlap.sum())
    return [chosen[cluster] for cluster in order], {"overlap": share, "empty": int((common == 0).sum())}


def match(overlap: Int64[np.ndarray, "K K"]) -> Int64[np.ndarray, " K"]:
    """Assign each row a different column to maximise the sum of the assigned entries (Hungarian method, Kuhn 1955)."""
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(overlap, maximize=True)[1], np.int64)


def _prototypes(
    ranks: WorkerParts, partner: np.ndarray, common: np.ndarray, fallback: Float32[np.ndarray, "K D"]
) -> Float32[np.ndarray, "K D"]:
    """Return the mean of the common rows of each pair of matched clusters; without common rows, its row of `fallback`.

    The result is bit-identical for any order of rows and number of workers.
    """
    largest = checked(ranks).largest
    size = math.ceil(math.log2(largest)) + 1
    bits = min(52 - size, 62 - size - math.ceil(math.log2(int(common.max()) + 1)))
    total = np.sum(ranks.call("sums", partner, bits), axis=0).astype(np.float64)
    mean = np.ldexp(total, -bits) / np.maximum(common, 1)[:, None]
    return np.where(common[:, None] > 0, mean, fallback).astype(np.float32)
