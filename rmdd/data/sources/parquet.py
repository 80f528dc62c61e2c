"""Parquet files that contain images, as the Hugging Face library `datasets` writes them, or that list their paths.

`rmdd.data.arrow_tables` says which columns are accepted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.config import Data
from rmdd.data import arrow_tables
from rmdd.data.counts import IngestCounts
from rmdd.data.inputs import InputPath, input_path, parquet_file
from rmdd.data.source import AnnotationRow, Candidate, SampleSource, sample_files

_CONCURRENT_FILES = 16


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
    path = input_path(data.root) / file
    with _opened(path) as table:
        yield from arrow_tables.candidates(_rows(table, groups, path, data), file, split, data, counts)


def path_rows(files: list[tuple[str, int, str | None]], data: Data) -> Iterator[AnnotationRow] | None:
    """Return the rows of all files if the image column of the first file holds paths, otherwise None."""
    root = input_path(data.root)
    with _opened(root / files[0][0]) as table:
        if not arrow_tables.lists_paths(root / files[0][0], table.schema_arrow, data):
            return None
    return (row for file, _, split in files for row in _listed(file, split, data))


def _listed(file: str, split: str | None, data: Data) -> Iterator[AnnotationRow]:
    path = input_path(data.root) / file
    with _opened(path) as table:
        if not arrow_tables.lists_paths(path, table.schema_arrow, data):
            raise ValueError(f"{path} contains images, but other files list paths; separate them by data.parquet.files")
        rows = _rows(table, (0, table.num_row_groups), path, data)
        yield from arrow_tables.annotation_rows(rows, file, split, data)


def _rows(table: pq.ParquetFile, groups: tuple[int, int], file: InputPath, data: Data) -> arrow_tables.Numbered:
    first = sum(table.metadata.row_group(g).num_rows for g in range(groups[0]))
    columns = arrow_tables.columns(table.schema_arrow, data)
    batches = table.iter_batches(arrow_tables.ROWS_PER_READ, list(range(*groups)), columns=columns)
    try:
        yield from arrow_tables.numbered(batches, first)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _ranges_of_file(file: InputPath, data: Data) -> list[tuple[int, int]]:
    limit = int(data.shard_mb * 2**20)
    with _opened(file) as table:
        if arrow_tables.lists_paths(file, table.schema_arrow, data):
            raise ValueError(f"{file} lists paths, but other files contain images; separate them by data.parquet.files")
        sizes = [_compressed(table.metadata.row_group(g)) for g in range(table.num_row_groups)]
    ranges, start, size = [], 0, 0
    for group, group_size in enumerate(sizes, start=1):
        size += group_size
        if size >= limit or group == len(sizes):
            ranges.append((start, group))
            start, size = group, 0
    return ranges


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


SOURCE = SampleSource(functools.partial(sample_files, source="parquet"), candidates, row_group_ranges, path_rows)
