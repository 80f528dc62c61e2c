"""Planning of an ingest: the annotations are checked, merged and divided into parts before any image is opened.

Annotation lists are held in memory during planning (about 0.5 kB per row), and the merged rows are then written to
disk. For tar and Parquet files, the plan contains only the list of files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.config import Data
from rmdd.data.carving import Carving, meaning
from rmdd.data.counts import IngestCounts
from rmdd.data.image_files import PROBLEMS, checked_path
from rmdd.data.inputs import input_path, is_remote
from rmdd.data.layouts import alternatives
from rmdd.data.parts import IngestPart
from rmdd.data.planned import PLAN_SCHEMA
from rmdd.data.shards import SPLITS
from rmdd.data.source import NO_SPLIT, AnnotationRow, SampleSource

# These limits on the rows in a part of an ingest make sure that a dataset of small images still has many parts.
_FILES_PER_PART = 8192
_DRAWINGS_PER_PART = 512
_REMOTE_FILES_PER_PART = 2048
"""Largest number of remote files in a part. Bytes are not limited, since asking for a file size costs a request."""


@dataclass
class IngestPlan:
    """The result of planning an ingest: counts, and the path and merged captions of each image, without its pixels."""

    counts: IngestCounts = field(default_factory=IngestCounts)
    pairs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def images(self) -> Iterator[str]:
        """Yield in order the paths of the images that are read from files, without generated images."""
        return (pair["pair_id"] for split in SPLITS for pair in self.pairs[split] if pair["drawing"] is None)


def make_plan(rows: Iterable[AnnotationRow], data: Data) -> IngestPlan:
    """Check the paths and captions of `rows`. Merge the rows of an image into one pair, at the first row's position.

    Raises `ValueError` if there are no rows, if an image is listed in two splits or in an unknown one, or if there are
    fewer images than `data.splits` asks for.
    """
    plan = IngestPlan()
    counts = plan.counts
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        counts.rows_in += 1
        counts.captions_in += len(row.captions)
        try:
            split = meaning(row.split, data)
        except ValueError as error:
            raise ValueError(f"{row.origin}: {error}") from None
        if split == NO_SPLIT:
            counts.reject(row.image, "no_split", row.origin, "no split lists this image", len(row.captions))
            continue
        path, problem = checked_path(row.image)
        if problem:
            counts.reject(row.image, problem, row.origin, PROBLEMS[problem], len(row.captions))
            continue
        pair = merged.get(path)
        if pair is None:
            pair = merged[path] = {"pair_id": path, "captions": {}, "split": split, "source": row.source}
            pair |= {"origin": row.origin, "drawing": row.drawing}
        else:
            counts.rows_merged += 1
            if pair["split"] != split:
                raise ValueError(
                    f"image {path} is in {pair['split']} ({pair['origin']}) and in {split} ({row.origin}); "
                    "an image must be in one split only: remove it from one of them, or set "
                    "data.splits.from_source: false to choose splits by a hash"
                )
        counts.keep_captions(pair["captions"], row.captions, path, row.origin)
    if not counts.rows_in:
        raise ValueError(f"data.source '{data.source}' has no rows; check the files that the data section names")
    captioned = [pair for pair in merged.values() if pair["captions"]]
    carving = Carving.of(data, ((pair["pair_id"], pair["split"]) for pair in captioned))
    for pair in captioned:
        pair["captions"] = list(pair["captions"])
        pair["split"] = carving.split_of(pair["pair_id"], pair["split"], data)
        plan.pairs[pair["split"]].append(pair)
    for pair in merged.values():
        if not pair["captions"]:
            counts.reject(pair["pair_id"], "no_caption", pair["origin"], "none of its captions is usable", 0)
    return plan


def write_parts(plan: IngestPlan, data: Data, folder: Path) -> list[IngestPart]:
    """Divide the pairs of `plan` into parts of the ingest, and write each part as a Parquet file into `folder`."""
    parts: list[IngestPart] = []
    for split in SPLITS:
        for rows in _split_rows(plan.pairs[split], data):
            part = IngestPart(len(parts), "listed", f"{len(parts):05d}.parquet", split=split)
            pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), folder / part.file)
            parts.append(part)
    return parts


def file_parts(source: SampleSource, files: list[tuple[str, int, str | None]], data: Data) -> list[IngestPart]:
    """Return one `IngestPart` for each range of each file; the `ranges` function of `source` gives the ranges."""
    ranges = source.ranges([path for path, _, _ in files], data)
    flat = [(path, split, r) for (path, _, split), of_file in zip(files, ranges, strict=True) for r in of_file]
    return [IngestPart(n, data.source, path, start, stop, split) for n, (path, split, (start, stop)) in enumerate(flat)]


def _split_rows(pairs: list[dict[str, Any]], data: Data) -> Iterator[list[dict[str, Any]]]:
    """Divide `pairs` into parts; a part ends when its files reach `data.shard_mb`, or at the maximum number of rows."""
    limit = data.shard_mb * 2**20
    remote = is_remote(data.root)
    root = "" if remote else str(input_path(data.root))
    rows: list[dict[str, Any]] = []
    size = 0
    for pair in pairs:
        rows.append(pair)
        is_drawing = pair["drawing"] is not None
        max_rows = _DRAWINGS_PER_PART if is_drawing else _REMOTE_FILES_PER_PART if remote else _FILES_PER_PART
        size += 0 if is_drawing or remote else _size(root, pair["pair_id"], data.layout)
        if size >= limit or len(rows) == max_rows:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _size(root: str, path: str, layout: str | None) -> int:
    for name in alternatives(path, layout):
        try:
            return os.stat(os.path.join(root, name)).st_size
        except (OSError, ValueError):
            continue
    return 0
