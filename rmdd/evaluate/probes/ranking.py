"""What the probes share: embeddings of pictures and texts, and the rank of the right candidate.

N queries, C candidates, T texts, F text features, D joint width.
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
"""Cosines nearer than this are tied: equal candidates may differ in the last bits, by where they stand."""

TEXTS = 8192
"""Texts that go through the text head together."""


def embed_pictures(
    model: DualEncoder,
    images: np.ndarray,
    constants: tuple[Constants, Constants],
    device: torch.device,
    chunk: int,
    alive: Callable[[], object] = lambda: None,
) -> Float[Tensor, "N D"]:
    """Unit rows for uint8 images (N, 3, S, S). Raises `Diverged` when some are zero or not finite."""
    parts = []
    for start in range(0, len(images), chunk):
        pixels = torch.tensor(np.ascontiguousarray(images[start : start + chunk])).to(device)
        parts.append(model.embed_images(normalise(pixels, *constants)))
        alive()
    return _sound(torch.cat(parts), "image")


def embed_texts(model: DualEncoder, texts: np.ndarray, device: torch.device) -> Float[Tensor, "T D"]:
    """Unit rows for vectors of the text encoder (T, F). Raises `Diverged` likewise."""
    blocks: Iterable[np.ndarray] = (texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS))
    return _sound(torch.cat([model.embed_texts(torch.tensor(block).to(device)) for block in blocks]), "text")


def ranks(scores: Float[Tensor, "N C"], right: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """How many other candidates score as high as the right one or higher."""
    own = scores.gather(1, right[:, None])
    return (scores >= own - TOLERANCE).sum(1) - 1


def accuracies(rank: Int[Tensor, " N"], ks: Sequence[int], label: str = "ACC") -> dict[str, float]:
    """Per K, percent of ranks below it."""
    return {f"{label}@{k}": 100 * int((rank < k).sum()) / len(rank) for k in ks}


def _sound(rows: Tensor, side: str) -> Tensor:
    rows = rows.float()
    if not (torch.isfinite(rows).all() and (rows != 0).any(dim=1).all()):
        raise Diverged(f"the {side} embeddings collapsed: some are zero or not finite")
    return rows
