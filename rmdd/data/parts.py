"""An ingest in parts: each is read by one task, from its input to its shards and its record.

A part's bytes follow from its input alone, so it does not matter who writes it, how often, or beside what. Nothing
of a part is held in memory but one row group per split.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmdd.config import Data, Runtime
from rmdd.core.files import atomic_path, read_json, sha256_file, write_json
from rmdd.core.storage import Storage, open_storage
from rmdd.data import planned, sources
from rmdd.data.counts import IngestCounts
from rmdd.data.decode import ImageError, decode_as
from rmdd.data.shards import SPLITS, Pair, ShardWriter
from rmdd.data.source import Candidate, SampleSource


@dataclass(frozen=True)
class IngestPart:
    """A stretch of planned rows, a tar, or some row groups of a Parquet file."""

    number: int
    kind: str
    """`listed`, or the name of a source of samples."""
    file: str
    """Below the folder of the plan for `listed`, else below `data.root`."""
    start: int = 0
    stop: int = 0
    """A stretch of the file, such as row groups; 0 and 0: all of it."""
    split: str | None = None
    """Of all its pairs, where the file's name says it."""


@dataclass(frozen=True)
class IngestFolders:
    """Where an unfinished ingest lies: plan, records and the dataset that is to be."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan"

    @property
    def parts(self) -> Path:
        """The list of all parts; an ingest has begun when it is there."""
        return self.plan / "plan.json"

    @property
    def dataset(self) -> Path:
        return self.path / "dataset"

    @property
    def records(self) -> Path:
        return self.path / "records"

    def record(self, number: int) -> Path:
        return self.records / f"{number:05d}.json"

    def entries(self, number: int) -> Path:
        """The part's lines of the quarantine."""
        return self.records / f"{number:05d}.jsonl"

    def digests(self, shard: str) -> Path:
        return self.records / f"{shard}.digests"


class PartWriter:
    """Turns parts into shards and records below `folders`; a part that is there already is only checked.

    With `runtime`, `folders` lie relative to its storage, wherever that is on this machine.
    """

    def __init__(self, data: Data, folders: IngestFolders, runtime: Runtime | None = None):
        self.storage = Storage(Path()) if runtime is None else open_storage(runtime)
        self.data, self.folders = data, IngestFolders(self.storage.root / folders.path)
        self.source = sources.find(data)
        self.storage.fetch(self.folders.plan)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Fields of an `IngestPart` in; its number, how many pairs it holds, and whether it was written now."""
        part = IngestPart(**item)
        try:
            if not self.folders.parts.is_file():
                raise OSError(f"{socket.gethostname()} does not see the storage: {self.folders.parts} is not there")
            own = re.compile(rf"\b{part.number:05d}\.(parquet|jsonl?)\b")
            self.storage.fetch(self.folders.path, lambda name: own.search(name) is not None)
            record = self._finished(part)
            fresh = record is None
            record = record or self._write(part)
        except OSError as error:
            raise OSError(
                f"part {part.number} ({part.file}): {error}; the finished parts are kept in {self.folders.path}, so "
                "mend this and start again"
            ) from error
        return {"number": part.number, "pairs": sum(s["rows"] for s in record["shards"]), "fresh": fresh}

    def _finished(self, part: IngestPart) -> dict[str, Any] | None:
        """The record of a part whose files are all there and whole."""
        path = self.folders.record(part.number)
        if not path.is_file():
            return None
        record = read_json(path)
        for shard in record["shards"]:
            file = self.folders.dataset / shard["file"]
            if not file.is_file() or not self.folders.digests(shard["file"]).is_file():
                return None
            if file.stat().st_size != shard["bytes"] or sha256_file(file) != shard["sha256"]:
                return None
        return record

    def _write(self, part: IngestPart) -> dict[str, Any]:
        counts, folders = IngestCounts(), self.folders
        with contextlib.ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            for pair in self._pairs(part, counts):
                if pair.split not in writers:
                    path = folders.dataset / f"{pair.split}-{part.number:05d}.parquet"
                    writers[pair.split] = stack.enter_context(ShardWriter(path))
                writers[pair.split].append(pair)
            shards = [writers[split].finish() for split in SPLITS if split in writers]
        for writer in writers.values():
            with atomic_path(folders.digests(writer.path.name)) as temporary:
                temporary.write_bytes(writer.digests)
        if counts.entries:
            with atomic_path(folders.entries(part.number)) as temporary:
                write_entries(temporary, counts.entries)
        record = {"part": asdict(part), "shards": shards, "counts": counts.as_json()}
        write_json(folders.record(part.number), record)
        return record

    def _pairs(self, part: IngestPart, counts: IngestCounts) -> Iterator[Pair]:
        """The usable pairs of a part, in order; the rest goes to the counts."""
        candidates: Iterator[Candidate]
        if isinstance(self.source, SampleSource):
            candidates = self.source.candidates(part.file, (part.start, part.stop), part.split, self.data, counts)
        else:
            candidates = planned.candidates(self.folders.plan / part.file, self.data, self.source)
        for candidate in candidates:
            try:
                image = _checked(candidate.image, self.data)
            except ImageError as error:
                captions = len(candidate.captions)
                counts.reject(candidate.pair_id, error.reason, candidate.origin, error.detail, captions)
            else:
                yield Pair(candidate.pair_id, image, candidate.captions, candidate.split, candidate.source)


def write_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """JSON lines."""
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _checked(image: bytes | ImageError, data: Data) -> bytes:
    if isinstance(image, ImageError):
        raise image
    decoded = decode_as(image, data)
    if data.reencode is None:
        return image
    from PIL import Image

    out = io.BytesIO()
    decoded.resize((data.reencode, data.reencode), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()
