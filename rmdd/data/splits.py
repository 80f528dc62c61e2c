"""One split in memory-mapped form: images squashed to the model's size, captions cleaned and flat.

N images, T captions, S pixels on a side. Everything slow is done once, when it is first asked for, and kept in a cache
whose file names are hashes of what shaped them, so a cache can be shared by runs and deleted at any time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rmdd.config import Data, hash_value
from rmdd.core.arrays import mapped_array, write_array
from rmdd.core.files import atomic_path
from rmdd.core.locks import hold_folder
from rmdd.data.captions import clean
from rmdd.data.decode import decode_as, squash
from rmdd.data.shards import Dataset


@dataclass(frozen=True)
class Decoded:
    """The decoded images of a split: one file, written by whoever opens it first."""

    dataset: Dataset = field(repr=False)
    split: str
    rows: np.ndarray = field(repr=False)
    data: Data
    path: Path

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), 3, self.data.image_size, self.data.image_size)

    @property
    def written(self) -> bool:
        return self.path.is_file()

    def open(self) -> np.ndarray:
        if not len(self.rows):
            return np.zeros(self.shape, dtype=np.uint8)  # an empty file cannot be mapped
        if not self.written:
            with hold_folder(self.path.with_suffix(""), wait=True):
                if not self.written:
                    self._write()
        return np.load(self.path, mmap_mode="r")

    def _write(self) -> None:
        with mapped_array(self.path, self.shape, np.uint8) as images:
            for i, (_, image) in enumerate(read_rows(self.dataset, self.split, self.rows)):
                images[i] = squashed(image, self.data)

    def some(self, index: np.ndarray) -> np.ndarray:
        """Images `index` without the file."""
        read = {row: squashed(image, self.data) for row, image in read_rows(self.dataset, self.split, self.rows[index])}
        return np.stack([read[int(row)] for row in self.rows[index]])


@dataclass(frozen=True)
class Split:
    name: str
    pixels: np.ndarray | Decoded = field(repr=False)
    """Where `images` come from."""
    captions: list[str]
    """Cleaned, those of image 0 first."""
    image_of: np.ndarray
    """int64 (T,): the image of each caption, ascending."""
    pair_ids: list[str]
    dropped: dict[str, int]
    """Captions that the caption rule emptied, and pairs that lost all of theirs that way."""
    dataset: Dataset = field(repr=False)
    rows: np.ndarray = field(repr=False)
    """int64 (N,): the row of each image in the split's shards."""
    _encoded: Path = field(repr=False)

    def __len__(self) -> int:
        return len(self.pair_ids)

    @functools.cached_property
    def images(self) -> np.ndarray:
        """uint8 (N, 3, S, S), read-only memory map; decodes all of them if that was not done before."""
        return self.pixels if isinstance(self.pixels, np.ndarray) else self.pixels.open()

    def some_images(self, index: np.ndarray) -> np.ndarray:
        """uint8 (n, 3, S, S): images `index`; decodes no other where there is no cache."""
        if isinstance(self.pixels, np.ndarray) or self.pixels.written:
            return self.images[index]
        return self.pixels.some(np.asarray(index))

    def cache_bytes(self, encoded: bool) -> int:
        """Size of the cache of decoded images, or about that of encoded ones; 0 for images that lie in memory."""
        if isinstance(self.pixels, np.ndarray):
            return 0
        if encoded:
            return sum(shard["bytes"] for shard in self.dataset.manifest["shards"] if shard["split"] == self.name)
        return int(np.prod(self.pixels.shape))

    def facts(self) -> dict[str, int]:
        """How big the split is as it is trained or scored on, and what the caption rule took from it."""
        return {"pairs": len(self), "captions": len(self.captions)} | {
            f"dropped_{k}": n for k, n in self.dropped.items()
        }

    def encoded(self, i: int) -> bytes:
        """Image `i` as it lies in the shard. The first call copies all of them to a random-access cache."""
        if "_bytes" not in self.__dict__:
            object.__setattr__(self, "_bytes", _encoded_cache(self.dataset, self.name, self.rows, self._encoded))
        data, offsets = self.__dict__["_bytes"]
        return data[offsets[i] : offsets[i + 1]].tobytes()


def load_split(dataset: Dataset, split: str, data: Data, cache: Path | str) -> Split:
    """The captions of a split, and its images, decoded and squashed once and then served from `cache`.

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

    row_numbers = np.asarray(rows, dtype=np.int64)
    which = {"data": dataset.hash, "split": split, "rows": hash_value(rows)}
    pixels = which | {"size": data.image_size, "background": data.background, "exif": data.exif_orientation}
    images = Decoded(dataset, split, row_numbers, data, Path(cache) / f"{split}-{hash_value(pixels)}.npy")
    encoded = Path(cache) / f"{split}-{hash_value(which)}.bin"
    return Split(
        split, images, captions, np.asarray(image_of, dtype=np.int64), pair_ids, dropped, dataset, row_numbers, encoded
    )


def squashed(image: bytes, data: Data) -> np.ndarray:
    """An encoded image as uint8 (3, S, S)."""
    return squash(decode_as(image, data), data.image_size)


def _encoded_cache(dataset: Dataset, split: str, rows: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All encoded images end to end, and the N+1 offsets between them; the offsets are written last."""
    offsets = path.with_suffix(".offsets.npy")
    if not (offsets.is_file() and path.is_file()):
        with hold_folder(path.with_suffix(""), wait=True):
            if not (offsets.is_file() and path.is_file()):
                ends = [0]
                with atomic_path(path) as temporary, open(temporary, "wb") as f:
                    for _, image in read_rows(dataset, split, rows):
                        f.write(image)
                        ends.append(ends[-1] + len(image))
                write_array(offsets, np.asarray(ends, dtype=np.int64))
    return np.memmap(path, dtype=np.uint8, mode="r"), np.load(offsets)


def read_rows(dataset: Dataset, split: str, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """(row, encoded image) for the given rows of a split, ascending, each once; reads only their row groups."""
    wanted, first = np.unique(rows), 0
    for shard in dataset.manifest["shards"]:
        if shard["split"] != split:
            continue
        here = _between(wanted, first, first + shard["rows"])
        if len(here):
            with pq.ParquetFile(dataset.path / shard["file"]) as file:
                start = first
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    if len(mine := _between(here, start, stop)):
                        column = file.read_row_group(group, columns=["image"]).column("image")
                        yield from ((int(row), column[int(row) - start].as_py()) for row in mine)
                    start = stop
        first += shard["rows"]


def _between(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Of ascending rows those in [start, stop)."""
    low, high = np.searchsorted(rows, [start, stop])
    return rows[low:high]
