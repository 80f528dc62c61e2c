"""Uniform random draws of ids without replacement."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64, UInt64

from rmdd.core.seeding import derive, generator


def permuted(ids: Int64[np.ndarray, " N"], seed: int) -> Int64[np.ndarray, " N"]:
    """Return all ids in a random order that does not depend on their order in `ids`; the first k are a random draw."""
    order = torch.randperm(len(ids), generator=generator(seed, "coreset random")).numpy()
    return np.sort(ids)[order]


def hashes(ids: Int64[np.ndarray, " N"], seed: int, label: str = "coreset hash") -> UInt64[np.ndarray, " N"]:
    """Return a 64-bit hash of every id: splitmix64, with a key derived from `seed` and `label`."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(seed, label))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return z ^ (z >> np.uint64(31))


def smallest(
    ids: Int64[np.ndarray, " N"], k: int | None, seed: int, label: str = "coreset hash"
) -> Int64[np.ndarray, " k"]:
    """Return a random draw of k ids: those with the smallest hashes, smallest first (all ids if k is None).

    The number of ids need not be known beforehand. To draw from a union of shards, draw k from each and merge them.
    """
    return ids[np.lexsort((ids, hashes(ids, seed, label)))][:k]


def merged(parts: Sequence[np.ndarray], k: int, seed: int) -> np.ndarray:
    """Merge draws that `smallest` made from disjoint shards (k ids of each, or all its ids) into one draw of k ids."""
    return smallest(np.concatenate(list(parts)), k, seed)
