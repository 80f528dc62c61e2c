"""One split in memory-mapped form: images squashed to the model's size, captions cleaned and flat.

N images, T captions, S pixels on a side. Everything slow is done once and kept in a cache whose file names are
hashes of what shaped them, so a cache can be shared by runs and deleted at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rmdd.config import Data, hash_value
from rmdd.data.captions import clean
from rmdd.data.decode import decode, squash
from rmdd.data.shards import Dataset
from rmdd.files import allocate, atomic_path


@dataclass(frozen=True)
class Split:
    name: str
    images: np.ndarray
    """uint8 (N, 3, S, S), read-only memory map."""
    captions: list[str]
    """Cleaned, those of image 0 first."""
    image_of: np.ndarray
    """int64 (T,): the image of each caption, ascending."""
    pair_ids: list[str]
    dropped: dict[str, int]
    """Captions that the caption rule emptied, and pairs that lost all of theirs that way."""
    _dataset: Dataset = field(repr=False)
    _rows: np.ndarray = field(repr=False)
    _encoded: Path = field(repr=False)

    def __len__(self) -> int:
        return len(self.pair_ids)

    def facts(self) -> dict[str, int]:
        """How big the split is as it is trained or scored on, and what the caption rule took from it."""
        return {"pairs": len(self), "captions": len(self.captions)} | {
            f"dropped_{k}": n for k, n in self.dropped.items()
        }

    def encoded(self, i: int) -> bytes:
        """Image `i` as it lies in the shard. The first call copies all of them to a random-access cache."""
        if "_bytes" not in self.__dict__:
            object.__setattr__(self, "_bytes", _encoded_cache(self._dataset, self.name, self._rows, self._encoded))
        data, offsets = self.__dict__["_bytes"]
        return data[offsets[i] : offsets[i + 1]].tobytes()


def load_split(dataset: Dataset, split: str, data: Data, cache: Path | str) -> Split:
    """Decode and squash a split once, then serve it from `cache`.

    `data.eval_limit` keeps the first pairs of val and test. Pairs without a caption after the caption rule are
    left out of every split and counted in `Split.dropped`. Safe to call from several processes at once.
    """
    limit = data.eval_limit if split != "train" else None
    rows: list[int] = []
    pair_ids: list[str] = []
    captions: list[str] = []
    image_of: list[int] = []
    dropped = {"captions": 0, "pairs": 0}
    for row, (pair_id, raw) in enumerate(dataset.columns(split, "pair_id", "captions")):
        if limit is not None and len(rows) == limit:
            break
        cleaned = [c for c in (clean(caption, data.captions) for caption in raw) if c]
        dropped["captions"] += len(raw) - len(cleaned)
        if not cleaned:
            dropped["pairs"] += 1
            continue
        captions += cleaned
        image_of += [len(rows)] * len(cleaned)
        rows.append(row)
        pair_ids.append(pair_id)

    kept = np.asarray(rows, dtype=np.int64)
    which = {"data": dataset.hash, "split": split, "rows": hash_value(rows)}
    pixels = which | {"size": data.image_size, "background": data.background, "exif": data.exif_orientation}
    images = _image_cache(dataset, split, kept, data, Path(cache) / f"{split}-{hash_value(pixels)}.npy")
    encoded = Path(cache) / f"{split}-{hash_value(which)}.bin"
    return Split(
        split, images, captions, np.asarray(image_of, dtype=np.int64), pair_ids, dropped, dataset, kept, encoded
    )


def _image_cache(dataset: Dataset, split: str, rows: np.ndarray, data: Data, path: Path) -> np.ndarray:
    shape = (len(rows), 3, data.image_size, data.image_size)
    if not len(rows):
        return np.zeros(shape, dtype=np.uint8)  # an empty file cannot be mapped
    if not path.is_file():
        with atomic_path(path) as temporary:
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            allocate(temporary)
            for i, image in enumerate(_encoded_images(dataset, split, rows)):
                picture = decode(
                    image,
                    max_pixels=data.max_pixels,
                    background=data.background,
                    exif_orientation=data.exif_orientation,
                )
                images[i] = squash(picture, data.image_size)
            images.flush()
            del images
    return np.load(path, mmap_mode="r")


def _encoded_cache(dataset: Dataset, split: str, rows: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All encoded images end to end, and the N+1 offsets between them; the offsets are written last.

    Processes that build it side by side write the same bytes under names of their own and rename them: whichever is
    last, every reader sees a whole file.
    """
    offsets = path.with_suffix(".offsets.npy")
    if not offsets.is_file() or not path.is_file():
        ends = [0]
        with atomic_path(path) as temporary, open(temporary, "wb") as f:
            for image in _encoded_images(dataset, split, rows):
                f.write(image)
                ends.append(ends[-1] + len(image))
        with atomic_path(offsets) as temporary, open(temporary, "wb") as f:
            np.save(f, np.asarray(ends, dtype=np.int64))
    return np.memmap(path, dtype=np.uint8, mode="r"), np.load(offsets)


def _encoded_images(dataset: Dataset, split: str, rows: Sequence[int] | np.ndarray) -> Iterator[bytes]:
    wanted = iter(rows)
    row = next(wanted, None)
    for i, (image,) in enumerate(dataset.columns(split, "image")):
        if row is None:
            return
        if i == row:
            yield image
            row = next(wanted, None)
