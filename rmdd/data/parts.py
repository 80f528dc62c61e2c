"""Parts of an ingest: a worker reads the input of one part and writes the shards and a record file of this part.

The written bytes depend only on the input, so any worker can write any part, in any order, and writing a part twice
is harmless. A worker holds one row group per split (train, val, test) in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmdd.config import Data, Runtime
from rmdd.core.files import atomic_path, read_json, sha256_file, write_json
from rmdd.core.storage import Storage, open_storage
from rmdd.data import duplicates, planned, sources
from rmdd.data.carving import Carving, meaning
from rmdd.data.counts import IngestCounts
from rmdd.data.decode import ImageError, decode_as, is_rotated
from rmdd.data.shards import SPLITS, Pair, ShardWriter
from rmdd.data.source import NO_SPLIT, AnnotationSource, Candidate, SampleSource


@dataclass(frozen=True)
class IngestPart:
    """The input of one part of an ingest: rows from its planning step, a tar file, or row groups of a Parquet file."""

    number: int
    kind: str
    """`listed` if the planning step wrote the rows; otherwise the value of `data.source`, a `SampleSource`."""
    file: str
    """Path of the input file: relative to the plan folder if `kind` is `listed`, otherwise relative to `data.root`."""
    start: int = 0
    stop: int = 0
    """End (exclusive) of the range to read, such as row groups `start` to `stop`; both are 0 to read the whole file."""
    split: str | None = None
    """Split that the source names for all pairs of this part; None if its pairs may be in different splits."""


@dataclass(frozen=True)
class IngestFolders:
    """Paths in the folder of an unfinished ingest: the plan, the record files of finished parts, the new dataset."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan"

    @property
    def parts(self) -> Path:
        """The file that lists all parts of the ingest; it is written last, so it exists once the plan is complete."""
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
        """Return the path of the file that holds the quarantine entries of part `number`."""
        return self.records / f"{number:05d}.jsonl"

    def digests(self, shard: str) -> Path:
        return self.records / f"{shard}.digests"

    def images(self, shard: str) -> Path:
        """Return the path of the table by which the images of a shard are compared with those of other shards."""
        return self.records / f"{shard}.images"


class PartWriter:
    """A worker that writes the shards and the record file of a part of an ingest, or checks a part that exists already.

    With `runtime`, the paths of `folders` are relative to the storage, because each machine may mount the storage
    elsewhere.
    """

    def __init__(self, data: Data, folders: IngestFolders, carving: Carving, runtime: Runtime | None = None):
        self.storage = Storage(Path()) if runtime is None else open_storage(runtime)
        self.data, self.carving, self.folders = data, carving, IngestFolders(self.storage.root / folders.path)
        self.source = sources.find(data)
        self.storage.fetch(self.folders.plan)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write the part that `item` (the fields of an `IngestPart`) describes, or check it if it exists already.

        Returns the part's number, its number of pairs, and `fresh`: whether this call wrote it. Raises `OSError` if
        a disk or the storage fails.
        """
        part = IngestPart(**item)
        try:
            if not self.folders.parts.is_file():
                raise OSError(f"{socket.gethostname()} cannot reach the storage: {self.folders.parts} is missing")
            part_file = re.compile(rf"\b{part.number:05d}\.(parquet|jsonl?)\b")
            self.storage.fetch(self.folders.path, lambda name: part_file.search(name) is not None)
            record = self._finished(part)
            fresh = record is None
            record = record or self._write(part)
        except OSError as error:
            raise OSError(
                f"part {part.number} ({part.file}): {error}; finished parts are kept in {self.folders.path}, so "
                "fix this and start the ingest again to resume it"
            ) from error
        return {"number": part.number, "pairs": sum(s["rows"] for s in record["shards"]), "fresh": fresh}

    def _finished(self, part: IngestPart) -> dict[str, Any] | None:
        """Return the JSON record of a part if the files of the part exist and its shards are intact, otherwise None."""
        path = self.folders.record(part.number)
        if not path.is_file():
            return None
        record: dict[str, Any] = read_json(path)
        for shard in record["shards"]:
            file = self.folders.dataset / shard["file"]
            beside = (self.folders.digests(shard["file"]), self.folders.images(shard["file"]))
            if not file.is_file() or not all(path.is_file() for path in beside):
                return None
            if file.stat().st_size != shard["bytes"] or sha256_file(file) != shard["sha256"]:
                return None
        return record

    def _write(self, part: IngestPart) -> dict[str, Any]:
        counts, folders = IngestCounts(), self.folders
        with contextlib.ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            images: dict[str, list[tuple[int, str]]] = {}
            for pair in self._pairs(part, counts):
                if pair.split not in writers:
                    path = folders.dataset / f"{pair.split}-{part.number:05d}.parquet"
                    writers[pair.split] = stack.enter_context(ShardWriter(path))
                writers[pair.split].append(pair)
                images.setdefault(pair.split, []).append((duplicates.image_number(pair), pair.pair_id))
            shards = [writers[split].finish() for split in SPLITS if split in writers]
        for split, writer in writers.items():
            duplicates.write_table(folders.images(writer.path.name), duplicates.table_of(images[split]))
            with atomic_path(folders.digests(writer.path.name)) as temporary:
                temporary.write_bytes(writer.digests)
        if counts.entries:
            with atomic_path(folders.entries(part.number)) as temporary:
                write_entries(temporary, counts.entries)
        record = {"part": asdict(part), "shards": shards, "counts": counts.as_json()}
        write_json(folders.record(part.number), record)
        return record

    def _pairs(self, part: IngestPart, counts: IngestCounts) -> Iterator[Pair]:
        """Yield the usable image-caption pairs of a part in input order, and count the rejected rows in `counts`."""
        candidates: Iterator[Candidate]
        if part.kind != "listed":
            assert isinstance(self.source, SampleSource)
            candidates = self.source.candidates(part.file, (part.start, part.stop), part.split, self.data, counts)
        else:
            draw = self.source.draw if isinstance(self.source, AnnotationSource) else None
            candidates = planned.candidates(self.folders.plan / part.file, self.data, draw)
        for candidate in candidates:
            try:
                split = candidate.split if part.kind == "listed" else self._split_of(candidate)
                image = _checked(candidate.image, self.data)
            except ImageError as error:
                captions = len(candidate.captions)
                counts.reject(candidate.pair_id, error.reason, candidate.origin, error.detail, captions)
            else:
                turned = self.data.reencode is not None and self.data.exif_orientation
                if isinstance(candidate.image, bytes) and not turned:
                    counts.rotated += is_rotated(candidate.image)
                assert split is not None, "the planning step gives every listed image a split"
                yield Pair(candidate.pair_id, image, candidate.captions, split, candidate.source)

    def _split_of(self, candidate: Candidate) -> str:
        try:
            named = meaning(candidate.split, self.data)
        except ValueError as error:
            raise ImageError("no_split", str(error)) from None
        if named == NO_SPLIT:
            raise ImageError("no_split", "the source names no split for this image")
        return self.carving.split_of(carving_key(candidate, self.data), named, self.data)


def carving_key(candidate: Candidate, data: Data) -> str:
    """Return the key whose hash chooses the split of `candidate`.

    If `data.splits` chooses it, this is a hash of the image, so that all rows of the same image are in one split.
    """
    if data.splits.carves and isinstance(candidate.image, bytes):
        return hashlib.sha256(candidate.image).hexdigest()
    return candidate.pair_id


def numbered(parts: Iterable[IngestPart], source: SampleSource, data: Data) -> Iterator[tuple[str, str | None]]:
    """Read all images of `parts` once, to count them; yield (key, split that the source names) for each image."""
    seen = set()
    for part in parts:
        for candidate in source.candidates(part.file, (part.start, part.stop), part.split, data, IngestCounts()):
            key = carving_key(candidate, data)
            if key not in seen and isinstance(candidate.image, bytes):
                seen.add(key)
                with contextlib.suppress(ValueError):  # rows of unknown splits are left out
                    if (named := meaning(candidate.split, data)) != NO_SPLIT:
                        yield key, named


def write_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write quarantine entries to `path` as JSON lines."""
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(as_lines(entries))


def as_lines(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Yield quarantine entries as JSON lines."""
    return (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


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
