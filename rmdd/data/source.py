"""The interface of data sources: the two kinds of source, and the rows that they yield.

An `AnnotationSource` reads lists that name images and captions, and does not open images. A `SampleSource` lists files
that contain images and captions together; ingest workers read these files. Each data source is one file in
`rmdd.data.sources`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rmdd.config import Data
from rmdd.data.counts import IngestCounts
from rmdd.data.decode import ImageError
from rmdd.data.inputs import InputPath, find, input_path

NO_SPLIT = "none"

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
}
"""The splits by the names that published datasets give them; `data.splits.names` adds further names."""


@dataclass(frozen=True)
class AnnotationRow:
    """One row of an annotation file. `image` and `captions` can be any JSON values, because they are checked later."""

    image: Any
    """Path of the image relative to `data.root`, or the name of an image that the source draws."""
    captions: tuple[Any, ...]
    split: str | None
    """The split's name in the source, such as train or validation; None if the source names no splits; NO_SPLIT if it
    should name one but does not."""
    source: str
    origin: str
    """Position of the row in the annotation file, such as `captions.csv line 12`."""
    drawing: str | None = None
    """Description, as a JSON string, of an image that the source draws; None if the image is read from a file."""


def as_captions(value: Any) -> tuple[Any, ...]:
    """Return a tuple of captions from a value that is either one caption or a list of captions."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True)
class Candidate:
    """An input row with checked captions and the image bytes. It becomes a pair of the dataset if the image decodes."""

    pair_id: str
    captions: tuple[str, ...]
    split: str | None
    """The split's name in the source, as in `AnnotationRow`."""
    source: str
    origin: str
    image: bytes | ImageError = field(repr=False)


def hash_split(path: str, fractions: tuple[float, float, float]) -> str:
    """Choose the split of an image by a hash of the image's path only, so the split does not depend on other images."""
    share = hash_position(path)
    return "train" if share < fractions[0] else "val" if share < fractions[0] + fractions[1] else "test"


def hash_position(key: str) -> float:
    """Return a number from 0 to 1 that is uniformly distributed over keys, such as the paths of images."""
    return int.from_bytes(hashlib.sha256(f"rmdd split/{key}".encode()).digest()[:8], "big") / 2**64


def named_split(path: str, names: Iterable[str] = ()) -> str | None:
    """Return the split named in a file name such as `test-0.parquet`, or in the nearest folder that names one.

    Names in `SPLIT_NAMES` are known, and returned as train, val or test; those in `names` are returned as they are.
    """
    known = SPLIT_NAMES | {name: name for name in names}
    for name in reversed(path.split("/")):
        words = [known[word] for word in re.split(r"[^a-z]+", name.lower()) if word in known]
        if words:
            return words[0]
    return None


def sample_files(data: Data, source: Literal["parquet", "webdataset"]) -> list[tuple[str, int, str | None]]:
    """Return (path relative to `data.root`, size in bytes, split) of each file that matches `data.SOURCE.files`."""
    root, rule = input_path(data.root), getattr(data, source)
    if not (paths := find(root, rule.files)):
        raise ValueError(f"no file under {root} matches data.{source}.files '{rule.files}'; correct the pattern")
    names = data.splits.names
    return [(path, size, named_split(path, names) if rule.split_by_name else None) for path, size in paths]


@dataclass(frozen=True)
class AnnotationSource:
    """A data source that reads lists of image names and captions."""

    rows: Callable[[Data], tuple[Iterator[AnnotationRow], list[InputPath]]]
    """Function that returns the rows in file order, and the annotation files; `ValueError` if one is unreadable."""
    draw: Callable[[InputPath, str], bytes] | None = None
    """Function of `data.root` and `AnnotationRow.drawing` that returns an image file; None if no image is drawn."""
    cut_by_hash: bool = False
    """Whether some rows have no split in the input; a hash and `data.split_fractions` then choose the split."""
    without_list: bool = False
    """Whether rows can come from the names of image files, or from files beside them, instead of annotation files."""


@dataclass(frozen=True)
class SampleSource:
    """A data source that reads files in which images and captions are stored together."""

    files: Callable[[Data], list[tuple[str, int, str | None]]]
    """Function that returns, for each file, (path relative to `data.root`, size in bytes, split or None if unknown)."""
    candidates: Callable[[str, tuple[int, int], str | None, Data, IngestCounts], Iterator[Candidate]]
    """Function of (file, range, split, data, counts) that yields the usable rows and adds all rows to `counts`."""
    ranges: Callable[[list[str], Data], list[list[tuple[int, int]]]] = lambda files, data: [[(0, 0)]] * len(files)
    """Function that returns for each file the ranges to read, such as row groups; (0, 0) is the entire file."""
    rows: Callable[[list[tuple[str, int, str | None]], Data], Iterator[AnnotationRow] | None] = lambda files, data: None
    """Function that returns the rows of files that list the paths of images; None if the files contain images."""
