"""Selection by k-means clusters: medoids, selection from each cluster by quota, and the guard that drops outliers.

K-means is scikit-learn's. It is fitted on at most max(`SAMPLE`, 4 K) rows, chosen by a hash of their ids; then all rows
are assigned to the centroids. N rows, D features, K clusters.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from rmdd.core.seeding import derive
from rmdd.core.threads import one_thread
from rmdd.coresets.draws import smallest
from rmdd.coresets.greedy import rows_of
from rmdd.coresets.rows import Rows
from rmdd.coresets.shard import Shard, best_of
from rmdd.execution.parts import LocalParts, WorkerParts

SAMPLE = 65_536
MINI_BATCH = 16_384
"""Batch size (rows) of mini-batch k-means; a sample of at most this size is clustered with full Lloyd iterations."""
OUTLIER_CENTROIDS = 1000

Quota = Literal["equal", "proportional", "sqrt"]


def fit(
    sample: Float32[np.ndarray, "n D"],
    k: int,
    seed: int,
    iterations: int = 100,
    starts: int = 3,
    mini_batch: int = MINI_BATCH,
) -> Float32[np.ndarray, "K D"]:
    """Return `k` k-means centroids from k-means++ starts; some are equal if there are fewer than `k` distinct rows."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if not 0 < k <= len(sample):
        raise ValueError(f"{len(sample)} rows cannot be put into {k} clusters; ask for 1 to {len(sample)}")
    options = {"n_clusters": k, "n_init": starts, "max_iter": iterations, "random_state": derive(seed, "k-means") >> 31}
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore", ConvergenceWarning)  # warns of equal rows or few iterations
        if len(sample) > mini_batch:
            fitted = MiniBatchKMeans(batch_size=mini_batch, **options).fit(sample)
        else:
            fitted = KMeans(**options).fit(sample)
    return np.ascontiguousarray(fitted.cluster_centers_, dtype=np.float32)


def sampled(ids: Int64[np.ndarray, " N"], k: int, seed: int, label: str = "k-means sample") -> Int64[np.ndarray, " n"]:
    """Return in ascending order the ids of the rows that `k` centroids are fitted on: all rows, or a sample of them."""
    size = max(SAMPLE, 4 * k)
    return np.sort(ids if len(ids) <= size else smallest(ids, size, seed, label))


def centroids_of(ranks: WorkerParts, k: int, seed: int, side: slice = slice(None)) -> Float32[np.ndarray, "K D"]:
    """Return `k` k-means centroids of all rows that were not dropped; `side` selects columns of the rows.

    Raises `ValueError` for fewer rows than `k`.
    """
    ids = np.concatenate(ranks.call("ids"))
    return fit(np.ascontiguousarray(rows_of(ranks, sampled(ids, k, seed).tolist())[:, side]), k, seed)


def medoids(ranks: WorkerParts, k: int, seed: int) -> list[int]:
    """Return for each of `k` k-means clusters the id of its member nearest to the centroid.

    For a cluster without members, the nearest item that is not chosen yet is taken.
    """
    if not k:
        return []
    centroids = centroids_of(ranks, k, seed)
    return nearest_members(ranks, centroids, ranks.call("medoids", centroids))


def nearest_members(
    ranks: WorkerParts, points: Float32[np.ndarray, "K D"], of_workers: Sequence[dict[int, tuple[float, int]]]
) -> list[int]:
    """Combine the results of all workers: return for each cluster the id of the member nearest to the cluster's point.

    For a cluster without members, the nearest item that is not chosen yet is taken.
    """
    best: dict[int, tuple[float, int]] = {}
    for of_worker in of_workers:
        for cluster, candidate in of_worker.items():
            best[cluster] = min(best.get(cluster, candidate), candidate)
    chosen = {cluster: number for cluster, (_, number) in best.items()}
    for cluster in sorted(set(range(len(points))) - chosen.keys()):
        nearest = best_of(ranks.call("nearest", points[cluster].astype(np.float64), list(chosen.values())))
        assert nearest is not None
        chosen[cluster] = nearest.id
    return [chosen[cluster] for cluster in range(len(points))]


def quotas(sizes: Sequence[int], k: int, rule: Quota) -> list[int]:
    """Divide `k` picks among clusters with `sizes` items by largest remainders; no quota exceeds the cluster's size.

    Raises `ValueError` when the clusters have fewer than `k` items together.
    """
    size = np.asarray(sizes, dtype=np.int64)
    if not 0 <= k <= size.sum():
        raise ValueError(f"clusters with {size.sum()} items in total cannot give {k} picks")
    weight = {"equal": np.ones(len(size)), "proportional": size.astype(float), "sqrt": np.sqrt(size)}[rule]
    granted = np.zeros(len(size), np.int64)
    while (remaining := k - int(granted.sum())) > 0:
        share = np.where(granted < size, weight, 0.0)
        exact = remaining * share / share.sum()
        part = np.floor(exact).astype(np.int64)
        order = np.argsort(-(exact - part), kind="stable")
        part[order[: remaining - int(part.sum())]] += 1
        granted = np.minimum(granted + part, size)
    return granted.tolist()


def balanced(
    ranks: WorkerParts, k: int, clusters: int, rule: Quota, seed: int, method: Callable[[WorkerParts], Iterator[int]]
) -> list[int]:
    """Choose `k` items: run `method` in each cluster for the cluster's quota. The picks of cluster 0 come first."""
    centroids = centroids_of(ranks, clusters, seed)
    parts = ranks.call("assigned", centroids)
    ids = np.concatenate([part[0] for part in parts])
    label = np.concatenate([part[1] for part in parts])
    members = [np.sort(ids[label == c]) for c in range(clusters)]
    chosen: list[int] = []
    for cluster_ids, quota in zip(members, quotas([len(m) for m in members], k, rule), strict=True):
        if quota:
            picks = method(LocalParts([Shard(Rows.of(rows_of(ranks, cluster_ids.tolist()), cluster_ids))]))
            chosen += [next(picks) for _ in range(quota)]
    return chosen


def outliers(
    ranks: WorkerParts, share: float, seed: int, centroids: int = OUTLIER_CENTROIDS
) -> Int64[np.ndarray, " n"]:
    """Return the ids of the `share` (0 to 1) of rows that are farthest from their nearest k-means centroid."""
    ids = np.concatenate(ranks.call("ids"))
    parts = ranks.call("assigned", centroids_of(ranks, min(centroids, max(1, len(ids) // 10)), seed))
    ids, _, distance = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return worst(ids, -distance, share)


def worst(ids: Int64[np.ndarray, " N"], score: Float32[np.ndarray, " N"], share: float) -> Int64[np.ndarray, " n"]:
    """Return the ids of the `share` (0 to 1) of rows with the lowest scores; of equal scores, larger ids first."""
    return np.sort(ids[np.lexsort((-ids, score))][: math.floor(share * len(ids))])
