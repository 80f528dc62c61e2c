"""Annotations and images in, a dataset out: every row ends in a shard or, with its reason, in the quarantine.

The counts of the manifest add up: `rows_in` = pairs + `rows_merged` + all of `quarantine`, and
`captions_in` = captions + all of `captions_dropped`.

An ingest is cut into parts first (`rmdd.data.plan`), each part is written by itself (`rmdd.data.parts`), and the
manifest is made last. Until then all lies in a folder `.NAME.parts` beside the dataset to be, where an ingest that was
stopped goes on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmdd.config import Data, Runtime, hash_value
from rmdd.config import sources as by_name
from rmdd.config.hashing import hashed
from rmdd.core.files import atomic_path, read_json, remove, write_json
from rmdd.core.locks import hold_folder
from rmdd.core.storage import Storage, open_storage
from rmdd.data import sources
from rmdd.data.counts import IngestCounts
from rmdd.data.inputs import absolute, hash_of, is_remote
from rmdd.data.layouts import alternatives
from rmdd.data.parts import IngestFolders, PartWriter, write_entries
from rmdd.data.plan import IngestPlan, file_parts, make_plan, write_parts
from rmdd.data.shards import MANIFEST, QUARANTINE, SCHEMA_VERSION, SPLITS, Dataset
from rmdd.data.source import SampleSource
from rmdd.execution.tasks import Stream, sequential_stream

PARTS_LAYOUT = 2
"""Of the plan and the records of an unfinished ingest; one that another version began is done anew."""


def ingest(data: Data, out: Path | str, stream: Stream = sequential_stream, runtime: Runtime | None = None) -> Dataset:
    """Write `data` as a dataset into the folder `out`, or return the one that an equal ingest finished there.

    The folder appears whole or not at all; a second ingest into it waits for the first. Bad rows go to
    `quarantine.jsonl` and stop nothing; a layout that cannot be read, or a folder that holds something else, raises
    `ValueError`. What was finished when an ingest died is not done again. With `source: dataset` nothing is written:
    it opens `data.root`. `runtime` says in which storage `out` lies, if its URI is to have it too.
    """
    if data.source == "dataset":
        return Dataset.open(data.root or "")
    out = Path(out).absolute()
    if data.root is not None:
        data = data.model_copy(update={"root": absolute(data.root)})
    storage = Storage(out.parent) if runtime is None else open_storage(runtime)
    inputs, read = _input(data)
    folders = IngestFolders(out.with_name(f".{out.name}.parts"))

    def look() -> tuple[Dataset | None, bool]:
        """The finished dataset, and whether an ingest was begun or left something."""
        storage.fetch(folders.plan)
        storage.fetch(out)
        begun = folders.parts.is_file()
        return _finished(out, inputs, data, half_moved=begun and not storage.moves_atomically), begun

    finished, begun = look()
    if finished is not None and not begun:
        return finished
    with hold_folder(out.with_name(f".{out.name}"), wait=True) as lease:
        finished, _ = look()
        if finished is None:
            parts = _begin(folders, inputs, read, data, storage)
            anywhere = folders if runtime is None else IngestFolders(folders.path.relative_to(storage.root))
            write = functools.partial(PartWriter, data, anywhere, runtime)
            written = {result["number"] for result in stream(write, parts)}
            assert len(written) == len(parts), f"{len(parts) - len(written)} parts were never read"
            for folder in (folders.plan, folders.records):
                storage.fetch(folder)
            lease.check()
            _finish(folders, inputs, parts)
            storage.move(folders.dataset, out)
            storage.fetch(out)
        lease.check()
        for left in (folders.dataset, folders.records, folders.path):  # the plan last: it says that something is left
            if left.is_dir():
                remove(left)
    return Dataset.open(out)


def _input(data: Data) -> tuple[dict[str, Any], Any]:
    """What the dataset is made from, and how to go on: rows of annotations, or files."""
    inputs: dict[str, Any] = {"config": shaping(data), "annotations": {}}
    source = sources.find(data)
    if isinstance(source, SampleSource):
        files = source.files(data)
        inputs["annotations"] = {f"{len(files)} files, names and sizes": hash_value(files)}
        return inputs, files
    rows, annotations = source.rows(data)
    inputs["annotations"] = {path.name: hash_of(path) for path in annotations}
    if source.without_list:
        listed = list(rows)
        named = hash_value([[row.image, *row.captions] for row in listed])
        inputs["annotations"][f"{len(listed)} pictures, names and classes"] = named
        return inputs, iter(listed)
    return inputs, rows


def _begin(
    folders: IngestFolders, inputs: dict[str, Any], read: Any, data: Data, storage: Storage
) -> list[dict[str, Any]]:
    """The parts of the ingest that was begun here, or of a new plan."""
    path, value = folders.parts, {"schema_version": SCHEMA_VERSION, "layout": PARTS_LAYOUT, **inputs}
    if path.is_file() and (plan := read_json(path))["made_from"] == value:
        return plan["parts"]
    remove(folders.path)
    for folder in (folders.plan, folders.dataset):
        folder.mkdir(parents=True)
    counts, parts = IngestCounts(), []
    source = sources.find(data)
    if isinstance(source, SampleSource):
        parts = file_parts(source, read, data)
    else:
        plan = make_plan(read, data)
        _check_root(plan, data)
        counts, parts = plan.counts, write_parts(plan, data, folders.plan)
    write_entries(folders.plan / QUARANTINE, counts.entries)
    listed = [asdict(part) for part in parts]
    storage.publish(folders.plan)
    write_json(path, {"made_from": value, "parts": listed, "counts": counts.as_json()})
    return listed


def _finish(folders: IngestFolders, inputs: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Quarantine and manifest, from the records in the order of the parts."""
    counts, content = IngestCounts(), hashlib.sha256()
    counts.add(read_json(folders.parts)["counts"])
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with atomic_path(folders.dataset / QUARANTINE) as temporary, open(temporary, "wb") as quarantine:
        quarantine.write((folders.plan / QUARANTINE).read_bytes())
        for part in parts:
            record = read_json(folders.record(part["number"]))
            counts.add(record["counts"])
            for shard in record["shards"]:
                shards[shard["split"]].append(shard)
            if folders.entries(part["number"]).is_file():
                quarantine.write(folders.entries(part["number"]).read_bytes())
    for shard in (shard for split in SPLITS for shard in shards[split]):
        content.update(folders.digests(shard["file"]).read_bytes())
    for left in folders.dataset.glob(".*.tmp"):  # of workers that were killed
        remove(left)
    write_json(
        folders.dataset / MANIFEST,
        {
            "schema_version": SCHEMA_VERSION,
            "data_hash": content.hexdigest(),
            "counts": {
                split: {"pairs": sum(s["rows"] for s in of_split), "captions": sum(s["captions"] for s in of_split)}
                for split, of_split in shards.items()
            },
            **{name: dict(sorted(n.items())) if isinstance(n, dict) else n for name, n in counts.as_json().items()},
            "shards": [shard for split in SPLITS for shard in shards[split]],
            "command": shlex.join(sys.argv),
            **inputs,
        },
    )


def shaping(data: Data) -> dict[str, Any]:
    """The part of the config that decides what an ingest writes; where things lie is no part of it."""
    value, source = hashed(data, "ingest"), by_name.find(data.source)
    if not (isinstance(source, SampleSource) or source.cut_by_hash):
        del value["split_fractions"]
    return value


def _finished(out: Path, inputs: dict[str, Any], data: Data, half_moved: bool) -> Dataset | None:
    """`half_moved`: without its manifest `out` is what a move that was killed has brought there so far."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        if half_moved:
            return None
        raise ValueError(f"{out} is not empty and holds no dataset; give an empty or a new folder")
    dataset = Dataset.open(out)
    recorded = {name: dataset.manifest[name] for name in inputs}
    if recorded != inputs:
        wanted, there = inputs["config"], recorded["config"]
        differing = [name for name in wanted | there if wanted.get(name) != there.get(name)] or ["annotations"]
        raise ValueError(
            f"{out} holds a dataset made from other input ({', '.join(differing)} differ); "
            "give a new folder, or delete this one"
        )
    return None if _turned_up(dataset, data) else dataset


def _turned_up(dataset: Dataset, data: Data) -> bool:
    """Whether an image that was missing at ingest is there now."""
    if not dataset.manifest["quarantine"].get("missing_file") or is_remote(data.root):
        return False  # at a remote store each look is a request
    with open(dataset.path / QUARANTINE, encoding="utf-8") as lines:
        bad = (json.loads(line) for line in lines)
        missing = [entry["file"] for entry in bad if entry["reason"] == "missing_file"]
    root = Path(data.root or "")
    return any((root / name).is_file() for file in missing for name in alternatives(file, data.layout))


def _check_root(plan: IngestPlan, data: Data) -> None:
    """Paths often begin with the very folder that was given as root."""
    if is_remote(data.root):
        return
    root = Path(data.root or "")
    for path in itertools.islice(plan.images(), 16):
        doubled = Path(path).parts[0] == root.name and len(Path(path).parts) > 1
        if doubled and not (root / path).is_file() and (root.parent / path).is_file():
            raise ValueError(
                f"image paths start with '{root.name}/', the end of data.root {root}: set data.root to {root.parent}"
            )


def quarantined(dataset: Dataset) -> list[dict[str, Any]]:
    """All entries of `quarantine.jsonl`: what (pair or caption), file, reason, origin, detail."""
    text = (dataset.path / QUARANTINE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
