"""Features of items: image and text embeddings by a fixed encoder, combined into one feature space.

    joint  normalise([normalise(u); normalise(v)])     squared distance = mean over image and text
    image  normalise(u)        text  normalise(v)
    sum    normalise(normalise(u) + normalise(v))

u is an image embedding, v a text embedding. Features are computed once and kept in the run's cache (file format:
`rmdd.coresets.rows`). N images, T captions, D features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from rmdd import config
from rmdd.core.arrays import write_array
from rmdd.core.files import write_json
from rmdd.coresets.choice import Choice, ChoiceUnit
from rmdd.coresets.draws import hashes
from rmdd.coresets.rows import DESCRIPTION, SCHEMA_VERSION, RowBlock, Rows
from rmdd.coresets.shard import MAX_SHOWN
from rmdd.data.captions import clean
from rmdd.data.splits import Split
from rmdd.execution.tasks import Stream, Values

BLOCK = 2048
"""Number of images in a block; a block is encoded by one task and stored in one file."""
BATCH = 256


@dataclass(frozen=True)
class Items:
    """The items to choose from. Item i has the image `image_of[i]` and stands for the caption record `record_of[i]`."""

    unit: ChoiceUnit
    image_of: Int64[np.ndarray, " items"]
    record_of: Int64[np.ndarray, " items"]

    @classmethod
    def of(cls, split: Split, unit: ChoiceUnit, seed: int) -> "Items":
        """Return the items of `split`: all caption records, or all images, each with one caption chosen by a hash."""
        if unit == "record":
            return cls(unit, split.image_of, np.arange(len(split.image_of)))
        numbers = np.arange(len(split))
        first, stop = np.searchsorted(split.image_of, [numbers, numbers + 1])
        drawn = hashes(numbers, seed, "coreset caption") % (stop - first).astype(np.uint64)
        return cls(unit, numbers, first + drawn.astype(np.int64))

    def __len__(self) -> int:
        return len(self.image_of)


@dataclass(frozen=True)
class Sides:
    """The unnormalised image features (N, ...) and text features (T, ...) from an encoder."""

    images: Rows
    texts: Rows
    split: Split

    def blocks(self, items: Items, caption: str) -> Iterator[tuple[Int64[np.ndarray, " n"], np.ndarray, np.ndarray]]:
        """Yield blocks of item ids, image features and text features; features are scaled to length 1.

        Raises `ValueError` when a pair has features that are zero or not finite.
        """
        split = self.split
        for start in range(0, len(items), BLOCK):
            ids = np.arange(start, min(start + BLOCK, len(items)))
            images = items.image_of[ids]
            low, high = int(images[0]), int(images[-1]) + 1
            u = unit(_read(self.images, low, high), split, np.arange(low, high), "image")[images - low]
            if items.unit == "record":
                yield ids, u, unit(_read(self.texts, start, start + len(ids)), split, images, "text")
                continue
            first, stop = np.searchsorted(split.image_of, [low, high])
            v = unit(_read(self.texts, int(first), int(stop)), split, split.image_of[first:stop], "text")
            if caption == "seeded":
                yield ids, u, v[items.record_of[ids] - first]
            else:
                begins = np.searchsorted(split.image_of[first:stop], images)
                yield ids, u, unit(np.add.reduceat(v, begins, axis=0), split, images, "mean text")


def cosines(sides: Sides, items: Items, caption: str) -> Float32[np.ndarray, " items"]:
    """Return the cosine of the image and text features of each item. Raises `ValueError` if their widths differ."""
    if sides.images.width != sides.texts.width:
        widths = f"{sides.images.width} and {sides.texts.width}"
        raise ValueError(f"no cosine of image and text features of widths {widths}; use columns:NAME or expert:N")
    return np.concatenate([np.vecdot(u, v) for _, u, v in sides.blocks(items, caption)])


def unit(rows: np.ndarray, split: Split, images: np.ndarray, side: str) -> Float32[np.ndarray, "n D"]:
    """Scale feature rows to unit length.

    Raises `ValueError` for rows that are zero or not finite; the message names `side` and the pairs of `images`.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    bad = ~np.isfinite(largest[:, 0]) | (largest[:, 0] == 0)
    if bad.any():
        named = list(dict.fromkeys(split.pair_ids[int(i)] for i in images[bad]))
        raise ValueError(
            f"{int(bad.sum())} {side} features are zero or not finite (first pairs: {', '.join(named[:MAX_SHOWN])}); "
            "remove these pairs from the dataset, or use another encoder"
        )
    rows = rows / largest  # scaled so that squares stay within the range of float32
    return rows / np.sqrt(np.vecdot(rows, rows))[:, None]


def _read(rows: Rows, start: int, stop: int) -> Float32[np.ndarray, "n D"]:
    return np.concatenate([x.copy() for _, x in rows.between(start, stop).chunks()])


def in_space(sides: Sides, items: Items, choice: Choice) -> Iterator[RowBlock]:
    """Yield blocks of item ids, and the items' features in the space `choice.space`."""
    for ids, u, v in sides.blocks(items, choice.caption):
        rows = _combined(choice.space, u, v)
        yield ids, unit(rows, sides.split, items.image_of[ids], choice.space) if choice.space == "sum" else rows


def _combined(space: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if space == "joint":
        return np.concatenate([u, v], axis=1) * np.float32(0.5**0.5)
    if space == "sum":
        if u.shape[1] != v.shape[1]:
            raise ValueError(
                f"space sum cannot add image features of width {u.shape[1]} to text features of width {v.shape[1]}; "
                "set space: joint, or an encoder with equal widths (expert:N, columns:NAME)"
            )
        return u + v
    return u if space == "image" else v


# -- features from an encoder, block by block -------------------------------------------------------------------------


def encode_blocks(
    folder: Path, count: int, make: Callable[[], Callable[[Values], Values]], identity: dict[str, Any], stream: Stream
) -> None:
    """Write `count` feature rows into `folder`, computed by the encoder that `make` returns; keep existing blocks.

    `stream` runs the encoder on the missing blocks; `identity` describes the encoder in `rows.json`.
    """
    if (folder / DESCRIPTION).is_file():
        return
    blocks = range(-(-count // BLOCK))
    missing: list[Values] = [{"block": b} for b in blocks if not (folder / _name(b)).is_file()]
    for _ in stream(make, missing) if missing else ():
        pass
    names = [_name(b) for b in blocks]
    width = np.load(folder / names[0], mmap_mode="r").shape[1]
    about = {"schema_version": SCHEMA_VERSION, "rows": count, "width": width, "dtype": "float32", "files": names}
    write_json(folder / DESCRIPTION, about | {"facts": identity})


def _name(block: int) -> str:
    return f"part-{block:05d}.npy"


def save_block(folder: Path, block: int, ids: np.ndarray, rows: np.ndarray) -> None:
    """Write a block of ids and rows. The file of the rows is written last; its existence marks a complete block."""
    name = _name(block)
    write_array(folder / name.replace(".npy", ".ids.npy"), ids.astype(np.int64))
    write_array(folder / name, rows)


# -- features from columns of the dataset -----------------------------------------------------------------------------


def column_rows(split: Split, data: config.Data, column: str) -> tuple[Iterator[RowBlock], int]:
    """Return the features in the dataset column `column` as blocks of rows, and the width of a row.

    The column holds a list of numbers per image, or one per caption; captions that are empty after cleaning are
    skipped. Raises `ValueError` when the column is missing, or its lists differ in length.
    """
    shards = [s for s in split.dataset.manifest["shards"] if s["split"] == split.name]
    blocks = _column_blocks(split, data, column, [split.dataset.path / s["file"] for s in shards])
    first = next(blocks)

    def all_blocks() -> Iterator[RowBlock]:
        yield first
        for ids, rows in blocks:
            if rows.shape[1] != first[1].shape[1]:
                raise _ragged(column)
            yield ids, rows

    return all_blocks(), first[1].shape[1]


def _column_blocks(split: Split, data: config.Data, column: str, files: list[Path]) -> Iterator[RowBlock]:
    of_image, count = column.startswith("image."), 0
    for path in files:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = [n for n in file.schema_arrow.names if n.startswith(("image.", "text."))]
                raise ValueError(
                    f"{path} has no column '{column}'; its feature columns are {', '.join(names) or 'none'}; write the "
                    "features into the shards, or set encoder: tower or expert:N"
                )
            for batch in file.iter_batches(batch_size=BLOCK, columns=["captions", column]):
                texts = batch.column("captions").to_pylist()
                usable = [[bool(clean(c, data.captions)) for c in captions] for captions in texts]
                flags = [any(k) for k in usable] if of_image else [flag for k in usable for flag in k]
                mask = np.array(flags, bool)
                rows = _matrix(batch.column(column), column, len(texts) if of_image else [len(k) for k in usable])[mask]
                if len(rows):
                    yield np.arange(count, count + len(rows)), rows
                    count += len(rows)


def _matrix(values: pa.Array, column: str, expected: int | list[int]) -> np.ndarray:
    """Convert a column of lists to an array (n, D), or a column of lists of lists to an array (captions, D).

    `expected` is the number of rows, or a list with the number of captions of each pair.
    """
    if not isinstance(expected, int):
        lengths = pc.list_value_length(values).fill_null(0).to_pylist()
        if lengths != expected:
            bad = next(i for i, (a, b) in enumerate(zip(lengths, expected, strict=True)) if a != b)
            raise ValueError(f"column '{column}' has {lengths[bad]} rows for a pair with {expected[bad]} captions")
        values = values.flatten()
        expected = sum(expected)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if not expected or len(flat) % expected or not len(flat):
        raise _ragged(column)
    width = len(flat) // expected
    if pc.any(pc.not_equal(pc.list_value_length(values), width)).as_py():
        raise _ragged(column)
    return flat.reshape(expected, width).astype(np.float32)


def _ragged(column: str) -> ValueError:
    return ValueError(f"the lists in column '{column}' differ in length; all must have the same length")
