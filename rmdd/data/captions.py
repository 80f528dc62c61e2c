"""Caption cleaning with the rule used in the papers: the function `pre_caption` of the BLIP data loaders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rmdd.config import Captions, Data
from rmdd.data.shards import Dataset

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
        for (raw,) in self.dataset.columns(self.split, "captions"):
            if pairs_left == 0:
                return
            cleaned = [c for c in (clean(caption, self.data.captions) for caption in raw) if c]
            yield from cleaned
            if pairs_left is not None and cleaned:
                pairs_left -= 1


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
