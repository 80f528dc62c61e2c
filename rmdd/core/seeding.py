"""Random draws that depend only on a seed, a name and an index, never on earlier draws (counter-based randomness).

So a resumed run needs no saved generator state, and workers need not share a generator.
"""

import hashlib

import torch


def derive(seed: int, name: str, *index: int) -> int:
    """Return a 63-bit seed, computed from `seed`, for the random draw called `name` with the index `index`."""
    text = "/".join([str(seed), name, *(str(int(i)) for i in index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, name: str, *index: int) -> torch.Generator:
    """Return a new CPU generator, seeded by `derive`, for the random draw called `name` with the index `index`."""
    return torch.Generator().manual_seed(derive(seed, name, *index))
