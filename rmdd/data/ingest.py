"""Ingest: write annotations and images as a dataset. Every row is written to a shard or quarantined with a reason.

The counts in the manifest add up: `rows_in` = pairs + `rows_merged` + the sum of `quarantine`, and `captions_in` =
captions + the sum of `captions_dropped`.

The input is first split into parts (`rmdd.data.plan`), each part is written independently (`rmdd.data.parts`), and the
manifest is written last. Until then, an ingest into the folder NAME keeps all its files in a folder `.NAME.parts`
beside NAME; an interrupted ingest resumes from `.NAME.parts`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import operator
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rmdd.config import Data, Runtime, hash_value
from rmdd.config import sources as by_name
from rmdd.config.hashing import hashed
from rmdd.core.files import atomic_path, read_json, remove, write_json
from rmdd.core.locks import hold_folder
from rmdd.core.storage import Storage, open_storage
from rmdd.data import duplicates, sources
from rmdd.data.carving import Carving
from rmdd.data.counts import IngestCounts
from rmdd.data.inputs import InputPath, absolute, hash_of, input_path, is_remote
from rmdd.data.layouts import alternatives
from rmdd.data.losses import check_losses
from rmdd.data.parts import IngestFolders, PartWriter, as_lines, numbered, write_entries
from rmdd.data.plan import IngestPlan, file_parts, make_plan, write_parts
from rmdd.data.shards import DUPLICATES, MANIFEST, QUARANTINE, SCHEMA_VERSION, SPLITS, Dataset
from rmdd.data.source import SampleSource
from rmdd.execution.tasks import Stream, sequential_stream

PARTS_LAYOUT = 3
"""Version of the file format of an unfinished ingest. An ingest begun with a different version starts from scratch."""


def ingest(data: Data, out: Path | str, stream: Stream = sequential_stream, runtime: Runtime | None = None) -> Dataset:
    """Read the images and captions that `data` selects, write them to `out` as a dataset, and return the dataset.

    An existing dataset in `out` is returned if it was made from the same input. The folder `out` appears only when the
    dataset is complete; a second ingest into the same folder waits for the first. Unusable rows are written to
    `quarantine.jsonl` and do not stop the ingest. Raises `ValueError` for unreadable annotations, if `out` holds files
    that are not this dataset, or if too few images are kept (`data.max_loss`); the dataset then stays in `out` with its
    `quarantine.jsonl`. An interrupted ingest keeps its finished parts. With `source: dataset`, the dataset at
    `data.root` is opened and nothing is written. With `runtime`, the dataset is also uploaded to the storage's URI.
    """
    if data.source == "dataset":
        return Dataset.open(data.root or "")
    out = Path(out).absolute()
    if data.root is not None:
        data = data.model_copy(update={"root": absolute(data.root)})
    storage = Storage(out.parent) if runtime is None else open_storage(runtime)
    inputs, contents = _input(data)
    folders = IngestFolders(out.with_name(f".{out.name}.parts"))

    def current_state() -> tuple[Dataset | None, bool]:
        """Return the finished dataset or None, and whether an unfinished ingest has left files."""
        storage.fetch(folders.plan)
        storage.fetch(out)
        started = folders.parts.is_file()
        return _finished(out, inputs, data, half_moved=started and not storage.moves_atomically), started

    finished, started = current_state()
    if finished is not None and not started:
        check_losses(finished, data)
        return finished
    with hold_folder(out.with_name(f".{out.name}"), wait=True) as lease:
        finished, _ = current_state()
        if finished is None:
            parts, carving = _start_or_resume(folders, inputs, contents, data, storage)
            worker_folders = folders if runtime is None else IngestFolders(folders.path.relative_to(storage.root))
            write = functools.partial(PartWriter, data, worker_folders, carving, runtime)
            written = {result["number"] for result in stream(write, parts)}
            assert len(written) == len(parts), f"{len(parts) - len(written)} parts were not written"
            for folder in (folders.plan, folders.records):
                storage.fetch(folder)
            lease.check()
            _finish(folders, inputs, parts, data, storage)
            storage.move(folders.dataset, out)
            storage.fetch(out)
        lease.check()
        # The plan is deleted last, because it tells a later ingest that files of this ingest may be left.
        for folder in (folders.dataset, folders.records, folders.path):
            if folder.is_dir():
                remove(folder)
    dataset = Dataset.open(out)
    check_losses(dataset, data)
    return dataset


def _input(data: Data) -> tuple[dict[str, Any], Any]:
    """Return the identity of the input (config fields, file hashes) and its content: annotation rows or a file list."""
    inputs: dict[str, Any] = {"config": shaping(data), "annotations": {}}
    source = sources.find(data)
    if isinstance(source, SampleSource):
        files = source.files(data)
        inputs["annotations"] = {f"{len(files)} files, names and sizes": hash_value(files)}
        return inputs, files
    rows, annotations = source.rows(data)
    inputs["annotations"] = {name: hash_of(path) for name, path in _names(annotations, data).items()}
    if source.without_list:
        all_rows = list(rows)
        captions = "classes" if data.source == "classes" else "captions"
        names_and_captions = hash_value([[row.image, *map(str, row.captions)] for row in all_rows])
        inputs["annotations"][f"{len(all_rows)} pictures, names and {captions}"] = names_and_captions
        return inputs, iter(all_rows)
    return inputs, rows


def _names(files: list[InputPath], data: Data) -> dict[str, InputPath]:
    """Return the files by name, or by path below `data.root` if two of them have the same name."""
    by_file_name = {path.name: path for path in files}
    if len(by_file_name) == len(files):
        return by_file_name
    return {str(path).removeprefix(str(input_path(data.root))).lstrip("/"): path for path in files}


def _start_or_resume(
    folders: IngestFolders, inputs: dict[str, Any], contents: Any, data: Data, storage: Storage
) -> tuple[list[dict[str, Any]], Carving]:
    """Return the parts and the carving of the unfinished ingest in `folders`; if there is none, plan a new ingest."""
    path, value = folders.parts, {"schema_version": SCHEMA_VERSION, "layout": PARTS_LAYOUT, **inputs}
    if path.is_file() and (plan := read_json(path))["made_from"] == value:
        return plan["parts"], Carving.from_json(plan["carving"])
    remove(folders.path)
    for folder in (folders.plan, folders.dataset):
        folder.mkdir(parents=True)
    counts, parts = IngestCounts(), []
    source = sources.find(data)
    listed: Any = source.rows(contents, data) if isinstance(source, SampleSource) else contents
    if isinstance(source, SampleSource) and listed is None:
        parts = file_parts(source, contents, data)
        carving = Carving.of(data, numbered(parts, source, data))
    else:
        plan = make_plan(listed, data)
        _check_root(plan, data)
        counts, parts, carving = plan.counts, write_parts(plan, data, folders.plan), Carving(())
    write_entries(folders.plan / QUARANTINE, counts.entries)
    entries = [asdict(part) for part in parts]
    storage.publish(folders.plan)
    carved = asdict(carving)
    write_json(path, {"made_from": value, "parts": entries, "carving": carved, "counts": counts.as_json()})
    return entries, carving


def _finish(
    folders: IngestFolders, inputs: dict[str, Any], parts: list[dict[str, Any]], data: Data, storage: Storage
) -> None:
    """Merge the record files of all parts, in part order, into `quarantine.jsonl` and the manifest of the dataset."""
    counts = IngestCounts()
    counts.add(read_json(folders.parts)["counts"])
    records = [read_json(folders.record(part["number"])) for part in parts]
    for record in records:
        counts.add(record["counts"])
    shards = [shard for split in SPLITS for record in records for shard in record["shards"] if shard["split"] == split]
    digests = [folders.digests(shard["file"]).read_bytes() for shard in shards]
    images = [pq.read_table(folders.images(shard["file"])) for shard in shards]
    if data.duplicates == "drop":
        _drop_duplicates(folders.dataset, shards, digests, images, counts, storage)
    with atomic_path(folders.dataset / QUARANTINE) as temporary, open(temporary, "wb") as quarantine:
        quarantine.write((folders.plan / QUARANTINE).read_bytes())
        for part in parts:
            if folders.entries(part["number"]).is_file():
                quarantine.write(folders.entries(part["number"]).read_bytes())
        quarantine.writelines(entry.encode() for entry in as_lines(counts.entries))
    tables = {split: duplicates.joined(shards, images, split) for split in SPLITS}
    repeated = duplicates.counted(tables)
    if any(repeated["across"].values()):
        with atomic_path(folders.dataset / DUPLICATES) as temporary:
            temporary.write_text("".join(duplicates.lines(tables)), encoding="utf-8")
    for temporary_file in folders.dataset.glob(".*.tmp"):  # killed workers leave temporary files
        remove(temporary_file)
    sizes = {split: [s for s in shards if s["split"] == split] for split in SPLITS}
    write_json(
        folders.dataset / MANIFEST,
        {
            "schema_version": SCHEMA_VERSION,
            "data_hash": hashlib.sha256(b"".join(digests)).hexdigest(),
            "counts": {
                split: {"pairs": sum(s["rows"] for s in of_split), "captions": sum(s["captions"] for s in of_split)}
                for split, of_split in sizes.items()
            },
            **{name: dict(sorted(n.items())) if isinstance(n, dict) else n for name, n in counts.as_json().items()},
            "duplicates": repeated,
            "shards": shards,
            "command": shlex.join(sys.argv),
            **inputs,
        },
    )


def _drop_duplicates(
    dataset: Path,
    shards: list[dict[str, Any]],
    digests: list[bytes],
    images: list[pa.Table],
    counts: IngestCounts,
    storage: Storage,
) -> None:
    """Leave images of val and test out of the shards of train; the lists, with an entry per shard, are changed too."""
    held_out = duplicates.joined(shards, images, "val", "test")["image"].combine_chunks()
    for i, shard in enumerate(shards):
        repeated = pc.any(pc.is_in(images[i]["image"], value_set=held_out)).as_py()
        if shard["split"] == "train" and repeated:
            storage.fetch(dataset, functools.partial(operator.eq, shard["file"]))
            shards[i], digests[i], images[i] = duplicates.without(dataset / shard["file"], held_out, counts)


def shaping(data: Data) -> dict[str, Any]:
    """Return the fields of `data` that change the content of a dataset; paths are not among them."""
    value, source = hashed(data, "ingest"), by_name.find(data.source)
    if not (isinstance(source, SampleSource) or source.cut_by_hash) and data.splits.from_source:
        del value["split_fractions"]
    return value


def _finished(out: Path, inputs: dict[str, Any], data: Data, half_moved: bool) -> Dataset | None:
    """Return the dataset in `out` if it is complete and made from `inputs`, otherwise None.

    `half_moved` means that an interrupted move may have left files in `out` without a manifest. Raises `ValueError` if
    `out` holds a dataset made from different input, or files that are no dataset.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        if half_moved:
            return None
        raise ValueError(f"{out} is not empty and is not a dataset; give an empty or a new folder for the dataset")
    dataset = Dataset.open(out)
    recorded = {name: dataset.manifest[name] for name in inputs}
    if recorded != inputs:
        if differing := _differing(inputs["config"], recorded["config"]):
            raise ValueError(
                f"{out} holds a dataset made with other settings ({', '.join(differing)} differ); "
                "give a new folder for the dataset, or delete this one"
            )
        changed = "; ".join(_differing(inputs["annotations"], recorded["annotations"]))
        raise ValueError(
            f"the annotations changed ({changed}) since the dataset in {out} was written; to use the new annotations, "
            "delete this folder and change `name` in the run file: results of the old data stay in the old run folder"
        )
    return None if _missing_image_exists_now(dataset, data) else dataset


def _differing(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    return [name for name in new | old if new.get(name) != old.get(name)]


def _missing_image_exists_now(dataset: Dataset, data: Data) -> bool:
    """Return whether an image file that was missing during the ingest exists now; always False for a remote store."""
    if not dataset.manifest["quarantine"].get("missing_file") or is_remote(data.root):
        return False  # checking each image would cost a request to the remote store
    with open(dataset.path / QUARANTINE, encoding="utf-8") as lines:
        bad = (json.loads(line) for line in lines)
        missing = [entry["file"] for entry in bad if entry["reason"] == "missing_file"]
    root = Path(data.root or "")
    return any((root / name).is_file() for file in missing for name in alternatives(file, data.layout))


def _check_root(plan: IngestPlan, data: Data) -> None:
    """Raise `ValueError` if image paths begin with the last folder name of `data.root`, which is a common mistake."""
    if is_remote(data.root):
        return
    root = Path(data.root or "")
    for path in itertools.islice(plan.images(), 16):
        doubled = Path(path).parts[0] == root.name and len(Path(path).parts) > 1
        if doubled and not (root / path).is_file() and (root.parent / path).is_file():
            raise ValueError(
                f"image paths repeat '{root.name}/', the end of data.root {root}: set data.root to {root.parent}"
            )


def quarantined(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the entries of `quarantine.jsonl`, with keys what (pair or caption), file, reason, origin and detail."""
    text = (dataset.path / QUARANTINE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
