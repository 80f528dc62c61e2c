"""Where a run keeps its files: a folder that all its machines see, or a cloud URI.

For a URI every machine has a *mirror*, a local folder in which all code works with plain paths. What becomes whole
there is published at the same relative path before its writer goes on, and what a step needs is fetched before it
reads: after `fetch` a folder is what the URI holds, so a mirror may be stale, or lost, at any time. Credentials come
from the environment alone.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rmdd import config
from rmdd.files import clearly, is_temporary, register, sweep, temporary_beside
from rmdd.lease import Cell, LocalCell, lock_of

MARKERS = ("manifest.json", "store.json", "expert.json", "set.json")
"""They say that a folder is whole, so they come last and go first."""

LOCAL_ONLY = ("cache",)
WHOLE_WHEN_WRITTEN = ("s3", "gcs", "abfs")
"""File systems whose objects appear when they are complete; elsewhere a temporary name is needed."""

LOG_SECONDS = 10.0
ATTEMPTS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Stamp:
    """Tells versions of one object apart."""

    size: int
    mtime_ns: int | None

    @classmethod
    def of(cls, path: Path) -> "Stamp | None":
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return cls(found.st_size, found.st_mtime_ns)


class Storage:
    """Plain folder: `root` is it, and nothing has to be fetched or published."""

    def __init__(self, root: Path):
        self.root = root

    def begin(self) -> None:
        """Make sure that files can be written, and remove what killed processes left half-written.

        Raises `OSError` that says what to do.
        """
        probe = temporary_beside(self.root / "probe")
        with clearly(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        sweep(self.root)

    def address(self, path: Path) -> str:
        """How a person names `path`."""
        return str(path)

    def fetch(self, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Make `path`, a file or a folder, here what it is in the storage; `wanted` picks by relative name."""

    def publish(self, folder: Path) -> None:
        """Make `folder` in the storage what it is here, as far as that has not been done file by file."""

    def flush(self) -> None:
        """Publish logs that have grown."""


class Mirror(Storage):
    """The local copy of what lies at `uri`, under `root`."""

    def __init__(self, uri: str, root: Path):
        super().__init__(root)
        self.uri = uri.rstrip("/")
        self.remote = Remote(self.uri)
        self._grown: set[Path] = set()
        self._flushed = time.monotonic()
        register(self)

    def address(self, path: Path) -> str:
        return f"{self.uri}/{self._name(path)}".rstrip("/") if path.is_relative_to(self.root) else str(path)

    def cell(self, folder: Path) -> Cell:
        if not self._kept(self._name(folder)):
            return LocalCell(folder)
        return RemoteCell(self.remote, f"{self._name(folder)}.lease")

    def fetch(self, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Folders inside `path` that a live process of this machine holds are newer here, and left as they are."""
        if not path.is_relative_to(self.root):
            return
        there = {n: s for n, s in self.remote.list(self._name(path)).items() if self._kept(n) and wanted(n)}
        busy = [self._name(folder) + "/" for folder in _busy_in(path)]
        here = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        stale = [n for n in map(self._name, here) if n not in there and self._kept(n) and wanted(n)]
        for name in sorted(stale, key=_marker) + sorted(there, key=_marker):
            if not any(name.startswith(folder) for folder in busy):
                self._bring(name, there.get(name))

    def _bring(self, name: str, stamp: Stamp | None) -> None:
        """Make one file what it is at the URI; one that changed here meanwhile is being published, and newer."""
        path = self.root / name
        seen = Stamp.of(path)
        if seen == stamp:
            return
        if stamp is None:
            with self._lock(fcntl.LOCK_EX):
                if Stamp.of(path) == seen and self.remote.stamp(name) is None:
                    path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent) as folder:
            copy = Path(folder) / "copy"
            with clearly(path):
                self.remote.download(name, copy)
            if stamp.mtime_ns is not None:
                os.utime(copy, ns=(stamp.mtime_ns, stamp.mtime_ns))
            with self._lock(fcntl.LOCK_EX):
                if Stamp.of(path) == seen:
                    os.replace(copy, path)

    def publish(self, folder: Path) -> None:
        if not folder.is_relative_to(self.root):
            return
        there = self.remote.list(self._name(folder))
        here = {self._name(p): Stamp.of(p) for p in folder.rglob("*") if p.is_file()}
        here = {n: s for n, s in here.items() if self._kept(n)}
        changed = [n for n in sorted(here, key=_marker) if here[n] != there.get(n)]
        gone = [n for n in there if n not in here and self._kept(n)]
        markers = [n for n in changed if _marker(n)[0] and n in there]
        for name in [*(markers if len(changed) > len(markers) or gone else []), *gone]:
            self.remote.delete(name)
        for name in changed:
            self._upload(self.root / name)

    @contextlib.contextmanager
    def changing(self, path: Path) -> Iterator[None]:
        if not self._kept(self._name(path)):
            yield
            return
        self.flush_under(path.parent)
        with self._lock(fcntl.LOCK_SH):
            was_folder = path.is_dir()
            yield
            if path.is_dir():
                self.publish(path)
            elif path.is_file():
                self._upload(path)
            elif was_folder:
                self.publish(path)  # all that is there goes
            else:
                self.remote.delete(self._name(path))

    def appended(self, path: Path) -> None:
        self._grown.add(path)
        if time.monotonic() - self._flushed > LOG_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.flush_under(self.root)
        self._flushed = time.monotonic()

    def flush_under(self, folder: Path) -> None:
        """Publish the logs in `folder`: before a checkpoint, so that none is shorter than its checkpoint says."""
        for path in [p for p in self._grown if p.is_relative_to(folder)]:
            self._grown.discard(path)
            if path.is_file():
                self._upload(path)

    def begin(self) -> None:
        super().begin()
        self.remote.sweep()

    def _upload(self, path: Path) -> None:
        stamp = self.remote.upload(path, self._name(path))
        if stamp.mtime_ns is not None:
            os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def _kept(self, name: str) -> bool:
        parts = name.split("/")
        ours = parts[0] in LOCAL_ONLY or name.endswith((".lock", ".lease"))
        return not ours and not any(is_temporary(part) for part in parts)

    @contextlib.contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        """Publishers share it; what is fetched is put in place by one alone."""
        with open(self.root / ".mirror.lock", "a") as lock:
            fcntl.flock(lock, how)
            yield


def _marker(name: str) -> tuple[bool, str]:
    """Sorts the files of a folder so that those which say that it is whole come last."""
    return posixpath.basename(name) in MARKERS, name


def _busy_in(path: Path) -> list[Path]:
    """Folders inside `path` that a process holds."""
    busy = []
    for file in path.rglob("*.lock") if path.is_dir() else ():
        folder = file.with_suffix("")
        if lock_of(folder) == file:
            with open(file) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    busy.append(folder)
    return busy


def is_uri(storage: str) -> bool:
    return "://" in storage


def anchored(runtime: config.Runtime) -> config.Runtime:
    """With absolute paths: workers of a cluster have another working folder."""
    places = {"storage": runtime.storage if is_uri(runtime.storage) else str(root_of(runtime))}
    if runtime.scratch is not None:
        places["scratch"] = str(_scratch(runtime))
    return runtime.model_copy(update=places)


def root_of(runtime: config.Runtime) -> Path:
    """The folder in which this machine works: the storage itself, or the mirror of a URI."""
    if not is_uri(runtime.storage):
        return Path(runtime.storage).absolute()
    uri = runtime.storage.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", uri)[-40:].strip("-")
    return _scratch(runtime) / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def address_of(runtime: config.Runtime, path: Path) -> str:
    """How a person names `path` of a storage, from any machine."""
    if not is_uri(runtime.storage):
        return str(path)
    return f"{runtime.storage.rstrip('/')}/{path.relative_to(root_of(runtime)).as_posix()}"


def _scratch(runtime: config.Runtime) -> Path:
    if runtime.scratch is not None:
        return Path(runtime.scratch).expanduser().absolute()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    if os.access(next(p for p in (home, *home.parents) if p.exists()), os.W_OK):
        return home / "rmdd"
    return Path(tempfile.gettempdir()) / f"rmdd-{os.getuid()}"


def located(place: str, name: str, depth: int) -> tuple[str, Path]:
    """The storage that `place`, a folder or a URI, lies `depth` levels in, and its file `name`, fetched if there."""
    if not is_uri(place):
        folder = Path(place).absolute()
        return str(folder.parents[depth - 1]), folder / name
    storage, *names = place.rstrip("/").rsplit("/", depth)
    if not re.fullmatch(r".+://.*[^/]", storage):
        return place, Path(place) / name
    found = open_storage(config.load({"runtime": {"storage": storage}}).runtime)
    file = found.root.joinpath(*names, name)
    found.fetch(file)
    return storage, file


def open_storage(runtime: config.Runtime) -> Storage:
    """The storage of a run as this process sees it.

    Raises `OSError` where it cannot be reached, or its folder not be written.
    """
    root = root_of(runtime)
    return _mirror(runtime.storage, root) if is_uri(runtime.storage) else Storage(root)


@functools.cache
def _mirror(uri: str, root: Path) -> Mirror:
    return Mirror(uri, root)


def _filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it: of pyarrow where it has one, else of fsspec."""
    import pyarrow
    from pyarrow import fs

    try:
        found, path = fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        import fsspec

        try:
            other, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"runtime.storage {uri}: {error}; give s3://, gs://, abfs:// or file://, a URI of an installed fsspec "
                "file system, or a folder"
            ) from error
        found = fs.PyFileSystem(fs.FSSpecHandler(other))
    return found, path.rstrip("/")


def _copy(source: str, target: str, source_fs: Any, target_fs: Any) -> None:
    from pyarrow import fs

    local = fs.LocalFileSystem()
    fs.copy_files(source, target, source_filesystem=source_fs or local, destination_filesystem=target_fs or local)


# -- the other end ---------------------------------------------------------------------------------------------------


class Remote:
    """The objects under a URI, by their relative names."""

    def __init__(self, uri: str):
        self.uri = uri
        self.fs, self.base = self._try("reach", "", lambda: _filesystem(uri))
        self.whole = self.fs.type_name in WHOLE_WHEN_WRITTEN

    def list(self, name: str) -> dict[str, Stamp]:
        """All objects at or under `name`."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._path(name), allow_not_found=True, recursive=True)

        def look() -> dict[str, Stamp]:
            found = [self.fs.get_file_info(self._path(name))]
            if found[0].type != FileType.File:
                found = self.fs.get_file_info(selector)
            files = [f for f in found if f.type == FileType.File]
            return {f.path[len(self.base) :].lstrip("/"): Stamp(f.size, f.mtime_ns) for f in files}

        return self._try("list", name, look)

    def stamp(self, name: str) -> Stamp | None:
        return self.list(name).get(name)

    def upload(self, path: Path, name: str) -> Stamp:
        """Write an object that appears whole, and return its stamp."""
        return self._put(name, lambda target: _copy(str(path), target, None, self.fs))

    def write(self, name: str, value: bytes) -> None:
        def write(target: str) -> None:
            with self.fs.open_output_stream(target) as stream:
                stream.write(value)

        self._put(name, write)

    def _put(self, name: str, write: Callable[[str], None]) -> Stamp:
        path = self._path(name)
        here, last = posixpath.split(path)
        hidden = posixpath.join(here, temporary_beside(Path(last)).name)

        def put() -> Stamp:
            if self.whole:
                write(path)
            else:
                self.fs.create_dir(here, recursive=True)
                write(hidden)
                self.fs.move(hidden, path)
            found = self.fs.get_file_info(path)
            return Stamp(found.size, found.mtime_ns)

        return self._try("write", name, put)

    def download(self, name: str, path: Path) -> None:
        self._try("read", name, lambda: _copy(self._path(name), str(path), self.fs, None))

    def read(self, name: str) -> bytes | None:
        def read() -> bytes | None:
            try:
                with self.fs.open_input_stream(self._path(name)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

        return self._try("read", name, read)

    def delete(self, name: str) -> None:
        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.delete_file(self._path(name))

        self._try("delete", name, delete)

    def sweep(self) -> None:
        if self.fs.type_name == "local":
            sweep(self.base)

    def _path(self, name: str) -> str:
        return posixpath.join(self.base, name) if name else self.base

    def _try(self, what: str, name: str, do: Callable[[], T]) -> T:
        """A cloud stumbles now and then: try again, then say what could not be done."""
        for attempt in range(ATTEMPTS):
            try:
                return do()
            except OSError as error:
                if attempt + 1 < ATTEMPTS and not isinstance(error, FileNotFoundError | PermissionError):
                    time.sleep(0.5 * 4**attempt)
                    continue
                raise OSError(
                    f"cannot {what} {self.uri}{'/' if name else ''}{name}: {error}; look at the bucket, the network, "
                    "and the credentials in the environment of this machine"
                ) from error
        raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class RemoteCell:
    """A lease at a URI, where nothing refuses a second writer."""

    remote: Remote
    name: str
    exact = False

    def read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.remote.read(self.name) or b"null")
        except ValueError:
            return None

    def write(self, value: dict[str, Any]) -> None:
        self.remote.write(self.name, json.dumps(value).encode())

    def remove(self) -> None:
        self.remote.delete(self.name)
