"""Collect problems of files on disk, which `rmdd verify` then reports; a problem is not raised as an error.

A `Format` says how folders of one kind are recognised and checked; `rmdd.runs.verify` finds the folders to check.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rmdd.core.files import read_json
from rmdd.core.storage import Storage
from rmdd.core.tensors import Damaged, load_checked


@dataclass(frozen=True)
class Fault:
    """A problem that `rmdd verify` found in one file or folder: what is wrong, and what the user can do about it."""

    path: str
    wrong: str
    todo: str


@dataclass
class Findings:
    """The result of `rmdd verify`: the paths that were checked, the faults, and the folders that are unfinished."""

    checked: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class DiskCheck:
    """Checks the folders and files of a storage, each folder once, and records the faults that it finds."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.findings = Findings()
        self._visited: set[Path] = set()

    def begin(self, path: Path) -> bool:
        """Return False if `path` was checked before; otherwise mark it as checked and return True."""
        if path in self._visited:
            return False
        self._visited.add(path)
        self.findings.checked.append(self.storage.address(path))
        return True

    def fault(self, path: Path, wrong: str, todo: str) -> None:
        fault = Fault(self.storage.address(path), wrong, todo)
        if fault not in self.findings.faults:
            self.findings.faults.append(fault)

    def unfinished(self, path: Path) -> None:
        self.findings.unfinished.append(self.storage.address(path))

    @contextlib.contextmanager
    def errors_as_faults(self, path: Path, todo: str) -> Iterator[None]:
        """If the `with` block raises an error, record it as a fault of `path`, the file that the block reads."""
        try:
            yield
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            self.fault(path, str(error) if isinstance(error, ValueError | OSError) else repr(error), todo)

    def json(self, path: Path, todo: str) -> Any:
        """Return the parsed content of the JSON file `path`. If it cannot be read, record a fault and return None."""
        with self.errors_as_faults(path, todo):
            return read_json(path)

    def lines(self, path: Path) -> None:
        """Check that all lines of the log `path` are JSON; a last line cut off by a kill of its writer is no fault."""
        *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError:
                self.fault(path, f"line {number} is not JSON", "delete the line; no result is computed from this log")

    def tensors(self, path: Path, entry: str, todo: str) -> None:
        """Check that a file written by `save_checked` matches its checksum and that all its numbers are finite."""
        try:
            tensors, _ = load_checked(path, entry)
        except (Damaged, OSError) as error:
            self.fault(path, str(error), todo)
            return
        self.finite(path, tensors, todo)

    def finite(self, path: Path, tensors: dict[str, torch.Tensor], todo: str) -> None:
        bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
        if bad:
            self.fault(path, f"{len(bad)} tensors hold numbers that are not finite (first: {bad[0]})", todo)


@dataclass(frozen=True)
class Format:
    """A kind of folder or file that rmdd writes, such as an expert store, and the function that checks it."""

    markers: tuple[str, ...]
    """Names of marker files: a folder that contains one of them has this format. Empty for a format of single files."""
    within: str
    """Glob pattern that finds this format in a storage; empty if it occurs only inside folders of other formats."""
    check: Callable[[Path, DiskCheck], None]
    always_marked: bool = True
    """Whether folders that match `within` but have no marker file are ignored; if False, they count as unfinished."""
