"""Random features, and slow, simple implementations of the coreset selection methods."""

import itertools

import numpy as np


def unit_rows(count, width, seed=0, dtype=np.float32):
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def herding(rows, k):
    """Run herding in float64: each step picks the row that brings the mean of the picks nearest to the overall mean."""
    x, chosen = rows.astype(np.float64), []
    for t in range(1, k + 1):
        free = [i for i in range(len(x)) if i not in chosen]
        miss = {i: np.linalg.norm(x.mean(axis=0) - (x[chosen].sum(axis=0) + x[i]) / t) for i in free}
        chosen.append(min(free, key=lambda i: miss[i]))
    return chosen


def k_center(rows, first, k):
    """Run K-center with all distances recomputed at every step; return the picks and the distance of each pick."""
    x, chosen, far = rows.astype(np.float64), [first], []
    while len(chosen) < k:
        nearest = np.array([min(np.linalg.norm(x[i] - x[c]) for c in chosen) for i in range(len(x))])
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
        far.append(float(nearest.max()))
    return chosen, far


def radius(rows, centres):
    x = rows.astype(np.float64)
    return max(min(np.linalg.norm(row - x[c]) for c in centres) for row in x)


def best_radius(rows, k):
    return min(radius(rows, centres) for centres in itertools.combinations(range(len(rows)), k))
