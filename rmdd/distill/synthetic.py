"""The learnable state of one phase: images, text embeddings, similarity and inner learning rates.

Symbols: M pairs, F text feature width, H x W image size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Synthetic:
    """The learnable tensors of one phase. Images have normalised pixels; no tensor is clamped."""

    images: Float[Tensor, " M *image"]
    """Images (M,3,H,W) as stored, or their features (M,D) when the image tower is frozen."""
    texts: Float[Tensor, " M *text"]
    """Text embeddings (M,F), or token embeddings (M,L,d) with zeros as padding for methods that learn tokens."""
    lr_image: Float[Tensor, ""]
    """Learned learning rate of the image tower in the SGD steps of a student."""
    lr_text: Float[Tensor, ""]
    """Learned learning rate of the text tower in the SGD steps of a student."""
    similarity: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the learned similarity (see `rmdd.distill.similarity`); empty for the identity."""
    alpha: float = 1.0
    """Weight alpha of the low-rank part of the similarity."""

    @property
    def pairs(self) -> int:
        return self.images.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return all learnable tensors of the synthetic set by name."""
        named = {"images": self.images, "texts": self.texts, "lr_image": self.lr_image, "lr_text": self.lr_text}
        return named | {f"similarity.{n}": t for n, t in self.similarity.items()}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Synthetic":
        return self.with_tensors({n: change(t) for n, t in self.tensors().items()})

    def with_tensors(self, named: dict[str, Tensor]) -> "Synthetic":
        return from_tensors(named, self.alpha)


def from_tensors(named: dict[str, Tensor], alpha: float) -> Synthetic:
    """Build a `Synthetic` from named tensors; the inverse of `Synthetic.tensors`."""
    prefix = "similarity."
    similarity = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
    rest = {n: named[n] for n in ("images", "texts", "lr_image", "lr_text")}
    return Synthetic(**rest, similarity=similarity, alpha=alpha)


def zeros_like(synthetic: Synthetic) -> Synthetic:
    return synthetic.map(torch.zeros_like)


def enlarged(images: Float[Tensor, "B 3 h w"], size: int) -> Float[Tensor, "B 3 H W"]:
    """Enlarge images to `size` x `size` by bilinear interpolation; images of that size are returned unchanged.

    Images stored at a smaller size cost less of the budget, so a set can have more pairs (multi-formation of Kim et
    al., ICML 2022).
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def reduced(images: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 h w"]:
    """Shrink images to `size` x `size`; each new pixel is the mean of the area that it covers."""
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="area")
