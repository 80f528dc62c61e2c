"""Conversion of RGB images between uint8 pixels (0..255) and normalised float32 pixels.

Also exports the decoding functions of `rmdd.data.decode`. Shapes: N images of H x W pixels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rmdd.data.decode import ImageError, decode, squash

__all__ = ["NORMALISATIONS", "ImageError", "decode", "denormalise", "normalisation", "normalise", "squash"]

PerChannel = tuple[float, float, float]

NORMALISATIONS: dict[str, tuple[PerChannel, PerChannel]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def normalisation(name: str | tuple[Sequence[float], Sequence[float]]) -> tuple[PerChannel, PerChannel]:
    """Return (mean, std) per channel for pixels in [0, 1]; `name` is a known normalisation or a pair (mean, std)."""
    if isinstance(name, str):
        if name not in NORMALISATIONS:
            available = ", ".join(NORMALISATIONS)
            raise ValueError(f"unknown normalisation '{name}'; available: {available}; or give (mean, std)")
        return NORMALISATIONS[name]
    mean, std = ([float(v) for v in vector] for vector in name)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"a normalisation has three means and three positive standard deviations, found {name}")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def normalise(
    images: UInt8[Tensor, "N 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "N 3 H W"]:
    """Return (images / 255 - mean) / std as float32, on the device of `images`."""
    shift, scale = _constants(mean, std, images.device)
    return (images.to(torch.float32) / 255 - shift) / scale


def denormalise(
    images: Float[Tensor, "N 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[Tensor, "N 3 H W"]:
    """Convert normalised pixels back to uint8; values are rounded and clamped to 0..255."""
    shift, scale = _constants(mean, std, images.device)
    return ((images.detach().to(torch.float32) * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)


def _constants(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    shift, scale = torch.tensor([list(mean), list(std)], dtype=torch.float32, device=device).view(2, 1, 3, 1, 1)
    return shift, scale
