"""Rows of Arrow tables: Parquet files, and the files of the Hugging Face library `datasets`.

The image column holds bytes or `{bytes, path}`, and then a row becomes a pair; an image without bytes is read from its
path. If the column holds text, the table lists the paths of images, and the rows of one image are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from rmdd.config import Data
from rmdd.data.columns import captions_of, columns_of, value_of
from rmdd.data.counts import IngestCounts
from rmdd.data.decode import ImageError
from rmdd.data.image_files import PROBLEMS, checked_path, read_image
from rmdd.data.inputs import input_path
from rmdd.data.source import AnnotationRow, Candidate

ROWS_PER_READ = 32

Numbered = Iterable[tuple[int, dict[str, Any]]]
"""Rows of a table, each with its number in the file."""


def lists_paths(file: Any, schema: pa.Schema, data: Data) -> bool:
    """Check the columns that `data` names, and return whether the image column holds paths instead of images.

    Raises `ValueError` if a column is missing or has an unusable type.
    """
    rule = getattr(data, data.source)
    _check(file, schema, rule.image, f"data.{data.source}.image", "{bytes, path}, binary or paths", holds_images)
    _check(file, schema, rule.caption, f"data.{data.source}.caption", "text or a list of texts", _holds_text)
    return is_text(_types(schema, rule.image)[0])


def columns(schema: pa.Schema, data: Data) -> list[str]:
    """Return the columns of a table that an ingest reads."""
    rule = getattr(data, data.source)
    names = [column for name in (rule.image, rule.caption) for column in columns_of(name, schema.names)]
    return list(dict.fromkeys([*names, *(name for name in [rule.split] if name in schema.names)]))


def numbered(batches: Iterable[pa.RecordBatch], first: int) -> Numbered:
    """Yield the rows of `batches` with their numbers, of which `first` is the lowest."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_READ):
            yield from enumerate(batch.slice(start, ROWS_PER_READ).to_pylist(), first + start)
        first += batch.num_rows


def annotation_rows(rows: Numbered, file: str, split: str | None, data: Data) -> Iterator[AnnotationRow]:
    """Yield the rows of a table that lists paths; `split` is the split that the source names for the whole file."""
    rule = getattr(data, data.source)
    for number, row in rows:
        named = _split(row, rule.split, split)
        captions = captions_of(row, rule.caption)
        yield AnnotationRow(value_of(row, rule.image), captions, named, data.source, f"{file} row {number}")


def candidates(
    rows: Numbered, file: str, split: str | None, data: Data, counts: IngestCounts, caches: Sequence[str] = ()
) -> Iterator[Candidate]:
    """Yield the usable rows of a table that contains images, and add all rows to `counts`.

    An image without bytes is read from its path, below `data.root` or one of the folders `caches`.
    """
    rule = getattr(data, data.source)
    for number, row in rows:
        origin, pair_id = f"{file} row {number}", f"{file}/{number:08d}"
        captions = captions_of(row, rule.caption)
        counts.rows_in += 1
        counts.captions_in += len(captions)
        usable: dict[str, None] = {}
        counts.keep_captions(usable, captions, pair_id, origin)
        if not usable:
            counts.reject(pair_id, "no_caption", origin, "none of its captions is usable", 0)
            continue
        image = value_of(row, rule.image)
        content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        try:
            content = content or _read(path, data, caches)
        except ImageError as error:
            counts.reject(path or pair_id, error.reason, origin, error.detail, len(usable))
            continue
        named = _split(row, rule.split, split)
        yield Candidate(pair_id, tuple(usable), named, data.source, origin, content)


def _split(row: dict[str, Any], column: str | None, split_of_file: str | None) -> str | None:
    return str(row[column]) if column is not None and column in row else split_of_file


def _read(path: str | None, data: Data, caches: Sequence[str]) -> bytes:
    if not path:
        raise ImageError("no_image", "the image column is empty")
    folder = next((f for f in (data.root, *caches) if f and PurePosixPath(path).is_relative_to(f)), None)
    inside, problem = checked_path(path if folder is None else str(PurePosixPath(path).relative_to(folder)))
    if problem:
        raise ImageError(problem, PROBLEMS[problem])
    if not (folder := folder or data.root):
        raise ImageError("no_image", "the image is a path; set data.root to the folder that it is relative to")
    return read_image(inside, input_path(folder), data)


def _check(
    file: Any, schema: pa.Schema, name: str, field: str, expected: str, fits: Callable[[pa.DataType], bool]
) -> None:
    if not (types := _types(schema, name)):
        raise ValueError(f"{file} has no column '{name}', only {', '.join(schema.names)}; set {field}")
    for kind in types:
        if not fits(kind):
            hint = f", such as {name}.{key}" if (key := _text_inside(kind)) else ""
            raise ValueError(f"{file}: column '{name}' is {kind}, expected {expected}; set {field}{hint}")


def _types(schema: pa.Schema, name: str) -> list[pa.DataType]:
    """Return the types of the columns that `name` selects; if it leads into a column, the type of the values there."""
    types = []
    for column in columns_of(name, schema.names):
        kind = schema.field(column).type
        for key in name[len(column) + 1 :].split(".") if "*" not in name and name != column else ():
            kind = _element(kind)
            index = kind.get_field_index(key) if pa.types.is_struct(kind) else -1
            if index < 0:
                return []
            kind = kind.field(index).type
        types.append(kind)
    return types


def _element(kind: pa.DataType) -> pa.DataType:
    """Return the type of the elements of a list; for any other type, the type itself."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return kind


def _text_inside(kind: pa.DataType) -> str | None:
    kind = _element(kind)
    fields = kind if pa.types.is_struct(kind) else ()
    return next((field.name for field in fields if _holds_text(field.type)), None)


def holds_images(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold images or paths of images."""
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return _is_binary(fields.get("bytes", pa.null())) or is_text(fields.get("path", pa.null()))
    return _is_binary(kind) or is_text(kind)


def _holds_text(kind: pa.DataType) -> bool:
    return is_text(_element(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
