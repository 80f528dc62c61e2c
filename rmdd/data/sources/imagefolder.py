"""Folders of images as Hugging Face's `imagefolder` has them, or with a text file of the same name beside each image.

Tables called metadata.csv, metadata.jsonl or metadata.parquet have one row per image. Their image paths are relative to
the folder of the table. The split is in a column of the table or in the name of a folder, such as train/0001.jpg.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from rmdd.config import Data, TableSource
from rmdd.data.columns import CAPTION_COLUMNS, columns_of
from rmdd.data.inputs import InputPath, find, input_path
from rmdd.data.source import SPLIT_NAMES, AnnotationRow, AnnotationSource
from rmdd.data.sources.table import records, rows_of
from rmdd.data.sources.webdataset import IMAGES, caption_in


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[InputPath]]:
    root, rule = input_path(data.root), data.imagefolder
    tables = [path for path, _ in find(root, rule.files)]
    if tables:
        return chain.from_iterable(_in_table(root, path, data) for path in tables), [root / path for path in tables]
    beside = _beside_images(root, data)
    first = next(beside, None)
    if first is None:
        raise ValueError(
            f"{root} has no table that matches data.imagefolder.files '{rule.files}', and no image with a text file of "
            "the same name beside it (0001.jpg and 0001.txt); correct data.root or data.imagefolder.files"
        )
    return chain([first], beside), []


def _in_table(root: InputPath, file: str, data: Data) -> Iterator[AnnotationRow]:
    lines, rule = records(root / file), data.imagefolder
    first = next(lines, None)
    if first is None:
        return
    columns = TableSource(
        image=rule.image or _image_column(root / file, first[1]),
        caption=rule.caption or next((name for name in CAPTION_COLUMNS if name in first[1]), CAPTION_COLUMNS[0]),
        split=rule.split,
    )
    folder = PurePosixPath(file).parent
    for row in rows_of(root / file, chain([first], lines), columns, "imagefolder"):
        image = str(folder / row.image) if isinstance(row.image, str) and row.image.strip() else row.image
        yield replace(row, image=image, split=row.split or _split_of(image, data), origin=str(folder / row.origin))


def _image_column(path: InputPath, row: dict[str, Any]) -> str:
    names = columns_of("file_name", row) or columns_of("*_file_name", row)
    if len(names) != 1:
        found = f"several ({', '.join(names)})" if names else f"none among {', '.join(row)}"
        raise ValueError(
            f"{path} needs a column file_name, or one that ends in _file_name, with the path of the image; "
            f"found {found}; set data.imagefolder.image"
        )
    return names[0]


def _beside_images(root: InputPath, data: Data) -> Iterator[AnnotationRow]:
    """Yield a row for each image that has a text file of the same name beside it; the whole text is one caption."""
    paths = [PurePosixPath(path) for path, _ in find(root, "**/*")]
    texts = {path.with_suffix(""): str(path) for path in paths if path.suffix == ".txt"}
    for path in paths:
        if path.suffix[1:].lower() in IMAGES and (text := texts.get(path.with_suffix(""))):
            caption = caption_in((root / text).read_bytes())
            yield AnnotationRow(str(path), (caption,), _split_of(str(path), data), "imagefolder", text)


def _split_of(image: Any, data: Data) -> str | None:
    """Return the name of the nearest folder of an image that is the name of a split, or None."""
    known = SPLIT_NAMES.keys() | {name.strip().lower() for name in data.splits.names}
    folders = PurePosixPath(image).parts[-2::-1] if isinstance(image, str) else ()
    return next((folder for folder in folders if folder.strip().lower() in known), None)


SOURCE = AnnotationSource(rows, cut_by_hash=True, without_list=True)
