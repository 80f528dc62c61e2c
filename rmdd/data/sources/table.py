"""A folder of images and a table (CSV, TSV, JSON lines or Parquet) with one row per caption or one row per image.

There is one table, or one per split.

An unknown split name in the split column stops the ingest; a row whose cell in this column is empty is quarantined.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from rmdd.config import Data, TableSource
from rmdd.data.columns import captions_of, columns_of, value_of
from rmdd.data.inputs import InputPath, input_path, parquet_file
from rmdd.data.layouts import describe, read_text
from rmdd.data.source import NO_SPLIT, AnnotationRow, AnnotationSource


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[InputPath]]:
    file = data.table.file
    tables: list[tuple[str | None, str]] = [(None, file)] if isinstance(file, str) else [*file.files.items()]
    paths = [(split, input_path(data.root) / name) for split, name in tables]
    for _, path in paths:
        if not path.is_file():
            raise ValueError(f"{path} not found; set data.table.file to the path of the table relative to data.root")
    return chain.from_iterable(_in_table(path, split, data) for split, path in paths), [path for _, path in paths]


def _in_table(path: InputPath, split: str | None, data: Data) -> Iterator[AnnotationRow]:
    """Yield the rows of a table; if `split` is given, all of them are in it."""
    rows = rows_of(path, records(path), data.table)
    yield from rows if split is None else (replace(row, split=split) for row in rows)


def records(path: InputPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the position of each row of a table, such as `line 2`, and its values by column name."""
    readers = {".csv": _csv, ".tsv": _csv, ".txt": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: unknown extension '{path.suffix}'; give one of {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def rows_of(
    path: InputPath, records: Iterable[tuple[str, dict[str, Any]]], table: TableSource, source: str = "table"
) -> Iterator[AnnotationRow]:
    """Yield the rows of a table with the columns that `table` names; messages call them fields of `data.SOURCE`."""
    for i, (where, record) in enumerate(records):
        missing = [column for column in (table.image, table.caption) if not columns_of(column, record)]
        if missing and i == 0:
            raise ValueError(
                f"{path}: no column {' and no column '.join(map(repr, missing))}; "
                f"it has {', '.join(map(str, record))}; set data.{source}.image and data.{source}.caption"
            )
        image, captions = value_of(record, table.image), captions_of(record, table.caption, _unpacked)
        yield AnnotationRow(image, captions, _split(record, table.split), source, f"{path.name} {where}")


def _split(record: dict[str, Any], column: str | None) -> str | None:
    if column is None or column not in record:
        return None
    value = record[column]
    return NO_SPLIT if value is None or value != value or value == "" else str(value)


def _unpacked(value: Any) -> Any:
    """Return the list that a text cell holds as JSON; a value that is no JSON list is returned unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            inner = json.loads(value)
        except json.JSONDecodeError:
            return value
        return inner if isinstance(inner, list) else value
    return value


def _csv(path: InputPath) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",\t;|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two of the columns {', '.join(names)} have the same name; rename one")
        for line in reader:
            if line:  # if a row has too few cells, its last columns are empty
                padded = line + [None] * (len(names) - len(line))
                yield f"line {reader.line_num}", dict(zip(names, padded, strict=False))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} cannot be read: {error}") from None


def _jsonl(path: InputPath) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {i} is not JSON: {error}; JSON lines hold one object per line") from None
        if not isinstance(record, dict):
            hint = "; set data.source: lists for a JSON list of records" if isinstance(record, list) else ""
            raise ValueError(f"{path}: line {i} is {describe(record)}, expected an object{hint}")
        yield f"line {i}", record


def _parquet(path: InputPath) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa

    try:
        with parquet_file(path) as file:
            row = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"row {row}", record
                    row += 1
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None


SOURCE = AnnotationSource(rows, cut_by_hash=True)
