"""Features on disk: memory-mapped files of feature rows, and files of the ids of these rows.

    rows.json                      schema version, rows, width, dtype, files, origin of the rows
    part-00000.npy  (n, D)         float16 or float32
    part-00000.ids.npy  (n,)       int64

N rows, D features.
"""

import bisect
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from rmdd.core.files import atomic_path, read_json, write_json

SCHEMA_VERSION = 1
DESCRIPTION = "rows.json"
ROWS_PER_FILE = 262_144
CHUNK_BYTES = 32 * 2**20
"""Size in bytes of the float32 rows that are processed at once."""

RowBlock = tuple[Int64[np.ndarray, " _"], Float[np.ndarray, "_ _"]]
"""Ids and feature rows of one block. Blocks may have different numbers of rows."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A matrix of feature rows with distinct ids, in memory or memory-mapped from files; rows are read as float32."""

    parts: tuple[RowBlock, ...]
    width: int
    folder: Path | None = None
    """Folder of the mapped files, or None for rows in memory."""

    @classmethod
    def of(cls, rows: np.ndarray, ids: Sequence[int] | np.ndarray | None = None) -> "Rows":
        """Return the array `rows` (N, D) as `Rows` in memory; the default ids are 0 to N - 1."""
        numbers = np.arange(len(rows)) if ids is None else np.asarray(ids)
        if rows.ndim != 2 or numbers.shape != (len(rows),):
            raise ValueError(f"rows must be (N, D) with N ids, found shapes {rows.shape} and {numbers.shape}")
        if len(np.unique(numbers)) != len(numbers):
            raise ValueError("the ids of rows must be distinct, but some occur twice")
        return cls(((numbers.astype(np.int64), rows),), rows.shape[1])

    @classmethod
    def open(cls, folder: Path | str) -> "Rows":
        """Map the feature files of a folder. Raises `ValueError` if it has none or a different schema version."""
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            raise ValueError(f"{folder} holds no features (no {DESCRIPTION}); delete the folder to compute them again")
        facts = read_json(folder / DESCRIPTION)
        if facts["schema_version"] != SCHEMA_VERSION:
            version = facts["schema_version"]
            raise ValueError(
                f"{folder} has schema version {version}, this rmdd reads {SCHEMA_VERSION}; delete it and compute again"
            )
        parts = tuple(
            (np.load(folder / _ids(name), mmap_mode="r"), np.load(folder / name, mmap_mode="r"))
            for name in facts["files"]
        )
        return cls(parts, facts["width"], folder)

    def __len__(self) -> int:
        return self._ends[-1]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return [0, *np.cumsum([len(ids) for ids, _ in self.parts]).tolist()]

    @functools.cached_property
    def ids(self) -> Int64[np.ndarray, " N"]:
        return np.concatenate([ids for ids, _ in self.parts]) if self.parts else np.zeros(0, np.int64)

    @property
    def chunk(self) -> int:
        """Number of rows to process at once, so that they take about `CHUNK_BYTES` as float32."""
        return max(1, CHUNK_BYTES // (4 * max(1, self.width)))

    def share(self, rank: int, size: int) -> "Rows":
        """Return the consecutive rows that belong to worker number `rank` of `size` workers."""
        count = len(self)
        return self.between(count * rank // size, count * (rank + 1) // size)

    def between(self, start: int, stop: int) -> "Rows":
        """Return the rows at positions `start` to `stop` - 1."""
        parts = []
        for (ids, rows), first in zip(self.parts, self._ends, strict=False):
            low, high = max(start - first, 0), min(stop - first, len(ids))
            if low < high:
                parts.append((ids[low:high], rows[low:high]))
        return Rows(tuple(parts), self.width)

    def chunks(self, size: int | None = None) -> Iterator[tuple[slice, Float32[np.ndarray, "n D"]]]:
        """Yield all rows in chunks of at most `size` rows: the slice of the chunk's positions, and its float32 rows."""
        size = self.chunk if size is None else size
        for (_, rows), first in zip(self.parts, self._ends, strict=False):
            buffer = torch.empty((min(size, len(rows)) if rows.dtype == np.float16 else 0, self.width))
            for start in range(0, len(rows), size):
                block = rows[start : start + size]
                if block.dtype == np.float16:  # for float16, torch converts several times faster than numpy
                    block = buffer[: len(block)].copy_(torch.from_numpy(np.array(block))).numpy()
                yield slice(first + start, first + start + len(block)), _float32(block)

    def at(self, positions: Sequence[int] | np.ndarray) -> Float32[np.ndarray, "n D"]:
        """Return copies of the rows at `positions`, as float32."""
        positions = [int(p) for p in positions]
        values = np.empty((len(positions), self.width), np.float32)
        for i, position in enumerate(positions):
            part = bisect.bisect_right(self._ends, position) - 1
            values[i] = self.parts[part][1][position - self._ends[part]]
        return values


def write_rows(folder: Path, blocks: Iterable[RowBlock], width: int, dtype: str, facts: Mapping[str, Any]) -> Rows:
    """Write blocks of feature rows into a new folder, in files of about `ROWS_PER_FILE` rows; return them as `Rows`."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        names: list[str] = []
        pending: list[RowBlock] = []
        count = total = 0

        def flush() -> None:
            names.append(f"part-{len(names):05d}.npy")
            np.save(temporary / names[-1], np.concatenate([rows for _, rows in pending]).astype(dtype, copy=False))
            np.save(temporary / _ids(names[-1]), np.concatenate([ids for ids, _ in pending]))
            pending.clear()

        for ids, rows in blocks:
            pending.append((ids.astype(np.int64, copy=False), rows.astype(dtype, copy=False)))
            count += len(ids)
            total += len(ids)
            if count >= ROWS_PER_FILE:
                flush()
                count = 0
        if pending:
            flush()
        about = {"schema_version": SCHEMA_VERSION, "rows": total, "width": width, "dtype": dtype, "files": names}
        write_json(temporary / DESCRIPTION, about | {"facts": dict(facts)})
    return Rows.open(folder)


def _ids(name: str) -> str:
    return name.removesuffix(".npy") + ".ids.npy"


def _float32(rows: np.ndarray) -> Float32[np.ndarray, "n D"]:
    return np.ascontiguousarray(rows, dtype=np.float32)
