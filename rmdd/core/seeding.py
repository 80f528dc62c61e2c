"""Counter-based randomness: a draw depends on (seed, what, index) alone, never on what was drawn before.

A resumed run therefore needs no generator state, and workers never share one.
"""

import hashlib

import torch


def derive(seed: int, what: str, *index: int) -> int:
    """A 63-bit seed for the draw named `what` at `index`."""
    text = "/".join([str(seed), what, *(str(int(i)) for i in index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, what: str, *index: int) -> torch.Generator:
    """A fresh CPU generator for the draw named `what` at `index`."""
    return torch.Generator().manual_seed(derive(seed, what, *index))
