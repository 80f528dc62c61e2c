"""Record damaged files on disk for `rmdd verify`: every problem is collected, none is raised.

A `Format` describes how the folders of one kind are recognised and checked; `rmdd.runs.verify` walks the folders.
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
    """A problem of one file or folder: what is wrong, and what to do about it."""

    path: str
    wrong: str
    todo: str


@dataclass
class Findings:
    """The result of `rmdd verify`: the checked paths, the faults, and the folders whose work is unfinished."""

    checked: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class DiskCheck:
    """Records the faults of the folders and files of a storage; each folder is checked once."""

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
        """Record an error raised by a reader of `path` as a fault."""
        try:
            yield
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            self.fault(path, str(error) if isinstance(error, ValueError | OSError) else repr(error), todo)

    def json(self, path: Path, todo: str) -> Any:
        """Return the parsed JSON file; record a fault and return None if it cannot be read."""
        with self.errors_as_faults(path, todo):
            return read_json(path)

    def lines(self, path: Path) -> None:
        """Check every line of a JSON-lines log. The last line may be cut off, because its writer was killed."""
        *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError:
                self.fault(path, f"line {number} is not JSON", "delete the line; nothing is computed from it")

    def tensors(self, path: Path, entry: str, todo: str) -> None:
        """Check a file written by `save_checked`: its checksum, and that all its numbers are finite."""
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
    """A kind of folder, or of single files, that rmdd writes, and the function that checks it."""

    markers: tuple[str, ...]
    """File names that identify a folder of this kind: one of them is enough. Empty for single files."""
    within: str
    """Glob pattern of these folders or files, relative to a storage; empty if they lie only inside other folders."""
    check: Callable[[Path, DiskCheck], None]
    always_marked: bool = True
    """Whether to ignore a folder that matches `within` and has no marker; if False, it is reported as unfinished."""
