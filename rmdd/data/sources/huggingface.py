"""Datasets of the Hugging Face library `datasets`: folders that `save_to_disk` wrote, and datasets of the hub.

Both are Arrow files, which are mapped into memory and read in ranges of rows. A folder is read without the library. For
the hub, the library downloads the dataset into its cache (HF_HOME), on every machine that reads a part of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rmdd.config import Data, HuggingFace
from rmdd.data import arrow_tables
from rmdd.data.counts import IngestCounts
from rmdd.data.inputs import InputPath, input_path, size_of
from rmdd.data.layouts import read_json_file
from rmdd.data.source import AnnotationRow, Candidate, SampleSource, named_split

Tables = dict[str, tuple[InputPath, str | None]]
"""Path and split (None: not named) of each Arrow file by its name, which is the same on all machines."""

_COMMIT = re.compile("[0-9a-f]{40}")


def files(data: Data) -> list[tuple[str, int, str | None]]:
    """Return (name, size in bytes, split) of each Arrow file of the dataset that `data.huggingface` selects."""
    _from_hub.cache_clear()  # the hub may have a newer revision than when this process last looked
    return [(name, size_of(path), split) for name, (path, split) in _tables(data).items()]


def batch_ranges(names: list[str], data: Data) -> list[list[tuple[int, int]]]:
    """Divide the rows of each file into ranges whose size reaches `data.shard_mb`; a remote file is not divided.

    Raises `ValueError` if a file is damaged or lacks a needed column.
    """
    limit, tables, result = int(data.shard_mb * 2**20), _tables(data), []
    for path in (tables[name][0] for name in names):
        ranges, start, stop, size = [], 0, 0, 0
        for batch in _batches(path, data, paths=False) if isinstance(path, Path) else ():
            stop, size = stop + batch.num_rows, size + batch.nbytes
            if size >= limit:
                ranges.append((start, stop))
                start, size = stop, 0
        result.append([*ranges, (start, stop)] if stop > start or not ranges else ranges)
    return result


def candidates(
    file: str, rows: tuple[int, int], split: str | None, data: Data, counts: IngestCounts
) -> Iterator[Candidate]:
    """Yield the usable rows of an Arrow file in order; `rows` is the range (start, stop) to read, (0, 0) all rows."""
    start, stop = rows
    batches = _between(_batches(_tables(data)[file][0], data, paths=False), start, stop)
    caches = _cache_folders() if data.huggingface.hub else ()
    yield from arrow_tables.candidates(arrow_tables.numbered(batches, start), file, split, data, counts, caches)


def path_rows(files: list[tuple[str, int, str | None]], data: Data) -> Iterator[AnnotationRow] | None:
    """Return the rows of all files if the image column of the first file holds paths, otherwise None."""
    tables = _tables(data)
    first = tables[files[0][0]][0]
    with _opened(first) as stream:
        if not arrow_tables.lists_paths(first, stream.schema, data):
            return None
    if data.root is None:
        column = data.huggingface.image
        raise ValueError(f"column '{column}' holds paths of images; set data.root to the folder that contains them")
    return (row for file, _, split in files for row in _listed(tables[file][0], file, split, data))


def _listed(path: InputPath, file: str, split: str | None, data: Data) -> Iterator[AnnotationRow]:
    rows = arrow_tables.numbered(_batches(path, data, paths=True), 0)
    return arrow_tables.annotation_rows(rows, file, split, data)


def _tables(data: Data) -> Tables:
    tables, names = _from_hub(data.huggingface) if data.huggingface.hub else _saved(data), data.splits.names
    return {
        name: (path, split if split is None or split in names else named_split(split))
        for name, (path, split) in tables.items()
    }


def _saved(data: Data) -> Tables:
    """Return the Arrow files of a folder that `save_to_disk` wrote for a DatasetDict or for one Dataset."""
    root, folder = input_path(data.root), data.huggingface.folder.strip("/")
    parts: dict[str, str | None]
    if (splits := root / folder / "dataset_dict.json").is_file():
        parts = {f"{folder}/{split}".lstrip("/"): split for split in read_json_file(splits)["splits"]}
    elif (root / folder / "state.json").is_file():
        parts = {folder: None}
    else:
        raise ValueError(
            f"{root / folder} has neither dataset_dict.json nor state.json, so save_to_disk did not write it; correct "
            "data.root or data.huggingface.folder. For a dataset of the hub set data.huggingface.hub to its id; for "
            "Parquet files set data.source: parquet; for folders of images, imagefolder"
        )
    tables: Tables = {}
    for part, split in parts.items():
        for file in read_json_file(root / part / "state.json")["_data_files"]:
            name = f"{part}/{file['filename']}".lstrip("/")
            tables[name] = (root / name, split)
    return tables


@functools.lru_cache(maxsize=8)
def _from_hub(rule: HuggingFace) -> Tables:
    """Download a dataset of the hub, or find it in the cache; return its Arrow files."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ValueError(
            "data.huggingface.hub needs the library `datasets`, which is not installed: pip install 'rmdd[hub]'"
        ) from None
    try:
        splits = load_dataset(rule.hub, rule.config, revision=rule.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"`datasets` cannot load '{rule.hub}', config {rule.config}, revision {rule.revision}: {error}; "
            "correct data.huggingface.hub, config or revision; a private dataset needs HF_TOKEN in the environment"
        ) from None
    tables: Tables = {
        f"{split}/{Path(file['filename']).name}": (Path(file["filename"]), str(split))
        for split, dataset in splits.items()
        for file in dataset.cache_files
    }
    asked = rule.revision or ""
    for path, _ in tables.values():  # without a network, the library takes whichever revision is in the cache
        assert isinstance(path, Path)
        if _COMMIT.fullmatch(asked) and _COMMIT.fullmatch(path.parent.name) and path.parent.name != asked:
            raise ValueError(
                f"data.huggingface.revision asks for {asked}, but the hub cannot be reached and the cache holds "
                f"{path.parent.name}; set that revision, or fill the cache (HF_HOME) on a machine with a network"
            )
    return tables


def _cache_folders() -> tuple[str, ...]:
    """Return the folders in which the library keeps the image files of datasets of the hub."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(config.HF_DATASETS_CACHE), str(config.DOWNLOADED_DATASETS_PATH), str(HF_HUB_CACHE)


def _batches(path: InputPath, data: Data, paths: bool) -> Iterator[pa.RecordBatch]:
    """Yield the needed columns of the record batches of an Arrow file.

    Raises `ValueError` if the file is damaged, lacks a needed column, or its image column holds paths but `paths` is
    False, or the reverse.
    """
    with _opened(path) as stream:
        if arrow_tables.lists_paths(path, stream.schema, data) != paths:
            found, others = ("images", "paths") if paths else ("paths", "images")
            raise ValueError(f"{path} contains {found} of images, but the first file of the dataset {others}")
        columns = arrow_tables.columns(stream.schema, data)
        try:
            for batch in stream:
                yield batch.select(columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from None


def _between(batches: Iterator[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Yield the batches that contain the rows `start` to `stop` (exclusive; 0: to the end); batches are not cut."""
    first = 0
    for batch in batches:
        if first >= start and (not stop or first < stop):
            yield batch
        first += batch.num_rows
        if stop and first >= stop:
            return


def _opened(path: InputPath) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)) if isinstance(path, Path) else path.open())
    except pa.ArrowInvalid as error:
        raise _damaged(path, error) from None


def _damaged(path: InputPath, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a complete Arrow file of the library `datasets`: {error}; write or copy it again")


SOURCE = SampleSource(files, candidates, batch_ranges, path_rows)
