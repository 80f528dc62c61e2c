"""The error of an ingest that kept too few images: what was rejected, where rmdd looked, and what to set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmdd.config import Data
from rmdd.data.inputs import is_remote
from rmdd.data.shards import QUARANTINE, Dataset

INTENDED = ("no_split", "duplicate_image")
"""Reasons for which images are left out as the run file or the source says, so that they are no loss."""
_SHOWN = 3
"""Number of missing files that an error message names."""
_FOLDERS = 200
"""Largest number of folders near `data.root` in which a missing image is looked for."""


def check_losses(dataset: Dataset, data: Data) -> None:
    """Raise `ValueError` if no image was kept or if more than the share `data.max_loss` of the images was rejected."""
    kept = sum(count["pairs"] for count in dataset.counts.values())
    reasons: dict[str, int] = dataset.manifest["quarantine"]
    lost = sum(n for reason, n in reasons.items() if reason not in INTENDED)
    if kept and lost <= data.max_loss * (kept + lost):
        return
    found = f"the ingest kept {kept} of {kept + sum(reasons.values())} images"
    allowed = f" and may lose {100 * data.max_loss:g} % of them (data.max_loss)" if kept else ""
    examples = dict[str, list[dict[str, Any]]]()
    for entry in _rejected(dataset):
        examples.setdefault(entry["reason"], []).append(entry)
    counts = [
        f"{n} {reason} (such as {examples[reason][0]['file']}: {examples[reason][0]['detail']})"
        for reason, n in reasons.items()
    ]
    none = f"no file that data.source '{data.source}' reads below {data.root} lists an image"
    lines = [f"{found}{allowed}: {'; '.join(counts) or none}"]
    if missing := [entry["file"] for entry in examples.get("missing_file", [])]:
        root = data.root or ""
        lines.append(f"looked for {', '.join(os.path.join(root, file) for file in missing[:_SHOWN])}")
        lines.append(_advice(missing[0], data))
    raised = " or, to accept these losses, raise data.max_loss" if kept else ""
    lines.append(f"rejected rows: {dataset.path / QUARANTINE}; correct the input{raised}")
    raise ValueError("\n".join(lines))


def _rejected(dataset: Dataset) -> Iterator[dict[str, Any]]:
    with open(dataset.path / QUARANTINE, encoding="utf-8") as lines:
        yield from (entry for entry in map(json.loads, lines) if entry["what"] == "pair")


def _advice(file: str, data: Data) -> str:
    """Return what to set so that the image `file` is found; it is looked for in folders near `data.root`."""
    paths = f"image paths such as {file} are relative to data.root, which is {data.root}"
    if is_remote(data.root):
        return f"{paths}; correct data.root"
    root = Path(data.root or "").resolve()
    for folder in _near(root):
        if (folder / file).is_file():
            moved = ""
            if data.source == "table" and isinstance(data.table.file, str):
                moved = f" and data.table.file to {os.path.relpath(root / data.table.file, folder)}"
            elif data.source == "table" or data.annotations is not None:
                name = "table.file" if data.source == "table" else "annotations"
                moved = f", and data.{name} to its path from there (now below {root})"
            return f"{paths}; found {folder / file}: set data.root to {folder}{moved}"
    return f"{paths}; set data.root to the folder that these paths start in"


def _near(root: Path) -> Iterator[Path]:
    """Yield the parents of `root`, and the folders below and beside it, as far as they can be listed."""
    yield from list(root.parents)[:3]
    for start in (root, root.parent):
        try:
            with os.scandir(start) as entries:
                folders = [
                    Path(entry.path) for _, entry in zip(range(_FOLDERS), entries, strict=False) if entry.is_dir()
                ]
        except OSError:
            continue
        yield from sorted(folders)
