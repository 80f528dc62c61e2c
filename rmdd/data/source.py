"""What a source of pairs is, and what it yields.

A source of annotations turns lists into rows and opens no picture. A source of samples lists files that hold pictures
and captions together, and workers read them. Each source is one file in `rmdd.data.sources`.
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
    """`image` and `captions` are unchecked: whatever stood in the file."""

    image: Any
    """Path relative to `data.root`; for a drawn picture its name."""
    captions: tuple[Any, ...]
    split: str | None
    """train, val or test; None: to be cut by a hash of the path; NO_SPLIT: the files list it in no split."""
    source: str
    origin: str
    """Where it stands, such as `captions.csv line 12`."""
    drawing: str | None = None
    """JSON of a picture that is drawn instead of read."""


def as_captions(value: Any) -> tuple[Any, ...]:
    """Loaders meet both a caption and a list of captions under one key."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True)
class Candidate:
    """What becomes a pair when its image can be decoded. Captions are checked."""

    pair_id: str
    captions: tuple[str, ...]
    split: str
    source: str
    origin: str
    image: bytes | ImageError = field(repr=False)


def hash_split(path: str, fractions: tuple[float, float, float]) -> str:
    """Split of an image by a hash of its path: it stays whatever is added or removed beside it."""
    share = int.from_bytes(hashlib.sha256(f"rmdd split/{path}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < fractions[0] else "val" if share < fractions[0] + fractions[1] else "test"


def named_split(path: str) -> str | None:
    """Split that a file's name says, else the nearest folder that says one: `val/0.tar`, `test-00000.parquet`."""
    for name in reversed(path.split("/")):
        words = [SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_NAMES]
        if words:
            return words[0]
    return None


def sample_files(data: Data, source: Literal["parquet", "webdataset"]) -> list[tuple[str, int, str | None]]:
    """Path below the root, size and split of every file that `data.<source>.files` names."""
    root, rule = input_path(data.root), getattr(data, source)
    if not (paths := find(root, rule.files)):
        raise ValueError(f"no file under {root} matches data.{source}.files '{rule.files}'; correct one of them")
    return [(path, size, named_split(path) if rule.split_by_name else None) for path, size in paths]


@dataclass(frozen=True)
class AnnotationSource:
    """Lists that name pictures and say their captions."""

    rows: Callable[[Data], tuple[Iterator[AnnotationRow], list[InputPath]]]
    """The rows in file order, and the files that they come from. Raises `ValueError` for what cannot be read."""
    draw: Callable[[InputPath, str], bytes] | None = None
    """The bytes of a picture from `data.root` and `AnnotationRow.drawing`, for rows that have one."""
    cut_by_hash: bool = False
    """Whether `data.split_fractions` decides the split of some rows."""
    without_list: bool = False
    """Whether rows come from the names of files, which no list holds."""


@dataclass(frozen=True)
class SampleSource:
    """Files that hold pictures beside their captions."""

    files: Callable[[Data], list[tuple[str, int, str | None]]]
    """Path below the root, size in bytes and split (None: not in its name) of every file."""
    candidates: Callable[[str, tuple[int, int], str | None, Data, IngestCounts], Iterator[Candidate]]
    """The pairs of a file, a stretch of it, and its split; what is no pair is counted."""
    stretches: Callable[[list[str], Data], list[list[tuple[int, int]]]] = lambda files, data: [[(0, 0)]] * len(files)
    """Parts in which each file is read, such as row groups. (0, 0): all of it at once."""
