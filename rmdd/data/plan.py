"""What an ingest will read, cut into parts before any image is opened.

Lists of annotations are held in memory while they are checked, merged and cut, some 0.5 kB per row, and lie on
disk afterwards. Tars and Parquet files are only listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.config import Data
from rmdd.data.counts import IngestCounts, is_text
from rmdd.data.inputs import input_path, is_remote
from rmdd.data.layouts import alternatives
from rmdd.data.parts import IngestPart
from rmdd.data.planned import PLAN_SCHEMA
from rmdd.data.shards import SPLITS
from rmdd.data.source import NO_SPLIT, AnnotationRow, SampleSource, hash_split

_DRIVE = re.compile(r"[A-Za-z]:")

# A part is also closed at these numbers of rows, so that small pictures make many parts and not one.
_FILES_PER_PART = 8192
_DRAWINGS_PER_PART = 512
_REMOTE_FILES_PER_PART = 2048
"""Sizes of remote files would cost a request each."""


@dataclass
class IngestPlan:
    """All annotations of an ingest in memory, no image."""

    counts: IngestCounts = field(default_factory=IngestCounts)
    pairs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def images(self) -> Iterator[str]:
        """Paths of the images to be read, in order."""
        return (pair["pair_id"] for split in SPLITS for pair in self.pairs[split] if pair["drawing"] is None)


def make_plan(rows: Iterable[AnnotationRow], data: Data) -> IngestPlan:
    """Check paths and captions, and merge the rows of one image into one pair in the place of the first.

    Raises `ValueError` when there is no row at all or an image stands in two splits.
    """
    plan = IngestPlan()
    counts = plan.counts
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        counts.rows_in += 1
        counts.captions_in += len(row.captions)
        if row.split == NO_SPLIT:
            counts.reject(row.image, "no_split", row.origin, "listed in no split", len(row.captions))
            continue
        path, problem = _checked_path(row.image)
        if problem:
            counts.reject(row.image, problem, row.origin, _PROBLEMS[problem], len(row.captions))
            continue
        split = row.split or hash_split(path, data.split_fractions)
        pair = merged.get(path)
        if pair is None:
            pair = merged[path] = {"pair_id": path, "captions": {}, "split": split, "source": row.source}
            pair |= {"origin": row.origin, "drawing": row.drawing}
        else:
            counts.rows_merged += 1
            if pair["split"] != split:
                raise ValueError(
                    f"image {path} is in {pair['split']} ({pair['origin']}) and in {split} ({row.origin}); "
                    "an image belongs to one split: remove it from the other"
                )
        counts.keep_captions(pair["captions"], row.captions, path, row.origin)
    if not counts.rows_in:
        raise ValueError(f"data.source '{data.source}' holds no row at all; check that its files are the right ones")
    for pair in merged.values():
        pair["captions"] = list(pair["captions"])
        if pair["captions"]:
            plan.pairs[pair["split"]].append(pair)
        else:
            counts.reject(pair["pair_id"], "no_caption", pair["origin"], "none of its captions can be used", 0)
    return plan


def write_parts(plan: IngestPlan, data: Data, folder: Path) -> list[IngestPart]:
    """Cut the pairs of each split into parts and write a file of rows for each."""
    parts: list[IngestPart] = []
    for split in SPLITS:
        for rows in _cut(plan.pairs[split], data):
            part = IngestPart(len(parts), "listed", f"{len(parts):05d}.parquet", split=split)
            pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), folder / part.file)
            parts.append(part)
    return parts


def file_parts(source: SampleSource, files: list[tuple[str, int, str | None]], data: Data) -> list[IngestPart]:
    """A part per stretch of a file."""
    stretches = source.stretches([path for path, _, _ in files], data)
    cut = [(path, split, s) for (path, _, split), of_file in zip(files, stretches, strict=True) for s in of_file]
    return [IngestPart(n, data.source, path, start, stop, split) for n, (path, split, (start, stop)) in enumerate(cut)]


def _cut(pairs: list[dict[str, Any]], data: Data) -> Iterator[list[dict[str, Any]]]:
    """Stretches whose files together reach `data.shard_mb`, or that have rows enough."""
    limit = data.shard_mb * 2**20
    remote = is_remote(data.root)
    root = "" if remote else str(input_path(data.root))
    rows: list[dict[str, Any]] = []
    size = 0
    for pair in pairs:
        rows.append(pair)
        drawn = pair["drawing"] is not None
        most = _DRAWINGS_PER_PART if drawn else _REMOTE_FILES_PER_PART if remote else _FILES_PER_PART
        size += 0 if drawn or remote else _size(root, pair["pair_id"], data.layout)
        if size >= limit or len(rows) == most:
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


_PROBLEMS = {
    "no_path": "the image is not given as a path",
    "absolute_path": "absolute paths are not read; write it relative to data.root",
    "escaping_path": "leads out of data.root",
}


def _checked_path(value: Any) -> tuple[str, str | None]:
    """A relative POSIX path without `.` and doubled slashes, or what is wrong with it."""
    if not isinstance(value, str) or not value.strip() or not is_text(value) or "\0" in value:
        return "", "no_path"
    path = PurePosixPath(value.strip().replace("\\", "/"))
    if path.is_absolute() or _DRIVE.match(str(path)):
        return "", "absolute_path"
    if ".." in path.parts:
        return "", "escaping_path"
    return (str(path), None) if path.parts else ("", "no_path")
