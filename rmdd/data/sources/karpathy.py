"""Karpathy's `dataset_*.json`: one file with all splits, `{"dataset": ..., "images": [{filename, split, sentences}]}`.

The split `restval` is part of train, as in all papers. Captions come from the field `raw` of a sentence, because the
field `tokens` lacks case and punctuation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rmdd.config import Data
from rmdd.data.inputs import InputPath, input_path
from rmdd.data.layouts import KARPATHY, describe, find_annotation, read_json_file
from rmdd.data.source import AnnotationRow, AnnotationSource


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[InputPath]]:
    root = input_path(data.root)
    if isinstance(data.annotations, str):
        path = root / data.annotations
    elif data.layout in KARPATHY:
        path = find_annotation(root, [KARPATHY[data.layout]], f"the Karpathy file of layout '{data.layout}'")
    else:
        raise ValueError(f"layout '{data.layout}' has no Karpathy file; set data.annotations or data.source: lists")
    content = read_json_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        hint = "; set data.source: lists for BLIP or LoRS lists" if isinstance(content, list) else ""
        raise ValueError(f"{path}: expected an object with a list `images` (Karpathy), found {describe(content)}{hint}")
    name = content.get("dataset")
    source = name if isinstance(name, str) and name else data.layout or path.stem
    return _rows(path, content["images"], source), [path]


def _rows(path: InputPath, images: list[Any], source: str) -> Iterator[AnnotationRow]:
    for i, image in enumerate(images):
        origin = f"{path.name} image {i}"
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list) or "split" not in image:
            raise ValueError(f"{path}: image {i} needs filename, split and a list `sentences`, found {describe(image)}")
        name, folder = image.get("filename"), image.get("filepath")
        if isinstance(name, str) and isinstance(folder, str) and folder:
            name = f"{folder}/{name}"
        captions = tuple(s.get("raw") if isinstance(s, dict) else s for s in image["sentences"])
        yield AnnotationRow(name, captions, str(image["split"]), source, origin)


SOURCE = AnnotationSource(rows)
