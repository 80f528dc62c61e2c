"""Uniform draws without replacement."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64, UInt64

from rmdd.core.seeding import derive, generator


def permuted(ids: Int64[np.ndarray, " N"], seed: int) -> Int64[np.ndarray, " N"]:
    """All ids in a seeded order that does not depend on theirs; the first k are a uniform draw of k."""
    order = torch.randperm(len(ids), generator=generator(seed, "coreset random")).numpy()
    return np.sort(ids)[order]


def hashes(ids: Int64[np.ndarray, " N"], seed: int, what: str = "coreset hash") -> UInt64[np.ndarray, " N"]:
    """A 64-bit hash of every id (splitmix64, keyed by the seed)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(seed, what))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return z ^ (z >> np.uint64(31))


def smallest(
    ids: Int64[np.ndarray, " N"], k: int | None, seed: int, what: str = "coreset hash"
) -> Int64[np.ndarray, " k"]:
    """The k ids with the smallest hashes (all: None), smallest first: a uniform draw that needs no count beforehand.

    The draw of a union is the draw of the draws of its parts, so shards can be drawn from apart and merged.
    """
    return ids[np.lexsort((ids, hashes(ids, seed, what)))][:k]


def merged(parts: Sequence[np.ndarray], k: int, seed: int) -> np.ndarray:
    """The draw of k from all that `parts` were drawn from by `smallest`, k or more from each that had as many."""
    return smallest(np.concatenate(list(parts)), k, seed)
