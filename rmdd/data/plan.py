"""What an ingest will read: rows with checked paths and captions, one per image, grouped by split."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from rmdd.config import Data
from rmdd.data.read import PLAN_SCHEMA
from rmdd.data.shards import SPLITS
from rmdd.data.sources.row import NO_SPLIT, Row

_ROWS_PER_TABLE = 32
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass
class Plan:
    """All annotations of an ingest in memory, no image. `reports` are entries of the quarantine."""

    rows_in: int = 0
    rows_merged: int = 0
    captions_in: int = 0
    quarantine: Counter[str] = field(default_factory=Counter)
    captions_dropped: Counter[str] = field(default_factory=Counter)
    reports: list[dict[str, Any]] = field(default_factory=list)
    pairs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    @property
    def images(self) -> list[str]:
        """Paths of the images to be read, in order."""
        return [pair["pair_id"] for split in SPLITS for pair in self.pairs[split] if pair["drawing"] is None]

    def tables(self) -> Iterator[pa.Table]:
        """The pairs, train first, in tables small enough to hold their images in memory."""
        rows = [pair for split in SPLITS for pair in self.pairs[split]]
        for start in range(0, len(rows), _ROWS_PER_TABLE):
            yield pa.Table.from_pylist(rows[start : start + _ROWS_PER_TABLE], schema=PLAN_SCHEMA)

    def reject(self, file: Any, reason: str, origin: str, detail: str, captions: int) -> None:
        self.quarantine[reason] += 1
        self.captions_dropped["image_quarantined"] += captions
        self._report("pair", file, reason, origin, detail)

    def drop(self, file: str, reason: str, origin: str, caption: Any) -> None:
        self.captions_dropped[reason] += 1
        self._report("caption", file, reason, origin, _shown(caption))

    def _report(self, what: str, file: Any, reason: str, origin: str, detail: str) -> None:
        shown = file if isinstance(file, str) and _is_text(file) else _shown(file)
        self.reports.append({"what": what, "file": shown, "reason": reason, "origin": origin, "detail": detail})


def make_plan(rows: Iterable[Row], data: Data) -> Plan:
    """Check paths and captions, and merge the rows of one image into one pair in the place of the first.

    Raises `ValueError` when there is no row at all or an image stands in two splits.
    """
    plan = Plan()
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        plan.rows_in += 1
        plan.captions_in += len(row.captions)
        if row.split == NO_SPLIT:
            plan.reject(row.image, "no_split", row.origin, "listed in no split", len(row.captions))
            continue
        path, problem = _checked_path(row.image)
        if problem:
            plan.reject(row.image, problem, row.origin, _PROBLEMS[problem], len(row.captions))
            continue
        split = row.split or _cut(path, data.split_fractions)
        pair = merged.get(path)
        if pair is None:
            pair = merged[path] = {"pair_id": path, "captions": {}, "split": split, "source": row.source}
            pair |= {"origin": row.origin, "drawing": row.drawing}
        else:
            plan.rows_merged += 1
            if pair["split"] != split:
                raise ValueError(
                    f"image {path} is in {pair['split']} ({pair['origin']}) and in {split} ({row.origin}); "
                    "an image belongs to one split: remove it from the other"
                )
        _add_captions(pair["captions"], row, path, plan)
    if not plan.rows_in:
        raise ValueError(f"data.source '{data.source}' holds no row at all; check that its files are the right ones")
    for pair in merged.values():
        pair["captions"] = list(pair["captions"])
        if pair["captions"]:
            plan.pairs[pair["split"]].append(pair)
        else:
            plan.reject(pair["pair_id"], "no_caption", pair["origin"], "none of its captions can be used", 0)
    return plan


_PROBLEMS = {
    "no_path": "the image is not given as a path",
    "absolute_path": "absolute paths are not read; write it relative to data.root",
    "escaping_path": "leads out of data.root",
}


def _checked_path(value: Any) -> tuple[str, str | None]:
    """A relative POSIX path without `.` and doubled slashes, or what is wrong with it."""
    if not isinstance(value, str) or not value.strip() or not _is_text(value) or "\0" in value:
        return "", "no_path"
    path = PurePosixPath(value.strip().replace("\\", "/"))
    if path.is_absolute() or _DRIVE.match(str(path)):
        return "", "absolute_path"
    if ".." in path.parts:
        return "", "escaping_path"
    return (str(path), None) if path.parts else ("", "no_path")


def _add_captions(captions: dict[str, None], row: Row, path: str, plan: Plan) -> None:
    for caption in row.captions:
        if not isinstance(caption, str) or not _is_text(caption):
            plan.drop(path, "caption_not_text", row.origin, caption)
        elif not caption.strip():
            plan.drop(path, "empty_caption", row.origin, caption)
        elif caption in captions:
            plan.drop(path, "duplicate_caption", row.origin, caption)
        else:
            captions[caption] = None


def _cut(path: str, fractions: tuple[float, float, float]) -> str:
    """Split of an image by a hash of its path: it stays whatever is added or removed beside it."""
    share = int.from_bytes(hashlib.sha256(f"rmdd split/{path}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < fractions[0] else "val" if share < fractions[0] + fractions[1] else "test"


def _is_text(value: str) -> bool:
    """JSON can hold halves of surrogate pairs, which no UTF-8 file can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    return ascii(value)[:120] if not isinstance(value, str) or not _is_text(value) else repr(value)[:120]
