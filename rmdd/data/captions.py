"""The caption rule of the papers (`pre_caption` of the BLIP loaders)."""

from __future__ import annotations

import re

from rmdd.config import Captions

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_RUN_OF_SPACE = re.compile(r"\s{2,}")


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
