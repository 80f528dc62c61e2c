"""Values of a table's row by column name, for all sources that read tables.

A name can lead into a column: in `sentences.raw`, `raw` is a key of the objects in the column `sentences`. A name with
`*` selects several columns: `caption_*` selects caption_0, caption_1 and so on.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rmdd.data.source import as_captions

CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences", "description", "prompt", "alt_text")
"""Usual names of the column of captions, in the order in which they are looked for."""


def columns_of(name: str, columns: Collection[str]) -> list[str]:
    """Return those of `columns` that `name` selects; an empty list if there is none."""
    if "*" in name:
        return [column for column in columns if fnmatch.fnmatchcase(column, name)]
    keys = name.split(".")
    prefixes = (".".join(keys[:n]) for n in range(len(keys), 0, -1))
    return [column for column in prefixes if column in columns][:1]


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """Return the value that `name` selects in a row; None if there is none. Lists inside lists are joined."""
    for column in columns_of(name, row):
        value = row[column]
        for key in name[len(column) + 1 :].split(".") if len(name) > len(column) else ():
            value = _inside(value, key)
        return value
    return None


def captions_of(row: Mapping[str, Any], name: str, parse: Callable[[Any], Any] = lambda cell: cell) -> tuple[Any, ...]:
    """Return the captions in the columns that `name` selects; `parse` turns a cell into a caption or a list of them."""
    columns = columns_of(name, row) if "*" in name else [name]
    return tuple(caption for column in columns for caption in as_captions(parse(value_of(row, column))))


def _inside(value: Any, key: str) -> Any:
    """Return the value of `key` in an object; for a list, return the list of the values of all its elements."""
    if isinstance(value, list):
        return [inner for element in value for inner in as_captions(_inside(element, key))]
    return value.get(key) if isinstance(value, dict) else None
