"""A look at a folder or file of images and captions: which data source reads it, and how many images it holds.

The tables and file names in a folder suggest a source (`rmdd.data.guess`). The first source that finds images in it is
chosen. Annotations are read completely; of tar files, Parquet files and images, only a sample is read.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from rmdd.config import Data, Splits
from rmdd.data import sources
from rmdd.data.carving import meaning
from rmdd.data.counts import IngestCounts
from rmdd.data.decode import FORMATS
from rmdd.data.guess import Guess, guesses
from rmdd.data.inputs import input_path
from rmdd.data.layouts import alternatives
from rmdd.data.plan import make_plan
from rmdd.data.shards import SPLITS, Dataset
from rmdd.data.source import NO_SPLIT, SPLIT_NAMES, SampleSource

SAMPLE = 64
"""Number of images of a dataset whose sizes are read."""
IGNORED = Splits(from_source=False)
COUNTED = 1000
"""Number of images in tar and Parquet files from which val and test are shares of the images."""
_SECONDS = 10.0
"""Time after which no more samples of tar and Parquet files are read; their number is then estimated."""


@dataclass
class Look:
    """What a look at data has found: the fields of the section `data` that read it, and what is in it."""

    values: dict[str, Any]
    """Fields of the section `data` that differ from their defaults."""
    remarks: list[str]
    """What was guessed, and why; one sentence each."""
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each split, the number of images and of captions; after an ingest with `values`, these splits exist."""
    exact: bool = True
    """Whether the counts are exact; otherwise they are estimated from a sample."""
    sides: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of the images in the sample."""
    unreadable: list[str] = field(default_factory=list)
    """Images in the sample that do not exist or cannot be opened."""
    words: list[int] = field(default_factory=list)
    """Numbers of words of the captions in the sample."""

    @property
    def images(self) -> int:
        return sum(images for images, _ in self.counts.values())

    @property
    def captions(self) -> int:
        return sum(captions for _, captions in self.counts.values())

    def lines(self) -> list[str]:
        """Describe the data for people, a fact per line."""
        about = "" if self.exact else "about "
        each = self.captions / max(1, self.images)
        named = ", ".join(f"{split} {images:,}" for split, (images, _) in self.counts.items())
        lines = [f"source    {self.values['source']} ({self.values['root']})"]
        lines += [f"images    {about}{self.images:,}, with {about}{self.captions:,} captions ({each:.3g} per image)"]
        if self.sides:
            widths, heights = zip(*self.sides, strict=True)
            size = f"{median(widths):.0f} x {median(heights):.0f}, {min(widths)} to {max(widths)} pixels wide"
            lines += [f"sizes     median of {len(self.sides)} images {size}"]
        if self.unreadable:
            sample, example = len(self.sides) + len(self.unreadable), self.unreadable[0]
            lines += [f"missing   {len(self.unreadable)} of the {sample} images looked at cannot be opened: {example}"]
        if self.words:
            lines += [f"words     median {median(self.words):.0f} per caption, at most {max(self.words)}"]
        shares = any(isinstance(size, float) for size in self.values.get("splits", {}).values())
        lines += [f"splits    {'about ' if shares else about}{named}"]
        return lines + [f"          {remark}" for remark in self.remarks]


def look(path: str) -> Look:
    """Look at the data at the local path `path`. Raises `ValueError` if no source can read it; the message says why."""
    place = input_path(path)
    if not isinstance(place, Path):
        raise ValueError(f"{path} is a URI; `rmdd init` looks at local files only: write data.source and data.root")
    place = Path(os.path.abspath(place.expanduser()))
    if not place.exists():
        raise ValueError(f"{path} does not exist; give a folder of images and captions, or a table that lists them")
    failures: list[str] = []
    for guess in guesses(place):
        if guess.why_not:
            failures.append(guess.why_not)
            continue
        try:
            found = _found(guess)
        except (ValueError, OSError) as error:
            failures.append(f"source {guess.values['source']}: {error}")
            continue
        if found.images and len(found.unreadable) < SAMPLE // 2 and (found.sides or not found.unreadable):
            return found
        failures.append(_no_images(guess, found))
    listed = "".join(f"\n  - {failure}" for failure in dict.fromkeys(failures))
    raise ValueError(
        f"no data source can read {path}:{listed or ' no table, JSON list, tar or Parquet file was found'}\n"
        "looked for: a table (CSV, TSV, JSON lines, Parquet) with a column of image paths and one of captions, "
        "metadata.csv or metadata.jsonl, images with a text file each, a Karpathy file, JSON lists, tar files, Parquet "
        "files with images, a folder that `save_to_disk` of Hugging Face datasets or `rmdd ingest` wrote; "
        "`rmdd docs data` describes all sources"
    )


def _no_images(guess: Guess, found: Look) -> str:
    name = guess.values["source"]
    if not found.images:
        return f"source {name}: it lists no image with a caption"
    return f"source {name}: images cannot be opened, such as {', '.join(found.unreadable[:2])}"


def _found(guess: Guess) -> Look:
    found = Look(dict(guess.values), list(guess.remarks))
    data = Data(**found.values)
    if data.source == "dataset":
        stored = Dataset.open(data.root or "")
        found.counts = {split: (c["pairs"], c["captions"]) for split, c in stored.counts.items()}
        return found
    source = sources.find(data)
    listed = source.rows(source.files(data), data) if isinstance(source, SampleSource) else source.rows(data)[0]
    if isinstance(source, SampleSource) and listed is None:
        named = _read_samples(found, source, data)
    else:
        assert listed is not None
        rows = list(listed)
        named = {row.split for row in rows if row.split is not None and row.split != NO_SPLIT}
        if unknown := sorted(name for name in named if name.strip().lower() not in SPLIT_NAMES):
            found.values["splits"], data = {"from_source": False}, data.model_copy(update={"splits": IGNORED})
            found.remarks.append(f"{unknown[0]} is not the name of a split (data.splits.names), so no split is used")
            named = set()
        _count(found, rows, data)
    if not named or not all(found.counts[split][0] for split in SPLITS):
        _carve(found, named, listed is None)
    return found


def _carve(found: Look, named: Collection[str], inside: bool) -> None:
    """Let images of train become val and test, where the source names no such splits, and correct the counts.

    Val and test are numbers of images. To choose a number of images that are `inside` tar or Parquet files, an ingest
    reads these files twice, so that val and test are shares instead if there are many images.
    """
    total, images = found.images, {split: n for split, (n, _) in found.counts.items()}
    each = found.captions / max(1, total)
    kept = {split: n for split, n in images.items() if named and images["train"] and n and split != "train"}
    left = total - sum(kept.values())
    size = max(1, min(1000, max(left // 10, min(left // 5, 50))))
    share = max(0.001, float(f"{size / max(1, left):.2g}")) if inside and left >= COUNTED else None
    size = size if share is None else round(left * share)
    carved = {split: size for split in ("val", "test") if split not in kept}
    ignored = found.values.get("splits", {}) if images["train"] or not named else {"from_source": False}
    found.values["splits"] = {**ignored, **{split: share or n for split, n in carved.items()}}
    images = {"train": left - sum(carved.values())} | kept | carved
    found.counts = {split: (images[split], round(images[split] * each)) for split in SPLITS}
    what = "no split" if not named else f"only the split{'s' * (len(named) > 1)} {' and '.join(sorted(named))}"
    about = "" if share is None else "about "
    chosen = " and ".join(f"{about}{number:,} for {split}" for split, number in carved.items())
    found.remarks.append(f"the data names {what}, so a hash chooses {chosen} among {about}{left:,} images")


def _count(found: Look, rows: Iterable[Any], data: Data) -> None:
    """Count the images and captions that `rows` lists, and read the sizes of some of the images."""
    plan = make_plan(rows, data)
    found.counts = {s: (len(pairs), sum(len(p["captions"]) for p in pairs)) for s, pairs in plan.pairs.items()}
    pairs = [pair for split in SPLITS for pair in plan.pairs[split]]
    step = max(1, len(pairs) // SAMPLE)
    found.sides, found.unreadable, found.words = [], [], []
    for pair in pairs[::step][:SAMPLE]:
        found.words += [len(caption.split()) for caption in pair["captions"]]
        paths = [Path(data.root or "") / name for name in alternatives(pair["pair_id"], data.layout)]
        _measure(found, next((path for path in paths if path.is_file()), paths[0]), str(paths[0]))


def _measure(found: Look, image: Path | io.BytesIO, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(image, formats=FORMATS) as opened:
                found.sides.append(opened.size)
    except (OSError, ValueError, Image.DecompressionBombError):
        found.unreadable.append(name)


def _read_samples(found: Look, source: SampleSource, data: Data) -> set[str]:
    """Read samples of tar or Parquet files, and count the images of each split; return the splits that files name."""
    files = source.files(data)
    ranges = source.ranges([path for path, _, _ in files], data)
    by_split: dict[str | None, list[tuple[str, int, list[tuple[int, int]]]]] = defaultdict(list)
    for (path, size, split), of_file in zip(files, ranges, strict=True):
        by_split[split].append((path, size, of_file))
    counts: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    named: set[str] = set()
    for split, group in by_split.items():
        read, seen, bytes_read = Counter[str](), Counter[str](), 0
        begun, whole = time.monotonic(), True
        for candidate in _candidates(source, group, split, data):
            if time.monotonic() - begun > _SECONDS / len(by_split):
                whole = False
                break
            where = meaning(candidate.split, data) or "train"
            named |= {candidate.split} if candidate.split is not None else set()
            read[where] += 1
            seen[where] += len(candidate.captions)
            if isinstance(candidate.image, bytes):
                bytes_read += len(candidate.image)
                if len(found.sides) < SAMPLE:
                    _measure(found, io.BytesIO(candidate.image), candidate.pair_id)
                    found.words += [len(caption.split()) for caption in candidate.captions]
            else:
                found.unreadable.append(candidate.pair_id)
        scale = 1.0 if whole or not bytes_read else max(1.0, sum(size for _, size, _ in group) / bytes_read)
        found.exact &= whole
        counts.update({name: round(n * scale) for name, n in read.items()})
        captions.update({name: round(n * scale) for name, n in seen.items()})
    found.counts = {split: (counts[split], captions[split]) for split in SPLITS}
    return named


def _candidates(source: SampleSource, group: Any, split: str | None, data: Data) -> Iterator[Any]:
    for path, _, ranges in group:
        for part in ranges:
            yield from source.candidates(path, part, split, data, IngestCounts())
