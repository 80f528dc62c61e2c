"""List the files of a storage, in a folder or at a URI, with sizes and times, and the folders that are locked."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rmdd.core.files import read_json
from rmdd.core.layout import FILE, check_layout, layout_of
from rmdd.core.locks import EXPIRES, held_in, is_of_this_machine
from rmdd.core.remote import Stamp
from rmdd.core.storage import Mirror, Storage, is_uri

DESCRIPTIONS = (
    "run.yaml",
    "data.json",
    "plan.json",
    "evaluation.json",
    "sweep.json",
    "search.json",
    "results.json",
    "comparison.json",
    "subset.json",
    "model.json",
)
"""Names of the small files that say what the folders of a storage are; only these are fetched from a URI."""


@dataclass(frozen=True)
class Usage:
    """Bytes of all files in a folder, and the time of the latest change of one of them, in seconds."""

    bytes: int = 0
    changed: float = 0.0


class Contents:
    """The files of a storage. Names of files and folders are relative to the storage, with slashes."""

    def __init__(self, storage: Storage, files: Mapping[str, Stamp]):
        self.storage, self.root, self.files = storage, storage.root, files
        self._usage: dict[str, Usage] = {}
        self._inside: dict[str, set[str]] = {}
        for name, stamp in files.items():
            parts, changed = name.split("/"), (stamp.mtime_ns or 0) / 1e9
            for depth in range(len(parts)):
                parent, part = "/".join(parts[:depth]), "/".join(parts[: depth + 1])
                self._inside.setdefault(parent, set()).add(part)
                old = self._usage.get(part, Usage())
                self._usage[part] = Usage(old.bytes + stamp.size, max(old.changed, changed))

    def usage(self, name: str) -> Usage:
        """Return the bytes of a file or folder, and when it last changed; zeros if it does not exist."""
        return self._usage.get(name, Usage())

    def find(self, pattern: str) -> list[str]:
        """Return the files and folders that match a pattern; `*` matches any part of one name, dots included."""
        found = [""]
        for part in pattern.split("/"):
            inside = (name for folder in found for name in self._inside.get(folder, ()))
            found = [name for name in inside if fnmatchcase(name.rpartition("/")[2], part)]
        return sorted(found)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def names_in(self, path: Path) -> Iterator[str]:
        """Yield the names of a path in this storage: as it is written, and without links. Other paths have none."""
        for inner, root in ((path.absolute(), self.root), (path.resolve(), self.root.resolve())):
            if inner.is_relative_to(root) and inner != root:
                yield inner.relative_to(root).as_posix()

    def is_linked(self, name: str) -> bool:
        """Return whether a file or folder is a link, or lies in a linked folder, so that others may own it."""
        return (self.root / name).resolve() != self.root.resolve() / name

    def again(self) -> "Contents":
        """List the files of the storage again."""
        return Contents(self.storage, _files(self.storage))

    def held(self, seconds: float = EXPIRES) -> set[str]:
        """Return the folders in which a process works: of this machine, or of another whose lease changed lately.

        `seconds` is the age at which a lease of another machine no longer counts. At a URI, all leases count.
        """
        leases = {name.removesuffix(".lease") for name in self.files if name.endswith(".lease")}
        if isinstance(self.storage, Mirror):
            return leases
        held = {self.name(folder) for folder in held_in(self.root)}
        for folder in leases:
            with contextlib.suppress(OSError, ValueError):
                file = self.root / f"{folder}.lease"
                age = time.time() - file.stat().st_mtime
                if age < seconds and not is_of_this_machine(read_json(file)):
                    held.add(folder)
        return held


@contextlib.contextmanager
def open_contents(address: str) -> Iterator[Contents]:
    """List the files of the storage at a path or URI. From a URI, small files are fetched to a temporary folder.

    Raises `ValueError` if this is no storage, or a storage of another layout.
    """
    with contextlib.ExitStack() as stack:
        if is_uri(address):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="rmdd-inventory-"))
            storage: Storage = Mirror(address, Path(scratch))
        else:
            storage = Storage(Path(address).expanduser().absolute())
        check_layout(storage)
        if layout_of(storage) is None:
            raise ValueError(
                f"{storage.address(storage.root)} is no storage of rmdd (it has no {FILE}); give the folder or URI of "
                "runtime.storage, such as runs"
            )
        yield Contents(storage, _files(storage))


def _files(storage: Storage) -> dict[str, Stamp]:
    root = storage.root
    if isinstance(storage, Mirror):
        storage.fetch(root, lambda name: name.rpartition("/")[2] in DESCRIPTIONS)
        return storage.remote.list("")
    files, visited = {}, set()
    for folder, folders, names in os.walk(root, followlinks=True):  # linked folders may hold work that needs something
        real = Path(folder).resolve()
        linked_inside = real.is_relative_to(root.resolve()) and real != root.resolve() / Path(folder).relative_to(root)
        if real in visited or linked_inside:
            folders.clear()
            continue
        visited.add(real)
        for path in (Path(folder) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                files[path.relative_to(root).as_posix()] = Stamp(status.st_size, status.st_mtime_ns)
    return files
