"""Annotations and images in, a dataset out: every row ends in a shard or, with its reason, in the quarantine.

The counts of the manifest add up: `rows_in` = pairs + `rows_merged` + all of `quarantine`, and
`captions_in` = captions + all of `captions_dropped`.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rmdd.config import Data
from rmdd.data import sources
from rmdd.data.plan import Plan, make_plan
from rmdd.data.read import Reading, read
from rmdd.data.shards import MANIFEST, QUARANTINE, SCHEMA, SCHEMA_VERSION, Dataset, Pair, ShardWriter
from rmdd.data.sources.layouts import alternatives
from rmdd.files import sha256_file, write_json

Executor = Callable[[Callable[[pa.Table], pa.Table], Iterable[pa.Table]], Iterator[pa.Table]]
"""Maps a function over tables of planned rows and yields its results in order, a few at a time."""

_SHAPING = ("source", "layout", "annotations", "reencode", "shard_mb", "max_pixels")


def ingest(data: Data, out: Path | str, executor: Executor | None = None) -> Dataset:
    """Write `data` as a dataset into the folder `out`, or return the one that an equal ingest finished there.

    The folder appears whole or not at all. Bad rows go to `quarantine.jsonl` and stop nothing; a layout that cannot
    be read, or a folder that holds something else, raises `ValueError`. With `source: dataset` nothing is written:
    it opens `data.root`.
    """
    if data.source == "dataset":
        return Dataset.open(data.root or "")
    out = Path(out)
    rows, annotations = sources.rows(data)
    made_from = {"config": shaping(data), "annotations": {path.name: sha256_file(path) for path in annotations}}
    finished = _finished(out, made_from, data)
    if finished is not None:
        return finished

    plan = make_plan(rows, data)
    _check_root(plan, data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        fresh, stale = Path(temporary) / "fresh", Path(temporary) / "stale"
        fresh.mkdir()
        _write(plan, data, made_from, fresh, executor or map)
        if _finished(out, made_from, data) is None:  # else an equal ingest was quicker, and its dataset may be in use
            if out.exists():  # an empty folder, or a dataset whose missing images have turned up
                os.replace(out, stale)
            try:
                os.replace(fresh, out)
            except OSError:
                if _finished(out, made_from, data) is None:
                    raise
    return Dataset.open(out)


def shaping(data: Data) -> dict[str, Any]:
    """The part of the config that decides what an ingest writes; where things lie is no part of it."""
    dumped = data.model_dump(mode="json")
    value = {name: dumped[name] for name in _SHAPING}
    if data.source in ("scenes", "table"):
        value[data.source] = dumped[data.source]
    if data.source in ("table", "lists"):
        value["split_fractions"] = dumped["split_fractions"]
    if data.reencode:
        value |= {name: dumped[name] for name in ("background", "exif_orientation")}
    return value


def _finished(out: Path, made_from: dict[str, Any], data: Data) -> Dataset | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ValueError(f"{out} is not empty and holds no dataset; give an empty or a new folder")
    dataset = Dataset.open(out)
    found = {name: dataset.manifest[name] for name in made_from}
    if found != made_from:
        wanted, there = made_from["config"], found["config"]
        differing = [name for name in wanted | there if wanted.get(name) != there.get(name)] or ["annotations"]
        raise ValueError(
            f"{out} holds a dataset made from other input ({', '.join(differing)} differ); "
            "give a new folder, or delete this one"
        )
    return None if _turned_up(dataset, data) else dataset


def _turned_up(dataset: Dataset, data: Data) -> bool:
    """Whether an image that was missing at ingest is there now."""
    if not dataset.manifest["quarantine"].get("missing_file"):
        return False
    with open(dataset.path / QUARANTINE, encoding="utf-8") as lines:
        bad = (json.loads(line) for line in lines)
        missing = [entry["file"] for entry in bad if entry["reason"] == "missing_file"]
    root = Path(data.root or "")
    return any((root / place).is_file() for file in missing for place in alternatives(file, data.layout))


def _check_root(plan: Plan, data: Data) -> None:
    """Paths often begin with the very folder that was given as root."""
    root = Path(os.path.abspath(data.root or ""))
    for path in plan.images[:16]:
        doubled = Path(path).parts[0] == root.name and len(Path(path).parts) > 1
        if doubled and not (root / path).is_file() and (root.parent / path).is_file():
            raise ValueError(
                f"image paths start with '{root.name}/', the end of data.root {root}: set data.root to {root.parent}"
            )


def _write(plan: Plan, data: Data, made_from: dict[str, Any], folder: Path, executor: Executor) -> None:
    reading = Reading(
        root=str(Path(data.root or "").absolute()),
        layout=data.layout,
        max_pixels=data.max_pixels,
        background=data.background,
        exif_orientation=data.exif_orientation,
        reencode=data.reencode,
    )
    writer = ShardWriter(folder, int(data.shard_mb * 2**20))
    quarantine, dropped = Counter(plan.quarantine), Counter(plan.captions_dropped)
    with open(folder / QUARANTINE, "w", encoding="utf-8") as bad:

        def report(entry: dict[str, Any]) -> None:
            bad.write(json.dumps(entry, ensure_ascii=False) + "\n")

        for entry in plan.reports:
            report(entry)
        for table in executor(functools.partial(read, reading=reading), plan.tables()):
            for row in table.to_pylist():
                if row["reason"] is None:
                    fields = {name: row[name] for name in SCHEMA.names}
                    writer.append(Pair(**fields | {"captions": tuple(row["captions"])}))
                    continue
                quarantine[row["reason"]] += 1
                dropped["image_quarantined"] += len(row["captions"])
                report({"what": "pair", "file": row["pair_id"]} | {k: row[k] for k in ("reason", "origin", "detail")})
    shards, data_hash = writer.close()
    write_json(
        folder / MANIFEST,
        {
            "schema_version": SCHEMA_VERSION,
            "data_hash": data_hash,
            "counts": writer.counts,
            "rows_in": plan.rows_in,
            "rows_merged": plan.rows_merged,
            "quarantine": dict(sorted(quarantine.items())),
            "captions_in": plan.captions_in,
            "captions_dropped": dict(sorted(dropped.items())),
            "shards": shards,
            "command": shlex.join(sys.argv),
            **made_from,
        },
    )


def quarantined(dataset: Dataset) -> list[dict[str, Any]]:
    """All entries of `quarantine.jsonl`: what (pair or caption), file, reason, origin, detail."""
    text = (dataset.path / QUARANTINE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
