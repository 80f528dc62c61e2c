"""A dataset on disk: Parquet shards of pairs, and a manifest that is written last.

A shard holds pairs of one split, in order. The hash of a dataset covers its rows only: neither the folder it lies
in, nor how the rows are cut into shards, nor the version of the Parquet writer changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.files import read_json, sha256_file

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"

SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("source", pa.string()),
    ]
)

_ROWS_PER_GROUP = 64
_BYTES_PER_GROUP = 16 * 2**20


@dataclass(frozen=True)
class Pair:
    pair_id: str
    image: bytes = field(repr=False)
    captions: tuple[str, ...]
    split: str
    source: str

    def digest(self) -> bytes:
        """SHA-256 over all fields, each with its length in front."""
        digest = hashlib.sha256()
        texts = (self.pair_id, self.split, self.source, *self.captions)
        for data in (self.image, *(text.encode() for text in texts)):
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()


class ShardWriter:
    """Appends pairs, split by split; a shard is closed when its images reach `shard_bytes` or the split changes.

    Holds one row group in memory. `close()` returns what the manifest needs.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[dict[str, Any]] = []
        self.counts = {split: {"pairs": 0, "captions": 0} for split in SPLITS}
        self._content = hashlib.sha256()
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[Pair] = []
        self._split: str | None = None
        self._numbers = dict.fromkeys(SPLITS, 0)
        self._shard_content = hashlib.sha256()
        self._shard_rows = self._shard_size = self._group_size = 0

    def append(self, pair: Pair) -> None:
        assert pair.captions and pair.split in SPLITS
        if pair.split != self._split or self._shard_size >= self.shard_bytes:
            self._finish_shard()
            self._split = pair.split
        digest = pair.digest()
        self._content.update(digest)
        self._shard_content.update(digest)
        self._rows.append(pair)
        self._shard_rows += 1
        self._shard_size += len(pair.image)
        self.counts[pair.split]["pairs"] += 1
        self.counts[pair.split]["captions"] += len(pair.captions)
        self._group_size += len(pair.image)
        if len(self._rows) == _ROWS_PER_GROUP or self._group_size >= _BYTES_PER_GROUP:
            self._flush()

    def close(self) -> tuple[list[dict[str, Any]], str]:
        """Finish the last shard; the shard entries and the hash of all rows in order."""
        self._finish_shard()
        return self.shards, self._content.hexdigest()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self._split}-{self._numbers[self._split or '']:05d}.parquet"

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, SCHEMA, compression="zstd", use_dictionary=["split", "source"], write_statistics=["pair_id"]
            )
        columns = {name: [getattr(pair, name) for pair in self._rows] for name in SCHEMA.names}
        self._writer.write_table(pa.table(columns, schema=SCHEMA))
        self._rows, self._group_size = [], 0

    def _finish_shard(self) -> None:
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        path, rows = self._path, self._shard_rows
        self.shards.append(
            {
                "file": path.name,
                "split": self._split,
                "rows": rows,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
                "content": self._shard_content.hexdigest(),
            }
        )
        self._numbers[self._split or ""] += 1
        self._shard_content = hashlib.sha256()
        self._shard_rows = self._shard_size = 0


class Dataset:
    """A finished folder of shards. `open` checks that all of it is there, `verify` that every byte is right."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Raises `ValueError` when the folder is no dataset, of another schema version, or incomplete."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{path} is not a dataset: it has no {MANIFEST}; write one with `rmdd ingest`")
        try:
            manifest = read_json(path / MANIFEST)
            version = manifest["schema_version"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path / MANIFEST} is not a manifest; ingest again into an empty folder") from None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version}, this rmdd reads {SCHEMA_VERSION}; ingest again")
        for shard in manifest["shards"]:
            file = path / shard["file"]
            if not file.is_file():
                raise ValueError(f"{path}: shard {shard['file']} is missing; copy it again or ingest again")
            if file.stat().st_size != shard["bytes"]:
                found = file.stat().st_size
                raise ValueError(f"{file} has {found} bytes, the manifest says {shard['bytes']}; copy it again")
            rows = pq.read_metadata(file).num_rows
            if rows != shard["rows"]:
                raise ValueError(f"{file} holds {rows} pairs, the manifest says {shard['rows']}; ingest again")
        return cls(path, manifest)

    @property
    def hash(self) -> str:
        """Hash of all rows in order."""
        return self.manifest["data_hash"]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """`{"train": {"pairs": ..., "captions": ...}, ...}`"""
        return self.manifest["counts"]

    def columns(self, split: str, *names: str) -> Iterator[tuple[Any, ...]]:
        """The named columns of a split row by row, in order; reads no other column."""
        if split not in SPLITS:
            raise ValueError(f"no split '{split}'; there are: {', '.join(SPLITS)}")
        for shard in self.manifest["shards"]:
            if shard["split"] == split:
                with pq.ParquetFile(self.path / shard["file"]) as file:
                    for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, columns=list(names)):
                        yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)

    def pairs(self, split: str) -> Iterator[Pair]:
        for pair_id, image, captions, own, source in self.columns(split, *SCHEMA.names):
            yield Pair(pair_id, image, tuple(captions), own, source)

    def verify(self) -> None:
        """Read everything and compare file hashes, row hashes and counts; `ValueError` names the first difference."""
        content = hashlib.sha256()
        for shard in self.manifest["shards"]:
            if sha256_file(self.path / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.path / shard['file']} was changed after ingest; copy it again or ingest again")
        found = {}
        for split in SPLITS:
            found[split] = {"pairs": 0, "captions": 0}
            for pair in self.pairs(split):
                content.update(pair.digest())
                found[split]["pairs"] += 1
                found[split]["captions"] += len(pair.captions)
        if found != self.counts:
            raise ValueError(f"{self.path} holds {found}, its manifest says {self.counts}; ingest again")
        if content.hexdigest() != self.hash:
            raise ValueError(f"{self.path}: its rows are not those of its manifest (data_hash); ingest again")
