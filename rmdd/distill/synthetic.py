"""The learnable state of one phase: images, text embeddings, similarity and inner learning rates.

M pairs, F text feature width, H W image size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Synthetic:
    """Tensors of one phase; images live in normalised space, nothing is bounded."""

    images: Float[Tensor, " M *image"]
    """(M,3,H,W) as stored, or (M,D) features where a frozen tower lies in front."""
    texts: Float[Tensor, " M *text"]
    """(M,F) embeddings, or (M,L,d) of tokens where a method learns these; padding is zero."""
    lr_image: Float[Tensor, ""]
    lr_text: Float[Tensor, ""]
    similarity: dict[str, Tensor] = field(default_factory=dict)
    alpha: float = 1.0

    @property
    def pairs(self) -> int:
        return self.images.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """All learnable tensors by name."""
        named = {"images": self.images, "texts": self.texts, "lr_image": self.lr_image, "lr_text": self.lr_text}
        return named | {f"similarity.{n}": t for n, t in self.similarity.items()}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Synthetic":
        return self.with_tensors({n: change(t) for n, t in self.tensors().items()})

    def with_tensors(self, named: dict[str, Tensor]) -> "Synthetic":
        return from_tensors(named, self.alpha)


def from_tensors(named: dict[str, Tensor], alpha: float) -> Synthetic:
    """The inverse of `Synthetic.tensors`."""
    prefix = "similarity."
    similarity = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
    rest = {n: named[n] for n in ("images", "texts", "lr_image", "lr_text")}
    return Synthetic(**rest, similarity=similarity, alpha=alpha)


def zeros_like(synthetic: Synthetic) -> Synthetic:
    return synthetic.map(torch.zeros_like)


def enlarged(images: Float[Tensor, "B 3 h w"], size: int) -> Float[Tensor, "B 3 H W"]:
    """Pictures of side `size`, bilinear; as they are where that is their size.

    Smaller pictures are cheaper, so a budget holds more of them (Kim et al., ICML 2022, multi-formation).
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def reduced(images: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 h w"]:
    """Pictures of side `size`, each pixel the mean of those it covers."""
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="area")
