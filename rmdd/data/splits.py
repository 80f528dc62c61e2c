"""A split (train, val or test) of a dataset, ready for training: cleaned captions, and images resized for the model.

Shapes: N images of S x S pixels, T captions. Decoding and resizing happen once, at the first access to the images, and
the result is kept in a cache on disk. The names of cache files are hashes of everything that determines their content,
so runs can share a cache, and deleting a cache is always safe.
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
from rmdd.data.captions import clean, drawn_rows
from rmdd.data.decode import decode_as, squash
from rmdd.data.shards import Dataset


@dataclass(frozen=True)
class DecodedImages:
    """The decoded images of a split in one cache file; the first call of `open` writes the file."""

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
            return np.zeros(self.shape, dtype=np.uint8)  # numpy cannot memory-map an empty file
        if not self.written:
            with hold_folder(self.path.with_suffix(""), wait=True):
                if not self.written:
                    self._write()
        images: np.ndarray = np.load(self.path, mmap_mode="r")
        return images

    def _write(self) -> None:
        with mapped_array(self.path, self.shape, np.uint8) as images:
            for i, (_, image) in enumerate(read_rows(self.dataset, self.split, self.rows)):
                images[i] = squashed(image, self.data)

    def decode(self, index: np.ndarray) -> np.ndarray:
        """Decode the images with the indices `index` directly from the shards, without the cache file."""
        wanted = self.rows[index]
        decoded = {row: squashed(image, self.data) for row, image in read_rows(self.dataset, self.split, wanted)}
        return np.stack([decoded[int(row)] for row in wanted])


@dataclass(frozen=True)
class Split:
    name: str
    pixels: np.ndarray | DecodedImages = field(repr=False)
    """The decoded images in memory, or the cache file that holds them."""
    captions: list[str]
    """The T cleaned captions; captions of the same image are consecutive."""
    image_of: np.ndarray
    """int64 (T,): the index of the image of each caption, in ascending order."""
    pair_ids: list[str]
    dropped: dict[str, int]
    """Number of dropped `captions` (empty after cleaning), and of dropped `pairs` (without any caption left)."""
    dataset: Dataset = field(repr=False)
    rows: np.ndarray = field(repr=False)
    """int64 (N,): for each image, the position of the image's row among all rows of this split in the shards."""
    _encoded: Path = field(repr=False)

    def __len__(self) -> int:
        return len(self.pair_ids)

    @functools.cached_property
    def images(self) -> np.ndarray:
        """All images as uint8 (N, 3, S, S), a read-only memory map of the cache; the first access decodes them."""
        return self.pixels if isinstance(self.pixels, np.ndarray) else self.pixels.open()

    def some_images(self, index: np.ndarray) -> np.ndarray:
        """Return the images at positions `index` as uint8 (n, 3, S, S); if there is no cache, decode only these."""
        if isinstance(self.pixels, np.ndarray) or self.pixels.written:
            chosen: np.ndarray = self.images[index]
            return chosen
        return self.pixels.decode(np.asarray(index))

    @property
    def cached_files(self) -> list[Path]:
        """The files in which the decoded and the encoded images are kept between runs; each may be missing."""
        decoded = [] if isinstance(self.pixels, np.ndarray) else [self.pixels.path]
        return [*decoded, self._encoded, _offsets(self._encoded)]

    def cache_bytes(self, encoded: bool) -> int:
        """Return the bytes in the cache of decoded images. If `encoded`, return an estimate for encoded images instead.

        The size is 0 for images in memory, which need no cache.
        """
        if isinstance(self.pixels, np.ndarray):
            return 0
        if encoded:
            return sum(shard["bytes"] for shard in self.dataset.manifest["shards"] if shard["split"] == self.name)
        return int(np.prod(self.pixels.shape))

    def facts(self) -> dict[str, int]:
        """Return how many pairs and captions this split has, and how many caption cleaning removed."""
        return {"pairs": len(self), "captions": len(self.captions)} | {
            f"dropped_{k}": n for k, n in self.dropped.items()
        }

    def encoded(self, i: int) -> bytes:
        """Return the encoded bytes of image `i`; the first call copies all encoded images to a random-access cache."""
        if "_bytes" not in self.__dict__:
            object.__setattr__(self, "_bytes", _encoded_cache(self.dataset, self.name, self.rows, self._encoded))
        data, offsets = self.__dict__["_bytes"]
        return bytes(data[offsets[i] : offsets[i + 1]])


def load_split(dataset: Dataset, split: str, data: Data, cache: Path | str) -> Split:
    """Load the cleaned captions of a split; its images are decoded at the first access and kept in the folder `cache`.

    `data.eval_limit` limits val and test to their first pairs; `data.train_limit` limits train to drawn pairs.
    Pairs without a caption after cleaning are dropped from every split and counted in `Split.dropped`. Several
    processes may call this function at the same time.
    """
    limit, drawn = data.limit_of(split), drawn_rows(dataset, split, data)
    rows: list[int] = []
    pair_ids: list[str] = []
    captions: list[str] = []
    image_of: list[int] = []
    dropped = {"captions": 0, "pairs": 0}
    for row, (pair_id, raw) in enumerate(dataset.columns(split, "pair_id", "captions")):
        if limit is not None and len(rows) == limit:
            break
        if drawn is not None and row not in drawn:
            continue
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
    row_key = {"data": dataset.hash, "split": split, "rows": hash_value(rows)}
    pixel_key = row_key | {"size": data.image_size, "background": data.background, "exif": data.exif_orientation}
    images = DecodedImages(dataset, split, row_numbers, data, Path(cache) / f"{split}-{hash_value(pixel_key)}.npy")
    encoded = Path(cache) / f"{split}-{hash_value(row_key)}.bin"
    return Split(
        split, images, captions, np.asarray(image_of, dtype=np.int64), pair_ids, dropped, dataset, row_numbers, encoded
    )


def squashed(image: bytes, data: Data) -> np.ndarray:
    """Decode an image file and resize it to `data.image_size`; return it as uint8 (3, S, S)."""
    return squash(decode_as(image, data), data.image_size)


def _offsets(path: Path) -> Path:
    return path.with_suffix(".offsets.npy")


def _encoded_cache(dataset: Dataset, split: str, rows: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the encoded images as one array of bytes, and the N+1 offsets of the images in it.

    Both results are cache files, written if missing. The file of offsets is written last, so it marks a complete cache.
    """
    offsets = _offsets(path)
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
    """Yield (row number, encoded image) for the rows of a split with numbers in `rows`; each once, in ascending order.

    Only the Parquet row groups that contain these rows are read from disk.
    """
    wanted, first = np.unique(rows), 0
    for shard in dataset.manifest["shards"]:
        if shard["split"] != split:
            continue
        in_shard = _between(wanted, first, first + shard["rows"])
        if len(in_shard):
            with pq.ParquetFile(dataset.path / shard["file"]) as file:
                start = first
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    if len(in_group := _between(in_shard, start, stop)):
                        column = file.read_row_group(group, columns=["image"]).column("image")
                        yield from ((int(row), column[int(row) - start].as_py()) for row in in_group)
                    start = stop
        first += shard["rows"]


def _between(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return those of the ascending row numbers `rows` that are at least `start` and below `stop`."""
    low, high = np.searchsorted(rows, [start, stop])
    return rows[low:high]
