"""The split of each image in an ingest: what the source's split names mean, and which images become val and test.

Images whose split the source does not name, and images of train if `data.splits` asks for it, get their split by a
hash: the position of an image is a number from 0 to 1 that depends on its key alone (`hash_position`). A share of the
images is a range of positions, so an image stays in its split when images are added. A number of images is those with
the highest positions, so few images change their split when images are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rmdd.config import Data
from rmdd.data.shards import SPLITS
from rmdd.data.source import NO_SPLIT, SPLIT_NAMES, hash_position

Ranges = tuple[tuple[float, str], ...]
"""Splits, each with a limit from 0 to 1. An image gets the first split whose limit is not above its position.

If there is none, the image is in train."""


@dataclass(frozen=True)
class Carving:
    """The ranges of positions that become val and test."""

    unnamed: Ranges
    """For images whose split the source does not name."""
    named: Ranges = ()
    """For images that the source puts in train, or in a split that `data.splits` makes anew."""

    @classmethod
    def of(cls, data: Data, images: Iterable[tuple[str, str | None]] = ()) -> Carving:
        """Return the carving that `data` asks for. `images` are only read if it asks for a number of images.

        They are (key, split that the source names or None). Raises `ValueError` if there are too few images.
        """
        sizes = {"test": data.splits.test, "val": data.splits.val}
        train, val, test = data.split_fractions
        if sizes["val"] is None and sizes["test"] is None:
            return cls(((train + val, "test"), (train, "val")))
        usual = {"test": test, "val": val}
        unnamed = {split: usual[split] if size is None else size for split, size in sizes.items()}
        carving = cls(_share_ranges(unnamed), _share_ranges(sizes))
        numbers = {split: size for split, size in sizes.items() if isinstance(size, int) and size}
        if not numbers:
            return carving
        left = [(hash_position(key), key) for key, split in images if carving.split_of(key, split, data) == "train"]
        if sum(numbers.values()) >= len(left):
            asked = " and ".join(f"data.splits.{split}: {number}" for split, number in numbers.items())
            raise ValueError(f"{asked} would leave no image for train, which has {len(left)}; lower it")
        left.sort(reverse=True)
        end = 0
        for split, number in numbers.items():
            end += number
            lowest = ((left[end - 1][0], split),)
            carving = cls(carving.unnamed + lowest, carving.named + lowest)
        return carving

    @classmethod
    def from_json(cls, value: dict[str, list[list[Any]]]) -> Carving:
        """Return the carving whose fields were written to a JSON file."""
        return cls(**{name: tuple((lowest, split) for lowest, split in ranges) for name, ranges in value.items()})

    def split_of(self, key: str, split: str | None, data: Data) -> str:
        """Return the split of an image with this key; `split` is the one that the source names, or None."""
        made_anew = split == "train" or (split is not None and getattr(data.splits, split) is not None)
        if split is not None and not made_anew:
            return split
        position = hash_position(key)
        ranges = self.unnamed if split is None else self.named
        return next((name for lowest, name in ranges if position >= lowest), "train")


def _share_ranges(sizes: Mapping[str, float | int | None]) -> Ranges:
    lowest, ranges = 1.0, []
    for split, size in sizes.items():
        if isinstance(size, float):
            lowest -= size
            ranges.append((lowest, split))
    return tuple(ranges)


def meaning(name: str | None, data: Data) -> str | None:
    """Return the split (train, val, test) that the source means by `name`; None if it names none or `data` ignores it.

    The result is NO_SPLIT for images to leave out. Raises `ValueError` for an unknown name.
    """
    if name is None or not data.splits.from_source:
        return None
    word = name.strip().lower()
    usual = SPLIT_NAMES.get(word, word)
    names = {key.strip().lower(): split for key, split in data.splits.names.items()}
    split = names.get(word) or names.get(usual) or usual
    if split not in (*SPLITS, NO_SPLIT):
        raise ValueError(
            f"{name!r} is not the name of a split; set data.splits.names: {{{word}: val}} (or train, test, none), or "
            "data.splits.from_source: false to choose splits by a hash"
        )
    return split


def empty_splits(counts: Mapping[str, tuple[int, int]], origin: str, needed: Iterable[str] = SPLITS) -> str | None:
    """Return an error message if a split that a run needs has no images, otherwise None.

    `counts` are the numbers of images and captions per split, and `origin` says where they come from.
    """
    images = {split: number for split, (number, _) in counts.items()}
    empty = [split for split in needed if not images[split]]
    if not empty:
        return None
    found, total = ", ".join(f"{split} {number:,}" for split, number in images.items()), sum(images.values())
    if not total:
        todo = "correct data.root and the files that the data section names"
    elif "train" in empty:
        todo = "name the source's splits in data.splits.names, or set data.splits.from_source: false to split by a hash"
    else:
        size = max(1, total // 10) if total < 1000 else 0.1
        sizes = ", ".join(f"{split}: {size}" for split in empty)
        share = "this share" if total >= 1000 else "this number"
        todo = f"set data.splits: {{{sizes}}} to take {share} of the train images, or data.splits.names if the source "
        todo += "has another name for it"
    one = f"split {empty[0]} is" if len(empty) == 1 else f"splits {' and '.join(empty)} are"
    return f"data: {one} empty, and a run needs train, val and test; images {origin}: {found}; {todo}"
