"""Parquet files with the images inside, as Hugging Face datasets has them.

The image column is `{bytes, path}` or binary, the caption column text or a list of texts.
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
from rmdd.data.source import SPLIT_NAMES, Candidate, SampleSource, as_captions, hash_split, sample_files

_AT_ONCE = 16
_ROWS_PER_READ = 32


def slices(paths: list[str], data: Data) -> list[list[tuple[int, int]]]:
    """Per file its row groups, in stretches whose compressed size reaches `data.shard_mb`.

    Raises `ValueError` for a file that is no Parquet or lacks a column.
    """
    root = input_path(data.root)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda path: _slices(root / path, data), paths))


def candidates(
    file: str, stretch: tuple[int, int], split: str | None, data: Data, counts: IngestCounts
) -> Iterator[Candidate]:
    """The rows of some row groups, in order."""
    start, stop = stretch
    rule, where = data.parquet, input_path(data.root) / file
    with _opened(where) as table:
        groups = [table.metadata.row_group(g) for g in range(stop)]
        number = sum(group.num_rows for group in groups[:start])
        wanted = [n for n in (rule.image, rule.caption, rule.split) if n in table.schema_arrow.names]
        batches = table.iter_batches(_ROWS_PER_READ, list(range(start, stop)), columns=wanted)
        while (batch := _next(batches, where)) is not None:
            for row in batch.to_pylist():
                origin, pair_id = f"{file} row {number}", f"{file}/{number:08d}"
                number += 1
                captions = as_captions(row[rule.caption])
                counts.rows_in += 1
                counts.captions_in += len(captions)
                own = _split(row, split, pair_id, data)
                if own is None:
                    detail = f"{row[rule.split or '']!r} in column '{rule.split}' is no split"[:160]
                    counts.reject(pair_id, "no_split", origin, detail, len(captions))
                    continue
                usable: dict[str, None] = {}
                counts.keep_captions(usable, captions, pair_id, origin)
                if not usable:
                    counts.reject(pair_id, "no_caption", origin, "none of its captions can be used", 0)
                    continue
                yield Candidate(pair_id, tuple(usable), own, "parquet", origin, _image(row[rule.image]))


def _next(batches: Iterator[pa.RecordBatch], file: InputPath) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _split(row: dict[str, Any], named: str | None, pair_id: str, data: Data) -> str | None:
    column = data.parquet.split
    if column is not None and column in row:
        return SPLIT_NAMES.get(str(row[column]).strip().lower())
    return named or hash_split(pair_id, data.split_fractions)


def _image(value: Any) -> bytes | ImageError:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data or ImageError("no_image", "the column holds no bytes")


def _slices(file: InputPath, data: Data) -> list[tuple[int, int]]:
    rule, limit = data.parquet, int(data.shard_mb * 2**20)
    with _opened(file) as table:
        columns = {field.name: field.type for field in table.schema_arrow}
        _check(file, rule.image, columns, "image", "{bytes, path} or binary", _holds_bytes)
        _check(file, rule.caption, columns, "caption", "text or a list of texts", _holds_text)
        sizes = [_compressed(table.metadata.row_group(g)) for g in range(table.num_row_groups)]
    slices, start, size = [], 0, 0
    for group, more in enumerate(sizes, start=1):
        size += more
        if size >= limit or group == len(sizes):
            slices.append((start, group))
            start, size = group, 0
    return slices


def _check(file: InputPath, name: str, columns: dict[str, Any], what: str, wanted: str, fits: Any) -> None:
    if name not in columns:
        raise ValueError(f"{file} has no column '{name}' but {', '.join(columns)}; set data.parquet.{what}")
    if not fits(columns[name]):
        raise ValueError(f"{file}: column '{name}' is {columns[name]}, expected {wanted}; set data.parquet.{what}")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _compressed(group: Any) -> int:
    return sum(group.column(c).total_compressed_size for c in range(group.num_columns))


def _opened(file: InputPath) -> pq.ParquetFile:
    try:
        return parquet_file(file)
    except pa.ArrowInvalid as error:
        raise _damaged(file, error) from None


def _damaged(file: InputPath, error: Exception) -> ValueError:
    return ValueError(
        f"{file} is not a whole Parquet file: {error}; fetch it again or leave it out of data.parquet.files"
    )


SOURCE = SampleSource(functools.partial(sample_files, source="parquet"), candidates, slices)
