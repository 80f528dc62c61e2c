"""Parquet files that contain the images, as the Hugging Face library `datasets` writes them.

The image column is `{bytes, path}` or binary; the caption column is text or a list of texts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.config import Data
from rmdd.data.counts import IngestCounts
from rmdd.data.decode import ImageError
from rmdd.data.inputs import InputPath, input_path, parquet_file
from rmdd.data.source import Candidate, SampleSource, as_captions, sample_files

_CONCURRENT_FILES = 16
_ROWS_PER_READ = 32


def row_group_ranges(paths: list[str], data: Data) -> list[list[tuple[int, int]]]:
    """Divide the row groups of each file into ranges whose compressed size reaches `data.shard_mb`.

    Raises `ValueError` for a file that is not Parquet or lacks a needed column.
    """
    root = input_path(data.root)
    with ThreadPoolExecutor(_CONCURRENT_FILES) as pool:
        return list(pool.map(lambda path: _ranges_of_file(root / path, data), paths))


def candidates(
    file: str, groups: tuple[int, int], split: str | None, data: Data, counts: IngestCounts
) -> Iterator[Candidate]:
    """Yield the rows of a Parquet file in order; `groups` is the range (start, stop) of row groups to read."""
    start, stop = groups
    rule, path = data.parquet, input_path(data.root) / file
    with _opened(path) as table:
        number = sum(table.metadata.row_group(g).num_rows for g in range(start))
        columns = [n for n in (rule.image, rule.caption, rule.split) if n in table.schema_arrow.names]
        batches = table.iter_batches(_ROWS_PER_READ, list(range(start, stop)), columns=columns)
        while (batch := _next(batches, path)) is not None:
            for row in batch.to_pylist():
                origin, pair_id = f"{file} row {number}", f"{file}/{number:08d}"
                number += 1
                captions = as_captions(row[rule.caption])
                counts.rows_in += 1
                counts.captions_in += len(captions)
                usable: dict[str, None] = {}
                counts.keep_captions(usable, captions, pair_id, origin)
                if not usable:
                    counts.reject(pair_id, "no_caption", origin, "none of its captions is usable", 0)
                    continue
                named = split if rule.split not in row else str(row[rule.split])
                yield Candidate(pair_id, tuple(usable), named, "parquet", origin, _image(row[rule.image]))


def _next(batches: Iterator[pa.RecordBatch], file: InputPath) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _image(value: Any) -> bytes | ImageError:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data or ImageError("no_image", "the image column is empty")


def _ranges_of_file(file: InputPath, data: Data) -> list[tuple[int, int]]:
    rule, limit = data.parquet, int(data.shard_mb * 2**20)
    with _opened(file) as table:
        columns = {field.name: field.type for field in table.schema_arrow}
        _check(file, rule.image, columns, "image", "{bytes, path} or binary", _holds_bytes)
        _check(file, rule.caption, columns, "caption", "text or a list of texts", _holds_text)
        sizes = [_compressed(table.metadata.row_group(g)) for g in range(table.num_row_groups)]
    ranges, start, size = [], 0, 0
    for group, group_size in enumerate(sizes, start=1):
        size += group_size
        if size >= limit or group == len(sizes):
            ranges.append((start, group))
            start, size = group, 0
    return ranges


def _check(file: InputPath, name: str, columns: dict[str, Any], option: str, expected: str, fits: Any) -> None:
    if name not in columns:
        raise ValueError(f"{file} has no column '{name}', only {', '.join(columns)}; set data.parquet.{option}")
    if not fits(columns[name]):
        raise ValueError(f"{file}: column '{name}' is {columns[name]}, expected {expected}; set data.parquet.{option}")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _compressed(group: Any) -> int:
    return sum(group.column(c).total_compressed_size for c in range(group.num_columns))


def _opened(file: InputPath) -> pq.ParquetFile:
    try:
        return parquet_file(file)
    except pa.ArrowInvalid as error:
        raise _damaged(file, error) from None


def _damaged(file: InputPath, error: Exception) -> ValueError:
    return ValueError(
        f"{file} is not a complete Parquet file: {error}; download the file again or exclude it from data.parquet.files"
    )


SOURCE = SampleSource(functools.partial(sample_files, source="parquet"), candidates, row_group_ranges)
