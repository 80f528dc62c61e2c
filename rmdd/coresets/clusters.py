"""Selection by clusters: medoids, quotas for cluster-balanced selection, and the guard against outliers.

K-means is scikit-learn's, fitted on a hash-drawn sample of at most `SAMPLE` rows; all rows are then assigned in one
pass. N rows, D features, K clusters.
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
"""Samples up to here are clustered by full Lloyd iterations, larger ones by mini-batches of so many."""
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
    """K-means centroids, from k-means++ starts. Fewer than `k` distinct rows give centroids that coincide."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if not 0 < k <= len(sample):
        raise ValueError(f"{len(sample)} rows cannot be put into {k} clusters; ask for 1 to {len(sample)}")
    options = {"n_clusters": k, "n_init": starts, "max_iter": iterations, "random_state": derive(seed, "k-means") >> 31}
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of rows that are not distinct, or few iterations
        if len(sample) > mini_batch:
            fitted = MiniBatchKMeans(batch_size=mini_batch, **options).fit(sample)
        else:
            fitted = KMeans(**options).fit(sample)
    return np.ascontiguousarray(fitted.cluster_centers_, dtype=np.float32)


def sampled(ids: Int64[np.ndarray, " N"], k: int, seed: int, what: str = "k-means sample") -> Int64[np.ndarray, " n"]:
    """The ids, ascending, that `k` centroids are fitted on: all, or as many as suffice."""
    size = max(SAMPLE, 4 * k)
    return np.sort(ids if len(ids) <= size else smallest(ids, size, seed, what))


def centroids_of(ranks: WorkerParts, k: int, seed: int, side: slice = slice(None)) -> Float32[np.ndarray, "K D"]:
    """Centroids of all kept rows, or of some of their columns. Raises `ValueError` for fewer rows than `k`."""
    ids = np.concatenate(ranks.call("ids"))
    return fit(np.ascontiguousarray(rows_of(ranks, sampled(ids, k, seed).tolist())[:, side]), k, seed)


def medoids(ranks: WorkerParts, k: int, seed: int) -> list[int]:
    """Of `k` clusters the member nearest each centroid; for one without members the nearest item not yet chosen."""
    if not k:
        return []
    centroids = centroids_of(ranks, k, seed)
    return nearest_members(ranks, centroids, ranks.call("medoids", centroids))


def nearest_members(
    ranks: WorkerParts, points: Float32[np.ndarray, "K D"], of_workers: Sequence[dict[int, tuple[float, int]]]
) -> list[int]:
    """Per cluster the id of the member nearest its point, of what every worker has; else of the nearest free item."""
    best: dict[int, tuple[float, int]] = {}
    for of_worker in of_workers:
        for cluster, one in of_worker.items():
            best[cluster] = min(best.get(cluster, one), one)
    chosen = {cluster: number for cluster, (_, number) in best.items()}
    for cluster in sorted(set(range(len(points))) - chosen.keys()):
        nearest = best_of(ranks.call("nearest", points[cluster].astype(np.float64), list(chosen.values())))
        assert nearest is not None
        chosen[cluster] = nearest.id
    return [chosen[cluster] for cluster in range(len(points))]


def quotas(sizes: Sequence[int], k: int, rule: Quota) -> list[int]:
    """How many of `k` each cluster gives, by largest remainder; what a cluster does not have, the others give.

    Raises `ValueError` when all of them have fewer than `k`.
    """
    size = np.asarray(sizes, dtype=np.int64)
    if not 0 <= k <= size.sum():
        raise ValueError(f"clusters of {size.sum()} items in all cannot give {k}")
    weight = {"equal": np.ones(len(size)), "proportional": size.astype(float), "sqrt": np.sqrt(size)}[rule]
    granted = np.zeros(len(size), np.int64)
    while (left := k - int(granted.sum())) > 0:
        share = np.where(granted < size, weight, 0.0)
        exact = left * share / share.sum()
        part = np.floor(exact).astype(np.int64)
        order = np.argsort(-(exact - part), kind="stable")
        part[order[: left - int(part.sum())]] += 1
        granted = np.minimum(granted + part, size)
    return granted.tolist()


def balanced(
    ranks: WorkerParts, k: int, clusters: int, rule: Quota, seed: int, method: Callable[[WorkerParts], Iterator[int]]
) -> list[int]:
    """`method`, which picks from some rows, applied to every cluster for its quota; the picks of cluster 0 first."""
    centroids = centroids_of(ranks, clusters, seed)
    parts = ranks.call("assigned", centroids)
    ids = np.concatenate([part[0] for part in parts])
    label = np.concatenate([part[1] for part in parts])
    members = [np.sort(ids[label == c]) for c in range(clusters)]
    chosen: list[int] = []
    for own, quota in zip(members, quotas([len(m) for m in members], k, rule), strict=True):
        if quota:
            one = LocalParts([Shard(Rows.of(rows_of(ranks, own.tolist()), own))])
            picks = method(one)
            chosen += [next(picks) for _ in range(quota)]
    return chosen


def outliers(
    ranks: WorkerParts, share: float, seed: int, centroids: int = OUTLIER_CENTROIDS
) -> Int64[np.ndarray, " n"]:
    """The ids of the given share of rows that lie farthest from the nearest of `centroids` k-means centroids."""
    ids = np.concatenate(ranks.call("ids"))
    parts = ranks.call("assigned", centroids_of(ranks, min(centroids, max(1, len(ids) // 10)), seed))
    ids, _, distance = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return worst(ids, -distance, share)


def worst(ids: Int64[np.ndarray, " N"], score: Float32[np.ndarray, " N"], share: float) -> Int64[np.ndarray, " n"]:
    """The ids of the given share with the lowest scores; of equal scores the largest ids."""
    return np.sort(ids[np.lexsort((-ids, score))][: math.floor(share * len(ids))])
