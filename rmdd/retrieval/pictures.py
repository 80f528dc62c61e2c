"""Pictures to embed: files, folders, PIL images and arrays of pixels, prepared as the data of a model says.

S pixels per side.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rmdd.config import Data
from rmdd.data.decode import FORMATS, ImageError, as_rgb, squash
from rmdd.data.splits import squashed

BATCH = 64
"""Number of pictures that are decoded and embedded at once."""


def pictures_in(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders whose names end as picture files do, sorted by path.

    Raises `ValueError` if there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder with pictures")
    Image.init()
    endings = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not files:
        raise ValueError(f"no pictures in {folder} and its subfolders; picture files end in .jpg, .png, .webp or so")
    return files


def prepared(picture: Any, data: Data) -> UInt8[np.ndarray, "3 S S"]:
    """Return a picture as the pixels that an image tower sees. `picture` is a path, a PIL image or an array.

    An array has uint8 pixels of shape (H, W, 3) or (H, W). Raises `ValueError` for other arrays and for unusable files.
    """
    if isinstance(picture, str | Path):
        return squashed(Path(picture).read_bytes(), data)
    if not isinstance(picture, Image.Image):
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
            shown = f"{pixels.dtype} of shape {pixels.shape}"
            raise ValueError(f"an array of pixels must be uint8 of shape (H, W, 3), (H, W, 4) or (H, W); found {shown}")
        picture = Image.fromarray(pixels)
    return squash(as_rgb(picture, data), data.image_size)


def read(
    pictures: Sequence[Any], data: Data, on_unreadable: Callable[[int, Exception], object] | None = None
) -> Iterator[tuple[list[int], UInt8[np.ndarray, "n 3 S S"]]]:
    """Yield the numbers and the pixels of the pictures, in batches; several threads decode them.

    Without `on_unreadable`, a picture that cannot be read raises its error. Otherwise it is left out, and
    `on_unreadable` is called with its number and the error.
    """

    def attempt(number: int) -> tuple[int, np.ndarray | Exception]:
        try:
            return number, prepared(pictures[number], data)
        except (ImageError, OSError) as error:
            if isinstance(pictures[number], str | Path):
                error.add_note(f"while reading {pictures[number]}")
            return number, error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pictures), BATCH):
            numbers, batch = [], []
            for number, result in pool.map(attempt, range(start, min(start + BATCH, len(pictures)))):
                if not isinstance(result, Exception):
                    numbers.append(number)
                    batch.append(result)
                elif on_unreadable is None:
                    raise result
                else:
                    on_unreadable(number, result)
            if batch:
                yield numbers, np.stack(batch)
