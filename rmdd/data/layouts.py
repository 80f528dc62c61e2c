"""Known paths of annotation and image files in public datasets, and functions that read text and JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from rmdd.data.inputs import InputPath

LISTS = {
    "flickr30k": ("flickr30k_{split}.json",),
    "flickr8k": ("flickr8k_{split}.json",),
    "coco": ("coco_karpathy_{split}.json",),
    "cc3m": ("cc3m_captions_{split}.json", "captions_{split}zx2025.json"),
}
KARPATHY = {"flickr30k": "dataset_flickr30k.json", "flickr8k": "dataset_flickr8k.json", "coco": "dataset_coco.json"}

_ANNOTATION_FOLDERS = ("", "annotations", "../annotations")
_IMAGE_FOLDERS = {
    "flickr30k": ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images"),
    "flickr8k": ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"),
    "cc3m": ("images",),
}
_COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.\w+)")


def find_annotation(root: InputPath, names: Iterable[str], what: str) -> InputPath:
    """Return the first existing file of `names`, searched in `root`, `root/annotations` and `root/../annotations`.

    Raises `ValueError` if none of the files exists; its message calls the missing file `what`.
    """
    tried = [root / folder / name for name in names for folder in _ANNOTATION_FOLDERS]
    for path in tried:
        if path.is_file():
            return path
    raise ValueError(
        f"{what} not found; looked for {', '.join(str(p) for p in tried)}; put it there or name it in data.annotations"
    )


def alternatives(path: str, layout: str | None) -> list[str]:
    """Return the relative paths at which an image may be found; the given `path` comes first.

    COCO 2014 images may have their 2017 names instead; Flickr images may be in a folder that unpacking has created.
    """
    name = PurePosixPath(path).name
    paths = [path] + [f"{folder}/{name}" for folder in _IMAGE_FOLDERS.get(layout or "", ())]
    if layout == "coco" and (match := _COCO_2014.fullmatch(name)):
        paths += [f"{folder}/{match[1]}" for folder in ("train2017", "val2017")]
    return paths


def read_json_file(path: InputPath) -> Any:
    """Parse a JSON file, with or without a byte-order mark. Raises `ValueError` for a file that is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().split("\n", 1)[0]
        if _is_json(first):
            raise ValueError(
                f"{path} is JSON lines (one value per line), expected a single JSON document; "
                "wrap the lines in [ ] with commas between them, or read the file with data.source: table"
            ) from None
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_text(path: InputPath) -> str:
    if not path.is_file():
        raise ValueError(f"{path} not found; check data.root and the file named in the run file")
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); convert the file (iconv -t UTF-8)") from None


def describe(value: Any) -> str:
    """Describe a JSON value in a few words, for an error message."""
    if isinstance(value, dict):
        return f"an object with {', '.join(list(value)[:6]) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f", the first {describe(value[0])}" if value else "")
    return f"{type(value).__name__} {json.dumps(value, default=str)[:40]}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True
