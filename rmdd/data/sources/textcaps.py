"""TextCaps: `{"dataset_name", "data": [{image_id, caption_str, reference_strs, ...}]}`, one record per caption.

The captions of the official test split are not public, so the official val split is used as test, and a hash moves
images from train to a new val split. The images of train and val are in `train_images`. `image_path` is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from rmdd.config import Annotations, Data
from rmdd.data.inputs import InputPath, input_path
from rmdd.data.layouts import describe, find_annotation, read_json_file
from rmdd.data.source import AnnotationRow, AnnotationSource, hash_split

FILES = {"train": "TextCaps_0.1_train.json", "test": "TextCaps_0.1_val.json"}
NOTE = "TextCaps' val split is used as test, because the captions of its test split are not public"


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[InputPath]]:
    root = input_path(data.root)
    named = isinstance(data.annotations, Annotations)
    if isinstance(data.annotations, Annotations):
        files = {split: root / name for split, name in data.annotations.files.items()}
    else:
        files = {split: find_annotation(root, [name], f"TextCaps' {name}") for split, name in FILES.items()}
    held_out = data.split_fractions[1] if "train" in files and not named else 0.0
    parts = [_rows(path, _records(path), split, held_out) for split, path in files.items()]
    return chain.from_iterable(parts), list(files.values())


def _records(path: InputPath) -> list[Any]:
    content = read_json_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError(f"{path}: expected an object with a list `data` (TextCaps), found {describe(content)}")
    records: list[Any] = content["data"]
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), str):
            raise ValueError(f"{path}: record {i} needs a string `image_id`, found {describe(record)}")
        if not {"caption_str", "reference_strs"} & record.keys():
            hint = f"; {NOTE}: use {FILES['test']}" if record.get("set_name") == "test" else ""
            raise ValueError(f"{path}: record {i} has no caption_str and no reference_strs{hint}")
    return records


def _rows(path: InputPath, records: list[dict[str, Any]], split: str, held_out: float) -> Iterator[AnnotationRow]:
    for i, record in enumerate(records):
        image = f"train_images/{record['image_id']}.jpg"
        captions = (record["caption_str"],) if "caption_str" in record else tuple(record["reference_strs"])
        cut = hash_split(image, (1 - held_out, held_out, 0.0)) if split == "train" and held_out else split
        yield AnnotationRow(image, captions, cut, "textcaps", f"{path.name} record {i}")


SOURCE = AnnotationSource(rows, cut_by_hash=True)
