"""One row of an annotation file, as found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
class Row:
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
