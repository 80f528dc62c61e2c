"""Caption cleaning with the rule used in the papers: the function `pre_caption` of the BLIP data loaders."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rmdd.config import Captions, Data
from rmdd.data.shards import Dataset
from rmdd.data.source import hash_position

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_RUN_OF_SPACE = re.compile(r"\s{2,}")


@dataclass(frozen=True)
class SplitCaptions:
    """The cleaned captions of a dataset split, in the order of its pairs; each iteration reads them from disk again."""

    dataset: Dataset
    split: str
    data: Data

    def __iter__(self) -> Iterator[str]:
        pairs_left = self.data.limit_of(self.split)
        drawn = drawn_rows(self.dataset, self.split, self.data)
        for row, (raw,) in enumerate(self.dataset.columns(self.split, "captions")):
            if pairs_left == 0:
                return
            if drawn is not None and row not in drawn:
                continue
            cleaned = [c for c in (clean(caption, self.data.captions) for caption in raw) if c]
            yield from cleaned
            if pairs_left is not None and cleaned:
                pairs_left -= 1


def drawn_rows(dataset: Dataset, split: str, data: Data) -> set[int] | None:
    """Return the rows of train that `data.train_limit` allows, which a hash of the pair ids draws; otherwise None.

    Only pairs with a caption after cleaning are drawn.
    """
    if split != "train" or data.train_limit is None:
        return None
    positions = (
        (hash_position(pair_id), row)
        for row, (pair_id, raw) in enumerate(dataset.columns(split, "pair_id", "captions"))
        if any(clean(caption, data.captions) for caption in raw)
    )
    return {row for _, row in heapq.nsmallest(data.train_limit, positions)}


def clean(caption: str, rule: Captions) -> str:
    """Clean a caption for the text encoder. The result may be empty; cleaning the result again does not change it.

    >>> clean("A Dog, running!  Fast.", Captions())
    'a dog, running fast'
    """
    if rule.lowercase:
        caption = caption.lower()
    if rule.strip_punctuation:
        caption = caption.translate(_PUNCTUATION)
    # The published code replaces only runs of two or more white-space characters, so a single tab or newline stays.
    caption = _RUN_OF_SPACE.sub(" ", caption).rstrip("\n").strip(" ")
    if rule.max_words is not None:
        caption = " ".join(caption.split(" ")[: rule.max_words])
    return caption
