"""Files that are whole or absent: everything is written under a temporary name and renamed.

A temporary name holds the machine and the process that write it, so that what a killed process left can be swept,
and what a live one is writing stays.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

ABANDONED_SECONDS = 24 * 3600.0
"""A temporary file of another machine that nothing was written to for so long has no writer any more."""

_TEMPORARY = re.compile(r"^\..+\.(?:(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{6}|[^.]+)\.(?:tmp|old)$")

_ADVICE = {
    errno.ENOSPC: "free some space there, or move the storage to a larger disk",
    errno.EDQUOT: "the quota is used up; free some space, or ask for more",
    errno.EFBIG: "the limit on the size of a file is reached (ulimit -f); raise it",
    errno.EROFS: "give a folder that can be written as runtime.storage",
    errno.EACCES: "give a folder that this user may write as runtime.storage",
    errno.EPERM: "give a folder on a disk that can be written as runtime.storage",
}


@runtime_checkable
class ChangeListener(Protocol):
    """What hears of every change under the folder `root`; see `rmdd.core.storage.Mirror`."""

    root: Path

    def changing(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Around the moment in which `path` is replaced or removed."""
        ...

    def appended(self, path: Path) -> None:
        """A line was added to `path`."""
        ...

    def cell(self, folder: Path) -> Any:
        """Where the lease of `folder` is written; see `rmdd.core.locks`."""
        ...


_listeners: dict[Path, ChangeListener] = {}


def register_listener(listener: ChangeListener) -> None:
    _listeners[listener.root] = listener


def listener_of(path: Path | str) -> ChangeListener | None:
    """The listener whose folder `path` lies in."""
    path = Path(path)
    return next((listener for root, listener in _listeners.items() if path.is_relative_to(root)), None)


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path (file or folder) beside `path`; renamed to `path` when the block succeeds.

    A disk that is full or read-only raises an `OSError` that names `path` and says what to do.
    """
    path = Path(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            yield temporary
            _sync(temporary)
            with _changing(path):
                os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise


def remove(path: Path | str) -> None:
    """Remove a file or a folder, if it is there."""
    with _changing(Path(path)):
        _remove(Path(path))


def _changing(path: Path) -> contextlib.AbstractContextManager[None]:
    listener = listener_of(path)
    return contextlib.nullcontext() if listener is None else listener.changing(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold a file, or all files of a folder, before a name says that they are whole."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as f:
            os.fsync(f.fileno())


def allocate(path: Path | str) -> None:
    """Take the room that a sparse file will need: a page of a mapping that finds none kills its process (SIGBUS)."""
    with explain_write_errors(Path(path)), open(path, "r+b") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, os.fstat(f.fileno()).st_size))


class CannotWrite(OSError):
    """A disk cannot take a file; the message says what to do."""


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Give errors of a disk that cannot take `path` the words that help, whichever library found out."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number not in _ADVICE or isinstance(error, CannotWrite) or _elsewhere(error, path):
            raise
        message = (
            f"cannot write {path}: {os.strerror(number).lower()}; {_ADVICE[number]}. Files finished earlier are intact"
        )
        raise CannotWrite(number, message) from error


def _elsewhere(error: Exception, path: Path) -> bool:
    """Whether `error` names a file that does not lie with `path`."""
    name = getattr(error, "filename", None)
    return name is not None and not (path.is_relative_to(name) or Path(name).is_relative_to(path.parent))


def _number(error: Exception) -> int:
    """The error number of the operating system behind `error`, 0 when there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"os error (\d+)|errno (\d+)", str(error), re.IGNORECASE)  # safetensors; arrow
    if match:
        return int(match[1] or match[2])
    return errno.ENOSPC if re.search(r"requested and \d+ written", str(error)) else 0  # numpy


# -- who writes ------------------------------------------------------------------------------------------------------


@functools.cache
def machine() -> str:
    """Eight digits for this machine as its processes see each other: same digits, same process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # containers may share a host name; elsewhere than on Linux it must do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]


def alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def temporary_beside(path: Path, ending: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.{ending}")


def is_temporary(name: str) -> bool:
    return _TEMPORARY.match(name) is not None


def sweep(folder: Path | str) -> list[Path]:
    """Remove temporary files under `folder` whose writer is gone, and return them.

    That is a dead process of this machine, or one elsewhere that has written nothing for a day.
    """
    swept = []
    for here, folders, files in os.walk(folder):
        temporary = [name for name in (*folders, *files) if is_temporary(name)]
        folders[:] = [name for name in folders if name not in temporary]
        for path in (Path(here) / name for name in temporary):
            if _abandoned(path):
                with contextlib.suppress(FileNotFoundError):  # another run sweeps too
                    _remove(path)
                    swept.append(path)
    return swept


def _abandoned(path: Path) -> bool:
    match = _TEMPORARY.match(path.name)
    if match and match["machine"] == machine():
        return not alive(int(match["pid"]))
    with contextlib.suppress(FileNotFoundError):
        last = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
        return time.time() - last > ABANDONED_SECONDS
    return False


# -- JSON, lines, hashes ---------------------------------------------------------------------------------------------


def write_json(path: Path | str, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_jsonl(path: Path | str, value: Any) -> None:
    """Add a line, whole or not at all."""
    path = Path(path)
    rest = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as f:
            before = f.seek(0, os.SEEK_END)
            try:
                while rest:
                    rest = rest[f.write(rest) :]
            except OSError:
                f.truncate(before)
                raise
    if (listener := listener_of(path)) is not None:
        listener.appended(path)


def cut_jsonl(path: Path, count: str, reached: int) -> None:
    """Drop lines whose `count` lies past `reached` and a half-written last one, so that a resumed log has each once."""
    if not path.is_file():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)[count] <= reached:
                lines.append(line)
        except json.JSONDecodeError:
            break
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def sha256_file(path: Path | str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
