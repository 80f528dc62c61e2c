"""Images with class labels, for zero-shot classification: one folder per class, a list, or the binary CIFAR files.

The caption of an image is its class id: the name of the folder, the class in the list, or the class name of CIFAR.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rmdd.config import Data
from rmdd.data.inputs import InputPath, find, input_path, seekable, size_of
from rmdd.data.layouts import describe, read_text
from rmdd.data.source import AnnotationRow, AnnotationSource

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
CIFAR = {"cifar10": ("batches.meta.txt", "test_batch.bin", 1), "cifar100": ("fine_label_names.txt", "test.bin", 2)}
"""For each CIFAR layout: the file of class names, the file of images, and the number of label bytes before each image.
The last label byte is the class."""
_PIXELS = 3 * 32 * 32
_KAGGLE = "ImageId,PredictionString"


@dataclass(frozen=True)
class Labelled:
    names: dict[str, tuple[str, ...]]
    """Names of each class by class id, the preferred name first; ids are sorted, or in CIFAR's order for CIFAR."""
    pictures: list[AnnotationRow]
    files: list[InputPath]
    """The annotation files that were read."""


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[InputPath]]:
    labelled = read(data)
    return iter(labelled.pictures), labelled.files


def read(data: Any) -> Labelled:
    """Read the classes and images that `data.classes` selects. Raises `ValueError` with file and line number."""
    root, rule = input_path(data.root), data.classes
    names_of, files = _read_names(root / rule.names) if rule.names else ({}, [])
    if rule.layout in CIFAR:
        ids, pictures, lists = _cifar(root / rule.images if rule.images else root, rule.images, rule.layout)
    elif rule.layout == "list":
        ids, pictures, lists = _list(root, rule, names_of)
    else:
        ids, pictures, lists = _folders(root, rule.images)
    chosen = _chosen(ids, rule, root)
    if rule.names and (nameless := [c for c in chosen if c not in names_of]):
        raise ValueError(
            f"{root / rule.names} has no name for {len(nameless)} classes, such as '{nameless[0]}'; add the names"
        )
    names = {c: names_of.get(c) or (c.replace("_", " "),) for c in chosen}
    return Labelled(names, [row for row in pictures if row.captions[0] in names], files + lists)


def draw(root: InputPath, spec: str) -> bytes:
    """Return a CIFAR image as PNG bytes; `spec` is JSON with the name of the CIFAR file and the image's byte offset."""
    position = json.loads(spec)
    file = root / position["file"]
    with seekable(file) as f:
        f.seek(position["offset"])
        pixels = np.frombuffer(f.read(_PIXELS), dtype=np.uint8).reshape(3, 32, 32)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _chosen(ids: list[str], rule: Any, root: InputPath) -> list[str]:
    if rule.only is not None:
        if unknown := [c for c in rule.only if c not in ids]:
            raise ValueError(f"data.classes.only names '{unknown[0]}', which is no class of {root}; remove it")
        return [c for c in ids if c in rule.only]
    number = rule.number or max(2, len(ids))
    if number > len(ids):
        needs = f"data.classes.number asks for {number} classes" if rule.number else "classification needs two classes"
        raise ValueError(f"{needs}, but {root / rule.images} holds {len(ids)}; correct data.classes")
    drawn = sorted(ids, key=lambda c: hashlib.sha256(f"rmdd classes/{rule.seed}/{c}".encode()).digest())[:number]
    return [c for c in ids if c in set(drawn)]


def _folders(root: InputPath, images: str) -> tuple[list[str], list[AnnotationRow], list[InputPath]]:
    if not (root / images).is_dir():
        raise ValueError(
            f"{root / images} is not a folder; set data.classes.images to a folder with one folder per class"
        )
    pictures = []
    for path, _ in find(root, f"{images}/**/*" if images else "**/*"):
        inside = path.removeprefix(f"{images}/").split("/")
        if len(inside) > 1 and path.lower().endswith(SUFFIXES):
            pictures.append(AnnotationRow(path, (inside[0],), "test", "classes", path))
    ids = sorted({row.captions[0] for row in pictures})
    if not ids:
        raise ValueError(f"{root / images} holds no folder with images; expected one folder per class")
    return ids, pictures, []


def _list(
    root: InputPath, rule: Any, names_of: dict[Any, Any]
) -> tuple[list[str], list[AnnotationRow], list[InputPath]]:
    path = root / rule.file
    lines = [(i, line.strip()) for i, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    kaggle = bool(lines) and lines[0][1] == _KAGGLE
    ids = sorted(names_of)
    pictures = []
    for i, line in lines[1:] if kaggle else lines:
        name, label = _kaggle(line) if kaggle else _file_and_class(line)
        if not label:
            numbers = "; lines with only a number are the ILSVRC toolkit's format" if line.isdecimal() else ""
            raise ValueError(f"{path}: line {i} is not `FILE CLASS`, found {line[:60]!r}{numbers}; give `FILE CLASS`")
        if label.isdecimal() and label not in names_of:
            if not ids or int(label) >= len(ids):
                needs = f"there are only {len(ids)} classes" if ids else "data.classes.names must list the classes"
                raise ValueError(f"{path}: line {i} has class number {label}, but {needs}")
            label = ids[int(label)]
        elif names_of and label not in names_of:
            raise ValueError(f"{path}: line {i} has class '{label}', which is missing from {root / rule.names}; add it")
        pictures.append(
            AnnotationRow(f"{rule.images}/{name}".lstrip("/"), (label,), "test", "classes", f"{path.name} line {i}")
        )
    return sorted({row.captions[0] for row in pictures}), pictures, [path]


def _file_and_class(line: str) -> tuple[str, str]:
    words = line.rsplit(None, 1)
    return (words[0], words[1]) if len(words) == 2 else (line, "")


def _kaggle(line: str) -> tuple[str, str]:
    name, _, rest = line.partition(",")
    return f"{name}.JPEG", rest.split(" ", 1)[0].strip()


def _cifar(folder: InputPath, images: str, layout: str) -> tuple[list[str], list[AnnotationRow], list[InputPath]]:
    names, binary, labels = CIFAR[layout]
    for name in (names, binary):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} not found; layout {layout} needs the unpacked binary version of CIFAR")
    ids = [line.strip() for line in read_text(folder / names).split("\n") if line.strip()]
    path, size = folder / binary, labels + _PIXELS
    if not size_of(path) or size_of(path) % size:
        raise ValueError(f"{path} has {size_of(path)} bytes, not a multiple of the record size {size}; copy it again")
    pictures = []
    with path.open("rb") as f:
        number = 0
        while record := f.read(size):
            label = record[labels - 1]
            if label >= len(ids):
                raise ValueError(
                    f"{path}: record {number} has class {label}, but {folder / names} lists {len(ids)} classes"
                )
            position = {"file": f"{images}/{binary}".lstrip("/"), "offset": number * size + labels}
            name = f"{position['file']}/{number:05d}"
            pictures.append(
                AnnotationRow(name, (ids[label],), "test", "classes", f"{binary} record {number}", json.dumps(position))
            )
            number += 1
    return ids, pictures, [folder / names, path]


def _read_names(path: InputPath) -> tuple[dict[str, tuple[str, ...]], list[InputPath]]:
    text = read_text(path)
    names_of: dict[str, tuple[str, ...]] = {}
    if text.lstrip().startswith("{"):
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        for key, value in content.items():
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) and name.strip() for name in names):
                raise ValueError(f"{path}: class '{key}' needs a name or a list of names, found {describe(value)}")
            names_of[key] = tuple(name.strip() for name in names)
        return names_of, [path]
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        key, _, rest = line.strip().partition(" ")
        names = [name.strip() for name in rest.split(",") if name.strip()]
        if not names:
            raise ValueError(f"{path}: line {i} is not `CLASS name, synonym`, found {line[:60]!r}")
        if key in names_of:
            raise ValueError(f"{path}: line {i} repeats class '{key}'; remove one of the lines")
        names_of[key] = tuple(names)
    return names_of, [path]


SOURCE = AnnotationSource(rows, draw, without_list=True)
