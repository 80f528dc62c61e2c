"""Lists in the BLIP or LoRS format: one JSON list per split (train, val, test).

The train list has one record per caption; the val and test lists have one record per image, whose `caption` is a list.
CC3M has one record per caption in all splits. Every split accepts both forms of records. Some original releases are
accepted too: Flickr8k's token file with its three lists of image names, Kaggle's `captions.txt`, Flickr30k's token
file, and the `metadata.json` or `chat.json` of LLaVA's CC3M. The last two have no published splits, so a hash of the
image path chooses the splits (for CC3M, splits of exact sizes).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from typing import Any

from rmdd.config import Annotations, Data
from rmdd.data.inputs import InputPath, input_path
from rmdd.data.layouts import LISTS, describe, find_annotation, read_json_file, read_text
from rmdd.data.shards import SPLITS
from rmdd.data.source import NO_SPLIT, AnnotationRow, AnnotationSource, as_captions
from rmdd.data.sources import textcaps

FLICKR8K_TOKENS = "Flickr8k.token.txt"
FLICKR8K_LISTS = {
    split: f"Flickr_8k.{word}Images.txt" for split, word in (("train", "train"), ("val", "dev"), ("test", "test"))
}
FLICKR30K_TOKENS = "results_20130124.token"
KAGGLE_CAPTIONS = "captions.txt"
CC3M_RELEASED = ("metadata.json", "chat.json")

Shares = tuple[float, float, float]


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[InputPath]]:
    root, layout = input_path(data.root), data.layout
    if layout == "textcaps":
        return textcaps.rows(data)
    if isinstance(data.annotations, Annotations):
        files: dict[str, InputPath] = {split: root / name for split, name in data.annotations.files.items()}
    else:
        assert layout is not None  # config.Data has checked that a layout is given
        if layout == "flickr8k" and (released := _flickr8k(root)):
            return released
        files, missing = {}, []
        for split in SPLITS:
            names = [name.format(split=split) for name in LISTS[layout]]
            try:
                files[split] = find_annotation(root, names, f"the {split} list of layout '{layout}'")
            except ValueError as error:
                missing.append(error)
        if not files and (released := _released(root, layout, data.split_fractions)):
            return released
        if missing:
            raise missing[0]
    lists = {split: (path, _records(path)) for split, path in files.items()}
    source = layout or "lists"
    parts = [_rows(path, records, split, source) for split, (path, records) in lists.items()]
    return chain.from_iterable(parts), list(files.values())


def _records(path: InputPath) -> list[dict[str, Any]]:
    records = read_json_file(path)
    if not isinstance(records, list):
        karpathy = isinstance(records, dict) and "images" in records
        hint = "; set data.source: karpathy for a Karpathy file" if karpathy else ""
        raise ValueError(f"{path}: expected a JSON list of records, found {describe(records)}{hint}")
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not {"image", "caption"} <= record.keys():
            raise ValueError(f"{path}: record {i} needs `image` and `caption`, found {describe(record)}")
    return records


def _rows(path: InputPath, records: list[dict[str, Any]], split: str, source: str) -> Iterator[AnnotationRow]:
    image_of: dict[Any, Any] = {}
    id_of: dict[Any, Any] = {}
    for i, record in enumerate(records):
        image, number = record["image"], record.get("image_id")
        has_id = isinstance(image, str) and isinstance(number, str | int)
        if has_id and (image_of.setdefault(number, image) != image or id_of.setdefault(image, number) != number):
            raise ValueError(
                f"{path}: record {i} pairs image_id {number!r} with {image!r}, an earlier record "
                f"pairs {image_of[number]!r} with {id_of.get(image, number)!r}; give each image one image_id"
            )
        yield AnnotationRow(image, as_captions(record["caption"]), split, source, f"{path.name} record {i}")


def _released(root: InputPath, layout: str, shares: Shares) -> tuple[Iterator[AnnotationRow], list[InputPath]] | None:
    """Read the original release of a dataset without published splits; return None if none of its files exists."""
    if layout == "flickr30k" and (path := root / FLICKR30K_TOKENS).is_file():
        return _token_rows(path, None, layout), [path]
    for name in CC3M_RELEASED if layout == "cc3m" else ():
        if (root / name).is_file():
            return _cut_exactly(_cc3m_rows(root / name), shares), [root / name]
    return None


def _cut_exactly(rows: Iterator[AnnotationRow], shares: Shares) -> Iterator[AnnotationRow]:
    """Divide the images into splits of exact sizes, in the order of a hash of the image path.

    The first n images of a split are therefore a random sample of the split.
    """
    all_rows = list(rows)
    images = sorted(
        {str(row.image) for row in all_rows}, key=lambda image: sha256(f"rmdd order/{image}".encode()).digest()
    )
    position_of = {image: i for i, image in enumerate(images)}
    train, val = ends(len(images), shares)
    for row in sorted(all_rows, key=lambda row: position_of[str(row.image)]):
        position = position_of[str(row.image)]
        yield replace(row, split="train" if position < train else "val" if position < val else "test")


def ends(total: int, shares: Shares) -> tuple[int, int]:
    """Divide `total` images by the shares (train, val, test); return the ends (exclusive) of train and val.

    >>> ends(595_375, (0.6, 0.2, 0.2))  # 357,225, 119,075 and 119,075
    (357225, 476300)
    """
    return round(total * shares[0]), round(total * (shares[0] + shares[1]))


def _cc3m_rows(path: InputPath) -> Iterator[AnnotationRow]:
    """Yield rows with the uncleaned CC3M caption: `caption` in the metadata file, or the answer in the chat file."""
    records = read_json_file(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected the JSON list of LLaVA's CC3M, found {describe(records)}")
    for i, record in enumerate(records):
        if not isinstance(record, dict) or "image" not in record or not {"caption", "conversations"} & record.keys():
            raise ValueError(f"{path}: record {i} needs `image` and `caption` or `conversations`: {describe(record)}")
        turns = record.get("conversations") or []
        answers = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
        captions = (record["caption"],) if "caption" in record else tuple(answers[:1])
        yield AnnotationRow(record["image"], captions, None, "cc3m", f"{path.name} record {i}")


def _flickr8k(root: InputPath) -> tuple[Iterator[AnnotationRow], list[InputPath]] | None:
    if (root / FLICKR8K_TOKENS).is_file():
        split_of: dict[str, str] = {}
        files = [root / FLICKR8K_TOKENS]
        for split, name in FLICKR8K_LISTS.items():
            files.append(find_annotation(root, [name], f"the {split} list of Flickr8k"))
            for line in read_text(files[-1]).splitlines():
                if (image := line.strip()) and split_of.setdefault(image, split) != split:
                    raise ValueError(f"{files[-1]}: {image} is also in the {split_of[image]} list; remove it from one")
        return _token_rows(files[0], split_of, "flickr8k"), files
    if (root / KAGGLE_CAPTIONS).is_file():
        return _kaggle_rows(root / KAGGLE_CAPTIONS), [root / KAGGLE_CAPTIONS]
    return None


def _token_rows(path: InputPath, split_of: dict[str, str] | None, source: str) -> Iterator[AnnotationRow]:
    for i, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        image, hash_sign, _ = name.rpartition("#")
        if not tab or not hash_sign:
            raise ValueError(f"{path}: line {i} is not `<file>#<number><TAB><caption>`, found {line[:60]!r}")
        split = None if split_of is None else split_of.get(image, NO_SPLIT)
        yield AnnotationRow(image, (caption,), split, source, f"{path.name} line {i}")


def _kaggle_rows(path: InputPath) -> Iterator[AnnotationRow]:
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    header = next(reader, None)
    if header is None or [name.strip() for name in header] != ["image", "caption"]:
        raise ValueError(f"{path}: expected the header `image,caption`, found {header}")
    try:
        for line in reader:
            if line:
                caption = ",".join(line[1:]) if len(line) > 1 else None
                yield AnnotationRow(line[0], (caption,), None, "flickr8k", f"{path.name} line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} is not CSV: {error}") from None


SOURCE = AnnotationSource(rows, cut_by_hash=True)
