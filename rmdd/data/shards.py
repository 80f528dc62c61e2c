"""A dataset on disk: Parquet shards of image-caption pairs, and a manifest that is written last.

A shard holds pairs of one split (train, val or test), in order. The hash of a dataset covers only its rows; the hash
does not depend on the folder, on how the rows are divided into shards, or on the version of the Parquet writer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.config import Data
from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import atomic_path, read_json, sha256_file

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
DUPLICATES = "duplicates.jsonl"

SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("source", pa.string()),
    ]
)

_ROWS_PER_GROUP = 512
_BYTES_PER_GROUP = 16 * 2**20
_ROWS_PER_READ = 64


@dataclass(frozen=True)
class Pair:
    pair_id: str
    image: bytes = field(repr=False)
    captions: tuple[str, ...]
    split: str
    source: str

    def digest(self) -> bytes:
        """Return the SHA-256 of all fields of the pair; each field is preceded by its length in bytes."""
        digest = hashlib.sha256()
        texts = (self.pair_id, self.split, self.source, *self.captions)
        for data in (self.image, *(text.encode() for text in texts)):
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()


class ShardWriter:
    """Writer of one shard file. The file appears only when it is complete; one row group is held in memory.

    >>> with ShardWriter(folder / "train-00000.parquet") as writer:  # doctest: +SKIP
    ...     writer.append(pair)
    ...     entry = writer.finish()
    """

    def __init__(self, path: Path):
        self.path = path
        self.digests = bytearray()
        """The concatenated SHA-256 digests of all pairs written so far."""
        self._captions = 0
        self._rows: list[Pair] = []
        self._group_size = 0

    def __enter__(self) -> ShardWriter:
        self._atomic_path = atomic_path(self.path)
        self._temporary = self._atomic_path.__enter__()
        self._writer = pq.ParquetWriter(
            self._temporary,
            SCHEMA,
            compression="zstd",
            use_dictionary=["split", "source"],
            write_statistics=["pair_id"],
        )
        return self

    def __exit__(self, *error: Any) -> None:
        # `finish` has already closed a complete shard; for an incomplete shard, an error is already being raised.
        with contextlib.suppress(OSError):
            self._writer.close()
        self._atomic_path.__exit__(*error)

    def append(self, pair: Pair) -> None:
        assert pair.captions and pair.split in SPLITS
        self.digests += pair.digest()
        self._captions += len(pair.captions)
        self._rows.append(pair)
        self._group_size += len(pair.image)
        if len(self._rows) == _ROWS_PER_GROUP or self._group_size >= _BYTES_PER_GROUP:
            self._flush()

    def finish(self) -> dict[str, Any]:
        """Write the pairs still in memory, and return the manifest entry of this shard."""
        self._flush()
        self._writer.close()
        return {
            "file": self.path.name,
            "split": self.path.name.split("-")[0],
            "rows": len(self.digests) // hashlib.sha256().digest_size,
            "captions": self._captions,
            "bytes": self._temporary.stat().st_size,
            "sha256": sha256_file(self._temporary),
            "content": hashlib.sha256(self.digests).hexdigest(),
        }

    def _flush(self) -> None:
        if self._rows:
            columns = {name: [getattr(pair, name) for pair in self._rows] for name in SCHEMA.names}
            self._writer.write_table(pa.table(columns, schema=SCHEMA))
            self._rows, self._group_size = [], 0


class Dataset:
    """A complete dataset on disk. `open` checks the existence and size of all shards; `verify` checks every byte."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Open a dataset. Raises `ValueError` if `path` is no complete dataset of the current schema version."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{path} is not a dataset: it has no {MANIFEST}; make a dataset with `rmdd ingest`")
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
                size = file.stat().st_size
                raise ValueError(f"{file} has {size} bytes, the manifest says {shard['bytes']}; copy it again")
            rows = pq.read_metadata(file).num_rows
            if rows != shard["rows"]:
                raise ValueError(f"{file} holds {rows} pairs, the manifest says {shard['rows']}; ingest again")
        return cls(path, manifest)

    @property
    def hash(self) -> str:
        """The hash over all rows of the dataset in order, as hexadecimal digits."""
        digest: str = self.manifest["data_hash"]
        return digest

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """The number of pairs and captions per split: `{"train": {"pairs": ..., "captions": ...}, ...}`."""
        counts: dict[str, dict[str, int]] = self.manifest["counts"]
        return counts

    def remarks(self, data: Data) -> list[str]:
        """Return a line for rejected rows, for images in two splits or two pairs, and for ignored EXIF orientations.

        `data` is the section of the run that reads this dataset.
        """
        manifest, lines = self.manifest, []
        if reasons := ", ".join(f"{n} {reason}" for reason, n in manifest["quarantine"].items()):
            lines.append(f"quarantine: {reasons}; see {self.path / QUARANTINE}")
        repeated = manifest.get("duplicates", {"across": {}, "within": {}})  # manifests of 0.1 have no such counts
        if across := ", ".join(f"{n} in {splits}" for splits, n in repeated["across"].items() if n):
            advice = "ingest it again with" if data.source == "dataset" else "set"
            advice = f"; {advice} data.duplicates: drop to leave them out of train" if "train" in across else ""
            found = f"the same images, byte for byte, are in two splits ({across}), so scores may be too high"
            lines.append(f"{found}; see {self.path / DUPLICATES}{advice}")
        if within := ", ".join(f"{n} in {split}" for split, n in repeated["within"].items() if n):
            lines.append(f"pairs whose image is also in another pair of the same split: {within}")
        if (rotated := manifest.get("rotated")) and not data.exif_orientation:
            lines.append(
                f"{rotated} images have an EXIF orientation, which data.exif_orientation: false ignores; set it to "
                "true to turn them upright"
            )
        return lines

    def columns(self, split: str, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a split in order, as tuples of the columns `names`; only these columns are read."""
        if split not in SPLITS:
            raise ValueError(f"unknown split '{split}'; available: {', '.join(SPLITS)}")
        for shard in self.manifest["shards"]:
            if shard["split"] == split:
                yield from _columns(self.path / shard["file"], names)

    def pairs(self, split: str) -> Iterator[Pair]:
        for pair_id, image, captions, split_name, source in self.columns(split, *SCHEMA.names):
            yield Pair(pair_id, image, tuple(captions), split_name, source)

    def verify(self) -> None:
        """Read all shards and compare file hashes, row hashes and counts with the manifest.

        Raises `ValueError` with the first difference.
        """
        content = hashlib.sha256()
        for shard in self.manifest["shards"]:
            if sha256_file(self.path / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.path / shard['file']} was changed after ingest; copy it again or ingest again")
        counts = {}
        for split in SPLITS:
            counts[split] = {"pairs": 0, "captions": 0}
            for pair in self.pairs(split):
                content.update(pair.digest())
                counts[split]["pairs"] += 1
                counts[split]["captions"] += len(pair.captions)
        if counts != self.counts:
            raise ValueError(f"{self.path} holds {counts}, its manifest says {self.counts}; ingest again")
        if content.hexdigest() != self.hash:
            raise ValueError(f"{self.path}: its rows do not match data_hash in its manifest; ingest again")


def shard_pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of one shard file in order."""
    for pair_id, image, captions, split, source in _columns(path, SCHEMA.names):
        yield Pair(pair_id, image, tuple(captions), split, source)


def _columns(path: Path, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ, columns=list(names)):
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def verify(path: Path, check: DiskCheck) -> None:
    """Check all shards of the dataset at `path` against its manifest, row by row, and report each fault to `check`."""
    if not check.begin(path):
        return
    before = len(check.findings.faults)
    copy = "copy the file again, or delete the dataset and run `rmdd ingest` again"
    manifest = check.json(path / MANIFEST, copy)
    with check.errors_as_faults(path / MANIFEST, copy):
        for shard in manifest["shards"]:
            file = path / shard["file"]
            if not file.is_file():
                check.fault(file, "is missing", copy)
            elif file.stat().st_size != shard["bytes"]:
                check.fault(file, f"has {file.stat().st_size} bytes, the manifest says {shard['bytes']}", copy)
            elif sha256_file(file) != shard["sha256"]:
                check.fault(file, "has a SHA-256 that differs from the manifest", copy)
    if len(check.findings.faults) == before:
        with check.errors_as_faults(path, copy):
            Dataset.open(path).verify()


FORMAT = Format((MANIFEST,), "data/*", verify, always_marked=False)
