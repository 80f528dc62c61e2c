"""Image augmentation for expert training: random crop, flip, and the RandAugment variant of the BLIP data loaders.

The operation AutoContrast stretches the channels exactly, unlike the published code. There, the channel minimum is
subtracted in 8-bit arithmetic, which overflows and sets entire channels to 255. At the published magnitude 5, the
operations Brightness and Sharpness have factor 1 and change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from rmdd.config import Augment
from rmdd.data.decode import squash

MAX_MAGNITUDE = 10
GREY = (128, 128, 128)

Operation = Callable[[Image.Image, float, torch.Generator], Image.Image]


def augment(image: Image.Image, rule: Augment, size: int, generator: torch.Generator) -> np.ndarray:
    """Augment an image at random and resize it; return uint8 (3, size, size). With all options off, only resize it."""
    if rule.crop:
        image = image.crop(_crop_box(image.size, rule, generator))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    if _uniform(generator) < rule.flip:
        image = ImageOps.mirror(image)
    names = list(OPERATIONS)
    for _ in range(rule.randaugment_ops):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        if _uniform(generator) < rule.randaugment_probability:
            image = OPERATIONS[name](image, rule.randaugment_magnitude / MAX_MAGNITUDE, generator)
    return squash(image, size)


def autocontrast(image: Image.Image) -> Image.Image:
    """Stretch each channel of an image so that its values span 0..255; a channel with a single value is not changed."""
    pixels = np.asarray(image, dtype=np.float64)
    low, high = pixels.min(axis=(0, 1)), pixels.max(axis=(0, 1))
    spread = np.where(high > low, high - low, 1.0)
    stretched = np.where(high > low, (pixels - low) * 255 / spread, pixels)
    return Image.fromarray(np.rint(stretched).astype(np.uint8))


def _crop_box(size: tuple[int, int], rule: Augment, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Return a random crop box (left, top, right, bottom), drawn by the algorithm of torchvision's RandomResizedCrop.

    If none of ten random boxes fits into the image, the box is the largest centred one whose aspect ratio is allowed.
    """
    width, height = size
    low, high = rule.crop_ratio
    for _ in range(10):
        area = width * height * _uniform(generator, *rule.crop_scale)
        ratio = math.exp(_uniform(generator, math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=generator))
            top = int(torch.randint(height - h + 1, (), generator=generator))
            return left, top, left + w, top + h
    ratio = min(max(width / height, low), high)
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _signed(value: float, generator: torch.Generator) -> float:
    return -value if _uniform(generator) < 0.5 else value


def _warp(image: Image.Image, matrix: tuple[int | float, ...]) -> Image.Image:
    """Warp an image with an affine `matrix` that maps pixel positions of the result to pixel positions of `image`."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _shear_x(image: Image.Image, level: float, generator: torch.Generator) -> Image.Image:
    return _warp(image, (1.0, _signed(0.3 * level, generator), 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Image.Image, level: float, generator: torch.Generator) -> Image.Image:
    return _warp(image, (1.0, 0.0, 0.0, _signed(0.3 * level, generator), 1.0, 0.0))


def _translate_x(image: Image.Image, level: float, generator: torch.Generator) -> Image.Image:
    return _warp(image, (1.0, 0.0, _signed(10 * level, generator), 0.0, 1.0, 0.0))


def _translate_y(image: Image.Image, level: float, generator: torch.Generator) -> Image.Image:
    return _warp(image, (1.0, 0.0, 0.0, 0.0, 1.0, _signed(10 * level, generator)))


def _rotate(image: Image.Image, level: float, generator: torch.Generator) -> Image.Image:
    return image.rotate(_signed(30 * level, generator), Image.Resampling.BILINEAR, fillcolor=GREY)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level, generator: image,
    "autocontrast": lambda image, level, generator: autocontrast(image),
    "brightness": lambda image, level, generator: ImageEnhance.Brightness(image).enhance(1.8 * level + 0.1),
    "sharpness": lambda image, level, generator: ImageEnhance.Sharpness(image).enhance(1.8 * level + 0.1),
    "equalize": lambda image, level, generator: ImageOps.equalize(image),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}
