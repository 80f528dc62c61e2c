"""Write files atomically: a file has a temporary name until it is complete, so it is never seen half-written.

A temporary name contains the machine and the id of the process that writes the file. So the temporary files of killed
processes can be recognised and removed, and those of live processes are kept.
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
"""Seconds without a write after which a temporary file that another machine wrote counts as abandoned."""

_TEMPORARY = re.compile(r"^\..+\.(?:(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{6}|[^.]+)\.(?:tmp|old)$")

_ADVICE = {
    errno.ENOSPC: "free some space on that disk, or move the storage to a larger one",
    errno.EDQUOT: "the disk quota is used up; delete files, or ask for a larger quota",
    errno.EFBIG: "the file would be larger than the limit on file sizes; raise the limit with `ulimit -f`",
    errno.EROFS: "set runtime.storage to a folder on a writable disk",
    errno.EACCES: "set runtime.storage to a folder that this user may write to",
    errno.EPERM: "set runtime.storage to a folder on a writable disk",
}


@runtime_checkable
class ChangeListener(Protocol):
    """An object that is told of every change of a file under the folder `root`, such as `rmdd.core.storage.Mirror`."""

    root: Path

    def changing(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Return a context manager for a `with` block in which the caller replaces or removes `path`."""
        ...

    def appended(self, path: Path) -> None:
        """Take note that the caller appended a line to the log `path`."""
        ...

    def cell(self, folder: Path) -> Any:
        """Return the place where the lease of `folder` is stored; see `rmdd.core.locks.LeaseCell`."""
        ...


_listeners: dict[Path, ChangeListener] = {}


def register_listener(listener: ChangeListener) -> None:
    _listeners[listener.root] = listener


def listener_of(path: Path | str) -> ChangeListener | None:
    """Return the registered `ChangeListener` whose folder `root` contains `path`, or None if there is none."""
    path = Path(path)
    return next((listener for root, listener in _listeners.items() if path.is_relative_to(root)), None)


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path (file or folder) beside `path`, and rename it to `path` when the block succeeds.

    If the disk is full or read-only, raises an `OSError` that names `path` and says what to do.
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


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder, which replaces the folder `path`, if there is one, when the block succeeds.

    If `path` is a symbolic link, the folder that it names is replaced.
    """
    path = path.resolve() if path.is_symlink() else path
    with atomic_path(path) as folder:
        folder.mkdir()
        yield folder
        aside = temporary_beside(path, "old") if path.exists() else None
        if aside:  # a folder with files cannot be replaced
            os.replace(path, aside)
    if aside:
        shutil.rmtree(aside)


def remove(path: Path | str) -> None:
    """Remove a file or a folder if it exists."""
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
    """Flush a file, or all files of a folder, to disk; call this before the rename that marks them as complete."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as f:
            os.fsync(f.fileno())


def allocate(path: Path | str) -> None:
    """Reserve disk space for the sparse file `path`: on a full disk, writing to its memory map kills the process."""
    with explain_write_errors(Path(path)), open(path, "r+b") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, os.fstat(f.fileno()).st_size))


class CannotWrite(OSError):
    """A file cannot be written (full disk, quota, permissions); the message says what to do."""


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an error about an unwritable disk, raised by any library, into a `CannotWrite` that says what to do."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in _ADVICE or isinstance(error, CannotWrite) or _about_another_file(error, path):
            raise
        message = (
            f"cannot write {path}: {os.strerror(number).lower()}; {_ADVICE[number]}. Files finished earlier are intact"
        )
        raise CannotWrite(number, message) from error


def _about_another_file(error: Exception, path: Path) -> bool:
    """Return whether `error` names a file that is neither `path` nor in its folder."""
    name = getattr(error, "filename", None)
    return name is not None and not (path.is_relative_to(name) or Path(name).is_relative_to(path.parent))


def _error_number(error: Exception) -> int:
    """Return the error number (errno) of the operating system that caused `error`, or 0."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"os error (\d+)|errno (\d+)", str(error), re.IGNORECASE)  # of safetensors or pyarrow
    if match:
        return int(match[1] or match[2])
    return errno.ENOSPC if re.search(r"requested and \d+ written", str(error)) else 0  # numpy's error on a full disk


# -- temporary names and their writers -------------------------------------------------------------------------------


@functools.cache
def machine() -> str:
    """Return eight hex digits that identify this machine. A container with its own process ids counts as a machine."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # containers can share a host name; only Linux has these files
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]


def alive(pid: int) -> bool:
    """Return whether a process with the id `pid` exists on this machine."""
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
    """Remove the abandoned temporary files under `folder` (see `abandoned_in`), and return their paths."""
    swept = []
    for path in abandoned_in(folder):
        with contextlib.suppress(FileNotFoundError):  # another run may have removed it already
            _remove(path)
            swept.append(path)
    return swept


def abandoned_in(folder: Path | str) -> Iterator[Path]:
    """Yield the abandoned temporary files and folders under `folder`.

    A file that this machine wrote is abandoned if the process that wrote it is dead. A file that a different machine
    wrote is abandoned if it has not changed for a day.
    """
    for parent, folders, files in os.walk(folder):
        temporary = [name for name in (*folders, *files) if is_temporary(name)]
        folders[:] = [name for name in folders if name not in temporary]
        yield from (path for path in (Path(parent) / name for name in temporary) if _abandoned(path))


def _abandoned(path: Path) -> bool:
    match = _TEMPORARY.match(path.name)
    if match and match["machine"] == machine():
        return not alive(int(match["pid"]))
    with contextlib.suppress(FileNotFoundError):
        last = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
        return time.time() - last > ABANDONED_SECONDS
    return False


# -- JSON files, logs of JSON lines, checksums -----------------------------------------------------------------------


def write_json(path: Path | str, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_jsonl(path: Path | str, value: Any) -> None:
    """Append `value` to the log `path` as a JSON line; if the disk is full, the file is cut back to its old length."""
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


def cut_jsonl(path: Path, count: str, last: int) -> None:
    """Delete from the log `path` every line with `line[count] > last`, and a half-written last line.

    Work that resumes from a checkpoint writes the deleted lines again, so that the log contains each of them once.
    """
    if not path.is_file():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)[count] <= last:
                lines.append(line)
        except json.JSONDecodeError:
            break
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def sha256_file(path: Path | str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
