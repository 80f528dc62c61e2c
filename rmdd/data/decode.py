"""Encoded bytes to RGB pixels. Free of torch, so that ingest workers start fast and stay small."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from rmdd.config import Data

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
"""What is tried on the bytes, whatever the file is called; leaves out formats that run other programs (EPS)."""

_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class ImageError(ValueError):
    """An image that cannot be used; `reason` is one word: too_large, truncated or undecodable."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode(
    data: bytes, *, max_pixels: int, background: tuple[int, int, int], exif_orientation: bool = False
) -> Image.Image:
    """Decode all pixels to an RGB image, transparent ones over `background`; the first frame of an animation.

    16-bit greyscale is scaled to 8 bits. Raises `ImageError`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's advice on size and metadata; the size is checked below
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                detail = f"{image.width} x {image.height} pixels are more than data.max_pixels {max_pixels}"
                raise ImageError("too_large", detail)
            image.load()
            if exif_orientation:
                image = ImageOps.exif_transpose(image)
            return _rgb(image, background)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError("too_large", f"more than {limit} pixels, PIL's own limit") from None
    except Exception as error:  # broken bytes make PIL raise nearly anything: OSError, SyntaxError, struct.error ...
        detail = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            detail = f"{len(data)} bytes in no known image format"
        raise ImageError("truncated" if "truncated" in detail.lower() else "undecodable", detail[:200]) from None


def decode_as(image: bytes, data: Data) -> Image.Image:
    """`decode` with the settings of a run."""
    return decode(image, max_pixels=data.max_pixels, background=data.background, exif_orientation=data.exif_orientation)


def squash(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image resized to `size` x `size` (bicubic, aspect ratio not kept) as uint8 (3, size, size)."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    if image.mode.startswith("I"):  # PIL's own conversion clips 16 bits at 255: nearly all white
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    return image.convert("RGB")
