"""Data sources: the two kinds of source, and the rows that they yield.

An `AnnotationSource` reads lists that name images and captions, and opens no image. A `SampleSource` lists files that
contain images and captions together; workers read them. Each source is one file in `rmdd.data.sources`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
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
    "test": "test",
}


@dataclass(frozen=True)
class AnnotationRow:
    """One row of an annotation file. `image` and `captions` are the values in the file, unchecked."""

    image: Any
    """Path relative to `data.root`, or the name of a drawn image."""
    captions: tuple[Any, ...]
    split: str | None
    """train, val or test. None: the split is chosen by a hash of the path. NO_SPLIT: no split lists this row."""
    source: str
    origin: str
    """Position in the annotation file, such as `captions.csv line 12`."""
    drawing: str | None = None
    """JSON description of an image that is drawn instead of read from a file."""


def as_captions(value: Any) -> tuple[Any, ...]:
    """Return a tuple of captions from a value that is either one caption or a list of captions."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True)
class Candidate:
    """A row with checked captions, which becomes a pair if its image can be decoded."""

    pair_id: str
    captions: tuple[str, ...]
    split: str
    source: str
    origin: str
    image: bytes | ImageError = field(repr=False)


def hash_split(path: str, fractions: tuple[float, float, float]) -> str:
    """Choose the split of an image by a hash of its path, so adding or removing other images does not change it."""
    share = int.from_bytes(hashlib.sha256(f"rmdd split/{path}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < fractions[0] else "val" if share < fractions[0] + fractions[1] else "test"


def named_split(path: str) -> str | None:
    """Return the split in a file name, such as `test-00000.parquet`, or in the nearest folder, such as `val/0.tar`."""
    for name in reversed(path.split("/")):
        words = [SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_NAMES]
        if words:
            return words[0]
    return None


def sample_files(data: Data, source: Literal["parquet", "webdataset"]) -> list[tuple[str, int, str | None]]:
    """Return the path relative to `data.root`, size in bytes and split of each file in `data.<source>.files`."""
    root, rule = input_path(data.root), getattr(data, source)
    if not (paths := find(root, rule.files)):
        raise ValueError(f"no file under {root} matches data.{source}.files '{rule.files}'; correct one of them")
    return [(path, size, named_split(path) if rule.split_by_name else None) for path, size in paths]


@dataclass(frozen=True)
class AnnotationSource:
    """A source that reads lists of image names and captions."""

    rows: Callable[[Data], tuple[Iterator[AnnotationRow], list[InputPath]]]
    """Returns the rows in file order, and the files that they come from. Raises `ValueError` for an unreadable file."""
    draw: Callable[[InputPath, str], bytes] | None = None
    """Draws an image from `data.root` and `AnnotationRow.drawing`, and returns its bytes. None: no row needs it."""
    cut_by_hash: bool = False
    """Whether the split of some rows is chosen by a hash and `data.split_fractions`."""
    without_list: bool = False
    """Whether rows come from file names instead of a list."""


@dataclass(frozen=True)
class SampleSource:
    """A source that reads files in which images and captions are stored together."""

    files: Callable[[Data], list[tuple[str, int, str | None]]]
    """Returns the path relative to `data.root`, size in bytes and split (None: not in its name) of each file."""
    candidates: Callable[[str, tuple[int, int], str | None, Data, IngestCounts], Iterator[Candidate]]
    """Called with file, range, split, data and counts. Yields the pairs in that range; counts the rejected rows."""
    ranges: Callable[[list[str], Data], list[list[tuple[int, int]]]] = lambda files, data: [[(0, 0)]] * len(files)
    """Returns the ranges in which each file is read, such as row groups. (0, 0): the entire file."""
