"""The caption rule of the papers (`pre_caption` of the BLIP loaders)."""

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
    """The captions of a split as they are embedded: cleaned, those of the first pair first, read anew each time."""

    dataset: Dataset
    split: str
    data: Data

    def __iter__(self) -> Iterator[str]:
        left = self.data.eval_limit if self.split != "train" else None
        for (raw,) in self.dataset.columns(self.split, "captions"):
            if left == 0:
                return
            cleaned = [c for c in (clean(caption, self.data.captions) for caption in raw) if c]
            yield from cleaned
            if left is not None and cleaned:
                left -= 1


def clean(caption: str, rule: Captions) -> str:
    """The caption as the text encoder sees it; may be empty. Idempotent for one rule.

    >>> clean("A Dog, running!  Fast.", Captions())
    'a dog, running fast'
    """
    if rule.lowercase:
        caption = caption.lower()
    if rule.strip_punctuation:
        caption = caption.translate(_PUNCTUATION)
    # A single tab or newline inside a caption survives: the published rule collapses runs of two or more only.
    caption = _RUN_OF_SPACE.sub(" ", caption).rstrip("\n").strip(" ")
    if rule.max_words is not None:
        caption = " ".join(caption.split(" ")[: rule.max_words])
    return caption
