"""Image augmentations for training students; they draw all random numbers from the generator `random`.

`dsa` is the transform of Siamese augmentation (arXiv 2102.08259) as the released code applies it to students. For each
batch it draws one transform (colour, crop, cutout, flip, scale or rotate), and for each image its strength.
`randaugment` is the training transform of the experts (`rmdd.data.augment`) at its published strength; it works on
8-bit images.

In shapes, N is the number of images in a batch and H x W their size in pixels.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rmdd.config import Augment
from rmdd.data.augment import augment
from rmdd.data.images import denormalise, normalise

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""A function that takes normalised images and a random generator and returns augmented images of the same shape."""

SCALE, DEGREES, SHIFT, CUT = 1.2, 15.0, 0.125, 0.5
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5


def augmentation(name: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Augmentation:
    """Return the augmentation called `name`; randaugment needs the pixel mean and std of the normalisation."""
    if name == "dsa":
        return dsa
    if name != "randaugment":
        raise ValueError(f"unknown augmentation '{name}'; available: dsa, randaugment")
    if mean is None or std is None:
        raise ValueError("randaugment works on 8-bit images; give the mean and std with which they were normalised")
    shift, scale = mean, std

    def randaugment(images: Tensor, random: torch.Generator) -> Tensor:
        size = images.shape[-1]
        pixels = denormalise(images, shift, scale).permute(0, 2, 3, 1).cpu().numpy()
        views = [torch.from_numpy(augment(Image.fromarray(p), Augment(), size, random)) for p in pixels]
        return normalise(torch.stack(views), shift, scale).to(images)

    return randaugment


def dsa(images: Float[Tensor, "N 3 H W"], random: torch.Generator) -> Float[Tensor, "N 3 H W"]:
    """Apply one random transform of `FAMILIES` to normalised images; pixels from outside an image are 0 (the mean)."""
    name = list(FAMILIES)[int(torch.randint(len(FAMILIES), (), generator=random))]
    return FAMILIES[name](images, random)


def _uniform(images: Tensor, random: torch.Generator, low: float, high: float) -> Float[Tensor, "N 1 1 1"]:
    drawn = torch.rand(len(images), 1, 1, 1, generator=random, dtype=torch.float64)
    return (low + (high - low) * drawn).to(images)


def _colour(images: Tensor, random: torch.Generator) -> Tensor:
    images = images + _uniform(images, random, -BRIGHTNESS / 2, BRIGHTNESS / 2)
    grey = images.mean(1, keepdim=True)
    images = grey + _uniform(images, random, 0.0, SATURATION) * (images - grey)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + _uniform(images, random, CONTRAST, 1 + CONTRAST) * (images - level)


def _crop(images: Tensor, random: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side length, horizontally and vertically."""
    height, width = images.shape[2:]
    down, right = int(height * SHIFT + 0.5), int(width * SHIFT + 0.5)
    padded = F.pad(images, (right, right, down, down))
    tops = torch.randint(2 * down + 1, (len(images),), generator=random).tolist()
    lefts = torch.randint(2 * right + 1, (len(images),), generator=random).tolist()
    views = [p[:, t : t + height, x : x + width] for p, t, x in zip(padded, tops, lefts, strict=True)]
    return torch.stack(views)


def _cutout(images: Tensor, random: torch.Generator) -> Tensor:
    """Set a random square of each image to 0; its side is half the image side, and it may extend beyond the image."""
    height, width = images.shape[2:]
    cut_h, cut_w = int(height * CUT + 0.5), int(width * CUT + 0.5)
    rows = torch.randint(height + 1 - cut_h % 2, (len(images), 1), generator=random) - cut_h // 2
    columns = torch.randint(width + 1 - cut_w % 2, (len(images), 1), generator=random) - cut_w // 2
    y, x = torch.arange(height)[None], torch.arange(width)[None]
    inside_y, inside_x = (y >= rows) & (y < rows + cut_h), (x >= columns) & (x < columns + cut_w)
    return images * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :]).to(images.device)


def _flip(images: Tensor, random: torch.Generator) -> Tensor:
    return torch.where(_uniform(images, random, 0.0, 1.0) < 0.5, images.flip(3), images)


def _scale(images: Tensor, random: torch.Generator) -> Tensor:
    across = _uniform(images, random, 1 / SCALE, SCALE).flatten()
    along = _uniform(images, random, 1 / SCALE, SCALE).flatten()
    zero = torch.zeros_like(across)
    return _warped(images, across, zero, zero, along)


def _rotate(images: Tensor, random: torch.Generator) -> Tensor:
    angle = _uniform(images, random, -DEGREES, DEGREES).flatten() * math.pi / 180
    return _warped(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _warped(images: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    zero = torch.zeros_like(a)
    matrix = torch.stack([a, b, zero, c, d, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


FAMILIES: dict[str, Augmentation] = {
    "colour": _colour,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
