"""Decoding of image files to RGB pixels. This module does not import torch, so ingest workers start fast."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rmdd.config import Data

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Image formats that are decoded, whatever their file extension. EPS is left out because it needs Ghostscript.

MPO files (two images of a camera) are opened as JPEG. A name that Pillow does not know must not stand here, because
Pillow then stops with a `KeyError` before it tries the formats after it.
"""

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
"""Names by which a HEIC file says what it is, in its first bytes."""
_ORIENTATION = 0x0112
"""Number of the EXIF tag that says how to rotate an image; 1 is upright."""

_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class ImageError(ValueError):
    """Error for an unusable image; `reason` is the quarantine reason in one word, such as too_large or undecodable."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode(
    data: bytes, *, max_pixels: int, background: tuple[int, int, int], exif_orientation: bool = True
) -> Image.Image:
    """Decode an image file to RGB pixels; of an animation, decode the first frame.

    Transparent pixels are blended with the colour `background`; 16-bit greyscale is scaled to 8 bits. Raises
    `ImageError` for an image that cannot be decoded or has more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about image size and metadata; the size is checked below
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                detail = f"{image.width} x {image.height} pixels exceed data.max_pixels {max_pixels}"
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
    except Exception as error:  # PIL raises many exception types for broken files, such as struct.error
        detail = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            if data[4:8] == b"ftyp" and any(name in data[8:64] for name in _HEIC):
                advice = "HEIC image; Pillow, which rmdd decodes images with, cannot read HEIC: convert it to JPEG"
                raise ImageError("unsupported", advice) from None
            detail = f"{len(data)} bytes of unknown image format" + (f" that begin with {data[:12]!r}" if data else "")
        raise ImageError("truncated" if "truncated" in detail.lower() else "undecodable", detail[:200]) from None


def is_rotated(image: bytes) -> bool:
    """Return whether the EXIF data of an image file say that its pixels must be rotated or mirrored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(image), formats=FORMATS).getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # `decode` has a message for broken files
        return False


def decode_as(image: bytes, data: Data) -> Image.Image:
    """Decode an image file with the options of `data` for the maximum size, the background and the EXIF orientation."""
    return decode(image, max_pixels=data.max_pixels, background=data.background, exif_orientation=data.exif_orientation)


def as_rgb(image: Image.Image, data: Data) -> Image.Image:
    """Convert an image in memory to RGB pixels, with the EXIF orientation and the background that `data` says."""
    return _rgb(ImageOps.exif_transpose(image) if data.exif_orientation else image, data.background)


def squash(image: Image.Image, size: int) -> np.ndarray:
    """Resize an RGB image to `size` x `size` (bicubic, aspect ratio not preserved); return uint8 (3, size, size)."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    if image.mode.startswith("I"):  # PIL would clip 16-bit values at 255, which turns most of the image white
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    return image.convert("RGB")
