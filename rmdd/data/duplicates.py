"""Images with the same bytes in one dataset: they are counted and named, and `data.duplicates: drop` leaves some out.

While a shard is written, a table beside it gets the id of each pair and the first 8 bytes of the SHA-256 of its image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rmdd.core.files import atomic_path
from rmdd.data.counts import IngestCounts
from rmdd.data.shards import SPLITS, Pair, ShardWriter, shard_pairs

SCHEMA = pa.schema([("image", pa.uint64()), ("pair_id", pa.string())])


def table_of(pairs: Iterable[tuple[int, str]]) -> pa.Table:
    """Return the table of a shard; `pairs` are (`image_number`, pair id)."""
    rows = list(pairs)
    return pa.table({"image": [n for n, _ in rows], "pair_id": [name for _, name in rows]}, schema=SCHEMA)


def image_number(pair: Pair) -> int:
    """Return a number by which the image of a pair is compared with other images."""
    return int.from_bytes(hashlib.sha256(pair.image).digest()[:8], "big")


def write_table(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def joined(shards: list[dict[str, Any]], tables: list[pa.Table], *splits: str) -> pa.Table:
    """Return one table for all shards of `splits`; `shards` are their entries in the manifest."""
    wanted = [table for shard, table in zip(shards, tables, strict=True) if shard["split"] in splits]
    return pa.concat_tables([SCHEMA.empty_table(), *wanted])


def counted(tables: Mapping[str, pa.Table]) -> dict[str, dict[str, int]]:
    """Return the numbers of duplicates among the tables of the splits train, val and test.

    `within` has, for each split, the pairs whose image is also in an earlier pair of the split. `across` has, for each
    two splits, the number of different images that are in both.
    """
    images = {split: np.unique(table["image"].to_numpy()) for split, table in tables.items()}
    across = {f"{a} and {b}": len(np.intersect1d(images[a], images[b])) for a, b in combinations(SPLITS, 2)}
    return {"within": {split: len(tables[split]) - len(images[split]) for split in SPLITS}, "across": across}


def lines(tables: Mapping[str, pa.Table]) -> Iterator[str]:
    """Yield a JSON line for each image that is in several splits, with the pairs that it is in."""
    images = [np.unique(table["image"].to_numpy()) for table in tables.values()]
    values, counts = np.unique(np.concatenate(images), return_counts=True)
    repeated = pa.array(values[counts > 1])
    pairs: dict[int, dict[str, list[str]]] = {}
    for split, table in tables.items():
        for row in table.filter(pc.is_in(table["image"], value_set=repeated)).to_pylist():
            pairs.setdefault(row["image"], {}).setdefault(split, []).append(row["pair_id"])
    for number in sorted(pairs):
        yield json.dumps({"image": f"{number:016x}", "pairs": pairs[number]}, ensure_ascii=False) + "\n"


def without(path: Path, unwanted: pa.Array, counts: IngestCounts) -> tuple[dict[str, Any], bytes, pa.Table]:
    """Rewrite the shard at `path` without the pairs whose images are in `unwanted`, and reject these pairs in `counts`.

    Returns the new entry of the shard in the manifest, the digests of its pairs, and its new table.
    """
    numbers, kept = set(unwanted.to_pylist()), list[tuple[int, str]]()
    with ShardWriter(path) as writer:
        for pair in shard_pairs(path):
            if (number := image_number(pair)) in numbers:
                detail = "the same image is in val or test, and data.duplicates is drop"
                counts.reject(pair.pair_id, "duplicate_image", path.name, detail, len(pair.captions))
            else:
                kept.append((number, pair.pair_id))
                writer.append(pair)
        entry = writer.finish()
    return entry, bytes(writer.digests), table_of(kept)
