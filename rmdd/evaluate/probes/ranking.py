"""Functions shared by the probes: embed images and texts, and compute the rank of the correct candidate.

Letters in shapes: N queries, C candidates, T texts, F text feature width, D joint width.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd.data.images import normalise
from rmdd.evaluate.students import Diverged
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import Constants

TOLERANCE = 1e-6
"""Cosines that differ by less than this count as tied, because rounding can make equal candidates differ."""

TEXTS = 8192
"""Number of texts that go through the text head of the model at once."""


def embed_pictures(
    model: DualEncoder,
    images: np.ndarray,
    constants: tuple[Constants, Constants],
    device: torch.device,
    chunk: int,
    alive: Callable[[], object] = lambda: None,
) -> Float[Tensor, "N D"]:
    """Embed uint8 images (N, 3, S, S) as rows of norm 1. Raise `Diverged` if an embedding is zero or not finite."""
    parts = []
    for start in range(0, len(images), chunk):
        pixels = torch.tensor(np.ascontiguousarray(images[start : start + chunk])).to(device)
        parts.append(model.embed_images(normalise(pixels, *constants)))
        alive()
    return _checked(torch.cat(parts), "image")


def embed_texts(model: DualEncoder, texts: np.ndarray, device: torch.device) -> Float[Tensor, "T D"]:
    """Embed text features (T, F) as rows of norm 1. Raise `Diverged` if an embedding is zero or not finite."""
    blocks: Iterable[np.ndarray] = (texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS))
    return _checked(torch.cat([model.embed_texts(torch.tensor(block).to(device)) for block in blocks]), "text")


def ranks(scores: Float[Tensor, "N C"], right: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Return the rank (from 0) of each query's correct candidate `right`; a tie counts against `right`."""
    right_score = scores.gather(1, right[:, None])
    return (scores >= right_score - TOLERANCE).sum(1) - 1


def accuracies(rank: Int[Tensor, " N"], ks: Sequence[int], label: str = "ACC") -> dict[str, float]:
    """Return ACC@K for each K: the percentage of queries whose correct candidate has a rank below K."""
    return {f"{label}@{k}": 100 * int((rank < k).sum()) / len(rank) for k in ks}


def _checked(rows: Tensor, side: str) -> Tensor:
    rows = rows.float()
    if not (torch.isfinite(rows).all() and (rows != 0).any(dim=1).all()):
        raise Diverged(f"{side} embeddings collapsed: some are zero or not finite")
    return rows
