"""Guesses of the data source that reads a folder or file: from file names, column names and the content of tables."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rmdd.data.arrow_tables import holds_images, is_text
from rmdd.data.columns import CAPTION_COLUMNS, columns_of
from rmdd.data.layouts import read_text
from rmdd.data.shards import MANIFEST, SPLITS
from rmdd.data.source import SPLIT_NAMES
from rmdd.data.sources.table import records
from rmdd.data.sources.webdataset import IMAGES

IMAGE_COLUMNS = (
    "image",
    "file_name",
    "image_path",
    "path",
    "filepath",
    "filename",
    "file",
    "img",
    "image_file",
    "name",
)
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "fold")
"""Usual names of the columns of a table, the most usual ones first."""

RELEASES = {
    "Flickr8k.token.txt": ("lists", "flickr8k"),
    "results_20130124.token": ("lists", "flickr30k"),
    "TextCaps_0.1_train.json": ("textcaps", None),
}
"""Annotation files of published datasets, each with the source and the layout that read it."""
_DEPTH = 2
"""Number of folders below the given one in which tables and JSON files are looked for."""
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
_ROWS = 400
"""Number of rows of a table that are read to guess its columns."""
_FILES = 200_000
"""Number of files in a folder after which no more of them are listed."""


@dataclass
class Guess:
    """A guess that a data source reads the data, or the reason why a file looks like data that no source reads."""

    values: dict[str, Any] = field(default_factory=dict)
    """Fields of the section `data`."""
    remarks: list[str] = field(default_factory=list)
    why_not: str = ""


def guesses(place: Path) -> Iterator[Guess]:
    """Yield guesses for an existing file or folder, the most likely one first."""
    if place.is_file():
        yield from _of_files(place.parent, [place])
        return
    if (place / MANIFEST).is_file():
        yield _guess("dataset", place, f"{MANIFEST} says that `rmdd ingest` wrote this folder")
    markers = ("dataset_dict.json", "dataset_info.json", "state.json")
    if marker := next((name for name in markers if (place / name).is_file()), None):
        remark = f"{marker} says that `save_to_disk` of Hugging Face datasets wrote this folder"
        yield _guess("huggingface", place, remark, **_columns_of_features(place))
    for name, (source, layout) in RELEASES.items():
        if (place / name).is_file():
            values = {"layout": layout} if layout else {}
            yield _guess(source, place, f"{name} is a file of a published dataset", **values)
    files, pictures = _listed(place)
    if tables := [file for file in files if file.stem == "metadata" and file.suffix in (".csv", ".jsonl", ".parquet")]:
        yield _guess("imagefolder", place, f"{_names(tables, place)} lists images as Hugging Face's imagefolder does")
    shallow = [
        file
        for file in files
        if len(file.parts) - len(place.parts) <= _DEPTH + 1 or file.suffix in (".parquet", ".tar")
    ]
    yield from _of_files(place, sorted(shallow, key=lambda file: (len(file.parts), file.name)))
    texts = {file.with_suffix("") for file in files if file.suffix == ".txt"}
    if beside := [picture for picture in pictures if picture.with_suffix("") in texts]:
        yield _guess(
            "imagefolder", place, f"the text beside each image is its caption, such as that of {beside[0].name}"
        )
    if pictures and not files:
        text = (
            f"{place} has images and no captions; write a table with a row per caption, such as captions.csv with the "
        )
        yield Guess(why_not=text + "columns image and caption")


def _columns_of_features(folder: Path) -> dict[str, Any]:
    """Return the field `huggingface` with the columns of images and captions that a saved dataset declares."""
    infos = [*folder.glob("dataset_info.json"), *sorted(folder.glob("*/dataset_info.json"))]
    features = json.loads(read_text(infos[0])).get("features") if infos else None
    kinds = {name: json.dumps(kind) for name, kind in (features or {}).items()}
    images = [name for name, kind in kinds.items() if '"_type": "Image"' in kind]
    captions = [name for name, kind in kinds.items() if '"string"' in kind and name.lower() in CAPTION_COLUMNS]
    if not images or not captions:
        return {}
    best = min(captions, key=lambda name: _rank(name, CAPTION_COLUMNS))
    return {"huggingface": {"image": images[0], "caption": best}}


def _of_files(folder: Path, files: Sequence[Path]) -> Iterator[Guess]:
    by_suffix: dict[str, list[Path]] = {}
    for file in files:
        by_suffix.setdefault(file.suffix.lower(), []).append(file)
    lists: dict[str, Path] = {}
    for file in by_suffix.get(".json", [])[:50]:
        yield from _of_json(file, folder, lists)
    if lists:
        yield from _of_lists(lists, folder)
    tables = [file for suffix in _TABLES for file in by_suffix.get(suffix, [])[:20]]
    groups = _by_split(tables)
    for group in groups:
        yield from _of_split_tables(group, folder)
    tables = [file for file in tables if not any(file in group.values() for group in groups)]
    tables.sort(key=lambda file: (file.suffix == ".txt", len(file.parts), -file.stat().st_size))
    for file in tables:
        for guess in _of_table(file, folder, islice(records(file), _ROWS)):
            others = [str(other.relative_to(folder)) for other in tables if other != file and other.suffix != ".txt"]
            if others and "table" in guess.values:
                text = f"the largest table is read, and not {', '.join(others[:3])}; data.table.file can name another"
                guess.remarks.append(text)
            yield guess
    if shards := by_suffix.get(".parquet"):
        yield from _of_parquet(shards, folder)
    if tars := by_suffix.get(".tar"):
        guess = _guess("webdataset", folder, f"{_names(tars, folder)} has images with their captions")
        yield _with_files(guess, "webdataset", tars, folder)


def _by_split(files: Sequence[Path]) -> list[dict[str, Path]]:
    """Return the files that are named after splits, such as mine_train.csv and mine_val.csv, by split."""
    groups: dict[tuple[Path, str, str], dict[str, Path]] = {}
    for file in files:
        words = re.split(r"([^a-z]+)", file.stem.lower())
        if named := [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]:
            rest = "".join(word for word in words if word not in SPLIT_NAMES)
            groups.setdefault((file.parent, rest, file.suffix), {}).setdefault(named[-1], file)
    return [
        {split: group[split] for split in SPLITS if split in group}
        for group in groups.values()
        if len(group) > 1 and "train" in group
    ]


def _of_split_tables(tables: dict[str, Path], folder: Path) -> Iterator[Guess]:
    """Guess the columns of tables that are named after splits, from the table of train."""
    for guess in _of_table(tables["train"], folder, islice(records(tables["train"]), _ROWS)):
        if guess.why_not:
            yield guess
            continue
        table, root = guess.values["table"], Path(guess.values["root"])
        table.pop("split", None)
        table["file"] = {}
        for split, file in tables.items():
            rows = [row for _, row in islice(records(file), 40)]
            if missing := [table[of] for of in ("image", "caption") if rows and not columns_of(table[of], rows[0])]:
                guess.remarks.append(f"{file.name} is not read, because it has no column {' and '.join(missing)}")
                continue
            found, share = root_of([row.get(table["image"]) for row in rows], file.parent)
            if share and found != root:
                text = f"image paths in {tables['train'].name} are relative to {root}, and those in {file.name} to "
                yield Guess(why_not=f"{text}{found}; write one table with a column split, and paths below one folder")
                return
            table["file"][split] = os.path.relpath(file, root)
        read = ", ".join(f"{os.path.basename(name)} as {split}" for split, name in table["file"].items())
        guess.remarks.insert(0, f"tables are named after splits: {read}")
        yield guess


def _guess(source: str, root: Path, remark: str, **values: Any) -> Guess:
    return Guess({"source": source, "root": str(root), **values}, [remark])


def _names(files: Sequence[Path], folder: Path) -> str:
    more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
    return f"{files[0].relative_to(folder)}{more}"


def _with_files(guess: Guess, source: str, files: Sequence[Path], folder: Path) -> Guess:
    """Add the pattern of the files in `folder` unless they are several files of the root."""
    root = Path(guess.values["root"])
    if len(files) == 1 or root != folder:
        pattern = files[0] if len(files) == 1 else folder / f"**/*{files[0].suffix}"
        guess.values[source] = {**guess.values.get(source, {}), "files": str(pattern.relative_to(root))}
    return guess


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files below `folder` that are no images, and the images; at most `_FILES` files in all."""
    files: list[Path] = []
    pictures: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            (pictures if path.suffix[1:].lower() in IMAGES else files).append(path)
        if len(files) + len(pictures) > _FILES:
            break
    return files, pictures


def root_of(names: Sequence[Any], folder: Path) -> tuple[Path, float]:
    """Return the folder that image paths are relative to, and the share of `names` that exist in it.

    It is `folder`, the folder above it, or one of the folders in it, down to a depth of two.
    """
    paths = [name.strip().replace("\\", "/") for name in names if isinstance(name, str) and name.strip()]
    best = folder, 0.0
    places = [folder, *_folders(folder), *(inner for one in _folders(folder) for inner in _folders(one)), folder.parent]
    for place in places:
        share = sum(_exists(place, path) for path in paths) / max(1, len(paths))
        if share > best[1]:
            best = place, share
        if share > 0.9:
            break
    return best


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in islice(os.scandir(folder), 2000) if entry.is_dir())[:30]
    except OSError:
        return []


def _exists(folder: Path, path: str) -> bool:
    try:
        return not os.path.isabs(path) and (folder / path).is_file()
    except (OSError, ValueError):
        return False


def _of_table(file: Path, folder: Path, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[Guess]:
    """Guess the columns of a table with image paths."""
    try:
        found = [row for _, row in rows]
    except (ValueError, OSError) as error:
        if file.suffix != ".txt":  # any text file may lie in a folder
            yield Guess(why_not=f"source table: {error}")
        return
    columns = list(found[0]) if found else []
    values = {name: [row[name] for row in found if row.get(name) not in (None, "")] for name in columns}
    split, remarks = _split_column(values)
    candidates = [(*root_of(values[name][:40], file.parent), name) for name in columns if name != split]
    root, share, image = max(candidates, key=lambda c: (c[1], -_rank(c[2], IMAGE_COLUMNS)), default=(folder, 0.0, ""))
    caption, several = _caption_column({name: v for name, v in values.items() if name not in (image, split)})
    if share < 0.5 or not caption:
        if len(columns) > 1 and file.suffix != ".txt":
            listed = ", ".join(columns)
            missing = "no column holds paths of images that exist" if share < 0.5 else "no column holds captions"
            paths = [name for name in columns if any(str(v).lower().endswith(IMAGES) for v in values[name][:5])]
            for name in paths[:1] if share < 0.5 else ():
                missing = _not_found(name, values[name], file)
            yield Guess(why_not=f"{file.name} has the columns {listed}; {missing}")
        return
    name = os.path.relpath(file, root)
    table: dict[str, str | None] = {"file": name, "image": image, "caption": caption}
    if split != "split" and (split or "split" in columns):
        table["split"] = split
    if share < 1 and image:
        remarks.append(f"only {share:.0%} of the first images that {file.name} lists exist")
    if root != file.parent:
        remarks.append(f"image paths are relative to {root}")
    first = f"{file.name}: column {image} holds paths of images, and {caption} holds captions"
    if several:
        remarks.append(f"other columns with text are not used: {', '.join(several)}")
    yield Guess({"source": "table", "root": str(root), "table": table}, [first, *remarks])


def _not_found(column: str, names: Sequence[str], file: Path) -> str:
    """Return why the images that a table lists are not found, and what to do."""
    first = names[0]
    if not (os.path.isabs(first) and os.path.isfile(first)):
        found = f"the images of column {column} do not exist, such as {first}"
        return f"{found}; write their paths relative to the table or to a folder beside it"
    shared = Path(os.path.commonpath([os.path.dirname(name) for name in names if os.path.isabs(name)]))
    folder = file.parent if shared.is_relative_to(file.parent) else shared
    moved = "" if folder == file.parent else ", and move the table there"
    found = f"the paths of column {column} are absolute, such as {first}, and rmdd reads relative paths"
    return f"{found}: write {os.path.relpath(first, folder)} and so on, relative to {folder}{moved}"


def _rank(name: str, usual: Sequence[str]) -> int:
    return usual.index(name.lower()) if name.lower() in usual else len(usual)


def _split_column(values: dict[str, list[Any]]) -> tuple[str | None, list[str]]:
    """Return the column that names the split of a row (None if there is none), and remarks."""
    for name in sorted(values, key=lambda name: _rank(name, SPLIT_COLUMNS)):
        words = {str(value).strip().lower() for value in values[name]}
        if words and words <= SPLIT_NAMES.keys():
            return name, [f"column {name} names the split: {', '.join(sorted(words))}"]
        if words and name.lower() == SPLIT_COLUMNS[0]:
            other = ", ".join(sorted(words - SPLIT_NAMES.keys())[:3])
            return None, [f"column {name} is not used, because {other} is not the name of a split (data.splits.names)"]
    return None, []


def _caption_column(values: dict[str, list[Any]]) -> tuple[str, list[str]]:
    """Return the column of captions (or a pattern such as `caption_*`), and other columns that hold text."""
    words = {name: _words(column) for name, column in values.items()}
    texts = [name for name, count in words.items() if count]
    numbered: dict[str, list[str]] = {}
    for name in texts:
        if match := re.fullmatch(r"(\D+)\d+", name):
            numbered.setdefault(match[1], []).append(name)
    for prefix, names in numbered.items():
        if len(names) > 1 and _rank(prefix.rstrip("_- "), CAPTION_COLUMNS) < len(CAPTION_COLUMNS):
            return f"{prefix}*", [name for name in texts if name not in names]
    usual = [name for name in texts if name.lower() in CAPTION_COLUMNS]
    best = min(usual, key=lambda name: _rank(name, CAPTION_COLUMNS), default=None)
    best = best or max((name for name in texts if words[name] > 1.5), key=lambda name: words[name], default=None)
    return best or "", [name for name in texts if name != best and words[name] > 1.5]


def _words(column: Sequence[Any]) -> float:
    """Return the mean number of words in a column of texts or lists of texts; 0 for other columns."""
    texts = [text for value in column for text in (value if isinstance(value, list) else [value])]
    if not texts or not all(isinstance(text, str) for text in texts):
        return 0.0
    if all(re.fullmatch(r"[\d.,:\-+ ]*|https?://\S+", text) for text in texts):
        return 0.0
    return sum(len(text.split()) for text in texts) / len(texts)


def _of_json(file: Path, folder: Path, lists: dict[str, Path]) -> Iterator[Guess]:
    """Guess a Karpathy file; add a JSON list of images and captions to `lists`, under the split in its file name."""
    try:
        content = json.loads(read_text(file))
    except ValueError:
        return
    if isinstance(content, dict) and isinstance(images := content.get("images"), list) and images:
        if not all(isinstance(image, dict) and "sentences" in image for image in images[:5]):
            text = (
                "an object with images and no sentences, such as COCO's captions_val2014.json; a Karpathy file has both"
            )
            yield Guess(why_not=f"{file.name} is {text}")
            return
        names = ["/".join(filter(None, (i.get("filepath"), i.get("filename")))) for i in images[:40]]
        root, _ = root_of(names, file.parent)
        remark = f"{file.name} is a Karpathy file: it lists images with their sentences and splits"
        yield _guess("karpathy", root, remark, annotations=os.path.relpath(file, root))
    elif (
        isinstance(content, list)
        and content
        and isinstance(content[0], dict)
        and {"image", "caption"} <= content[0].keys()
    ):
        words = [SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", file.stem.lower()) if word in SPLIT_NAMES]
        lists.setdefault(words[-1] if words else "train", file)


def _of_lists(lists: dict[str, Path], folder: Path) -> Iterator[Guess]:
    first = next(iter(lists.values()))
    names = [record.get("image") for record in json.loads(read_text(first))[:40] if isinstance(record, dict)]
    root, _ = root_of(names, first.parent)
    named = {split: os.path.relpath(file, root) for split, file in lists.items()}
    remark = f"{', '.join(sorted(file.name for file in lists.values()))}: JSON lists of images and captions"
    yield _guess("lists", root, remark, annotations=named)


def _of_parquet(shards: Sequence[Path], folder: Path) -> Iterator[Guess]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(shards[0])
        first = next(pq.ParquetFile(shards[0]).iter_batches(batch_size=_ROWS), None)
    except (pa.ArrowInvalid, OSError) as error:
        yield Guess(why_not=f"{shards[0].name} is no complete Parquet file: {error}")
        return
    rows = first.to_pylist() if first is not None else []
    kinds = {name: schema.field(name).type for name in schema.names}
    binary = [name for name, kind in kinds.items() if holds_images(kind) and not is_text(kind)]
    if not binary:
        for guess in _of_table(shards[0], folder, (("", row) for row in rows)):
            yield from _of_path_shards(guess, shards, folder) if len(shards) > 1 and not guess.why_not else (guess,)
        return
    image = min(binary, key=lambda name: _rank(name, IMAGE_COLUMNS))
    values = {name: [row[name] for row in rows if row[name] is not None] for name in schema.names if name not in binary}
    split, remarks = _split_column(values)
    caption, _ = _caption_column({name: column for name, column in values.items() if name != split})
    if not caption:
        yield Guess(why_not=f"{shards[0].name} has the columns {', '.join(schema.names)}; no column holds captions")
        return
    root, what = folder, "the bytes of images"
    if not any((row[image] or {}).get("bytes") if isinstance(row[image], dict) else row[image] for row in rows):
        paths = [row[image].get("path") for row in rows[:40] if isinstance(row[image], dict)]
        root, share = root_of(paths, shards[0].parent)
        what = f"paths of images, relative to {root}"
        if share < 0.5 or not folder.is_relative_to(root):
            text = f"column {image} of {shards[0].name} holds no bytes of images, and no images are at their paths"
            yield Guess(
                why_not=f"{text} in {folder} or beside it, such as {paths[:1]}; save the images with their bytes"
            )
            return
    names: dict[str, str | None] = {"image": image, "caption": caption}
    if split != "split" and (split or "split" in values):
        names["split"] = split
    remark = f"{_names(shards, folder)}: column {image} holds {what}, and {caption} holds captions"
    guess = Guess({"source": "parquet", "root": str(root), "parquet": names}, [remark, *remarks])
    yield _with_files(guess, "parquet", shards, folder)


def _of_path_shards(guess: Guess, shards: Sequence[Path], folder: Path) -> Iterator[Guess]:
    """Guess how several Parquet files that list paths of images are read; `guess` is a guess for the first of them."""
    if folder.is_relative_to(guess.values["root"]):
        names = {name: column for name, column in guess.values["table"].items() if name != "file"}
        remark = (
            f"{_names(shards, folder)}: column {names['image']} holds paths of images, and {names['caption']} captions"
        )
        values = {"source": "parquet", "root": guess.values["root"], "parquet": names}
        yield _with_files(Guess(values, [remark, *guess.remarks[1:]]), "parquet", shards, folder)
    elif groups := _by_split(shards):
        yield from _of_split_tables(groups[0], folder)
    else:
        others = ", ".join(file.name for file in shards[1:4])
        guess.remarks.append(f"{others} and other Parquet files are not read, because they are not below data.root")
        yield guess
