"""`rmdd verify`: what on disk is not as it was written, collected and not raised.

Each format says with a `Format` how its folders are known and checked; `rmdd.runs.verify` walks folders and asks them.
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
    path: str
    wrong: str
    todo: str


@dataclass
class Findings:
    """What was looked at, what is broken, and what is merely not finished."""

    checked: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class DiskCheck:
    """Looks at each folder once, and keeps what it finds; a folder of a mirror is fetched first."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.findings = Findings()
        self._visited: set[Path] = set()

    def begin(self, path: Path) -> bool:
        """Whether `path` is to be checked now."""
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
        """Turn what a reader refuses into a fault."""
        try:
            yield
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            self.fault(path, str(error) if isinstance(error, ValueError | OSError) else repr(error), todo)

    def json(self, path: Path, todo: str) -> Any:
        """Its value; None when it has none."""
        with self.errors_as_faults(path, todo):
            return read_json(path)

    def lines(self, path: Path) -> None:
        """A log, where there is one. It may end in the middle of a line, if its writer was killed."""
        *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError:
                self.fault(path, f"line {number} is no JSON", "take the line out; nothing is computed from it")

    def tensors(self, path: Path, entry: str, todo: str) -> None:
        """A file of `save_checked`: its checksum, and that its numbers are finite."""
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
    """A kind of folder, or of loose files, that rmdd writes."""

    markers: tuple[str, ...]
    """Files of which one says that a folder is of this kind; none for loose files."""
    within: str
    """Where a storage has them: a pattern of folders, or of loose files; empty: in other folders only."""
    check: Callable[[Path, DiskCheck], None]
    always_marked: bool = True
    """Whether a folder in that place that has no marker is something else, rather than not finished."""
