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
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from rmdd import config
from rmdd.core.files import explain_write_errors, is_temporary, register_listener, remove, sweep, temporary_beside
from rmdd.core.locks import LeaseCell, LocalLeaseCell, lock_of
from rmdd.core.remote import ObjectStore, RemoteLeaseCell, Stamp

MARKERS = ("manifest.json", "store.json", "expert.json", "set.json", "subset.json")
"""They say that a folder is whole, so they come last and go first."""

LOCAL_ONLY = ("cache",)
LOG_SECONDS = 10.0
RESULTS = ("experts/*/store.json", "phases/*/phase-*/*", f"*-{'[0-9a-f]' * 8}/run.yaml")
"""Files of a storage that was used; the folder of a run ends in a hash, other folders with a run file do not."""


class Storage:
    """Plain folder: `root` is it, and nothing has to be fetched or published."""

    moves_atomically = True
    """Whether a folder that moves is there whole or not at all."""

    def __init__(self, root: Path):
        self.root = root

    def begin(self) -> None:
        """Make sure that files can be written, and remove what killed processes left half-written.

        Raises `OSError` that says what to do.
        """
        probe = temporary_beside(self.root / "probe")
        with explain_write_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        sweep(self.root)

    def has_results(self) -> bool:
        """Whether experts, phases or runs lie in it."""
        return any(next(self.root.glob(pattern), None) for pattern in RESULTS)

    def read(self, path: Path) -> bytes | None:
        """The bytes of the file `path` in the storage; None where there is no such file. No copy of it is kept."""
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def address(self, path: Path) -> str:
        """How a person names `path`."""
        return str(path)

    def fetch(self, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Make `path`, a file or a folder, here what it is in the storage; `wanted` picks by relative name."""

    def publish(self, folder: Path) -> None:
        """Make `folder` in the storage what it is here, as far as that has not been done file by file."""

    def move(self, source: Path, target: Path) -> None:
        """Put the folder `source` in the place of `target`, which goes."""
        old = temporary_beside(target, "old")
        if target.exists():
            os.replace(target, old)
        os.replace(source, target)
        remove(old)

    def flush(self) -> None:
        """Publish logs that have grown."""


class Mirror(Storage):
    """The local copy of what lies at `uri`, under `root`."""

    moves_atomically = False

    def __init__(self, uri: str, root: Path):
        super().__init__(root)
        self.uri = uri.rstrip("/")
        self.remote = ObjectStore(self.uri)
        self._grown: set[Path] = set()
        self._flushed = time.monotonic()
        register_listener(self)

    def address(self, path: Path) -> str:
        return f"{self.uri}/{self._name(path)}".rstrip("/") if path.is_relative_to(self.root) else str(path)

    def cell(self, folder: Path) -> LeaseCell:
        if not self._is_published(self._name(folder)):
            return LocalLeaseCell(folder)
        return RemoteLeaseCell(self.remote, f"{self._name(folder)}.lease")

    def fetch(self, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Folders inside `path` that a live process of this machine holds are newer here, and left as they are."""
        if not path.is_relative_to(self.root):
            return
        there = {n: s for n, s in self.remote.list(self._name(path)).items() if self._is_published(n) and wanted(n)}
        busy = [self._name(folder) + "/" for folder in _busy_in(path)]
        here = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        stale = [n for n in map(self._name, here) if n not in there and self._is_published(n) and wanted(n)]
        for name in sorted(stale, key=_marker) + sorted(there, key=_marker):
            if not any(name.startswith(folder) for folder in busy):
                self._bring(name, there.get(name))

    def _bring(self, name: str, stamp: Stamp | None) -> None:
        """Make one file what it is at the URI; one that changed here meanwhile is being published, and newer."""
        path = self.root / name
        before = Stamp.of(path)
        if before == stamp:
            return
        if stamp is None:
            with self._lock(fcntl.LOCK_EX):
                if Stamp.of(path) == before and self.remote.stamp(name) is None:
                    path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        copy = temporary_beside(path)
        try:
            with explain_write_errors(path):
                self.remote.download(name, copy)
            _date(copy, stamp)
            with self._lock(fcntl.LOCK_EX):
                if Stamp.of(path) == before:
                    os.replace(copy, path)
        finally:
            copy.unlink(missing_ok=True)

    def publish(self, folder: Path) -> None:
        if not folder.is_relative_to(self.root):
            return
        there = self.remote.list(self._name(folder))
        here = {self._name(p): Stamp.of(p) for p in folder.rglob("*") if p.is_file()}
        here = {n: s for n, s in here.items() if self._is_published(n)}
        changed = [n for n in sorted(here, key=_marker) if here[n] != there.get(n)]
        gone = [n for n in sorted(there, key=_marker_first) if n not in here and self._is_published(n)]
        markers = [n for n in changed if _marker(n)[0] and n in there]
        for name in [*(markers if len(changed) > len(markers) or gone else []), *gone]:
            self.remote.delete(name)
        for name in changed:
            self._upload(self.root / name)

    def move(self, source: Path, target: Path) -> None:
        """Object by object, on the store; what is there twice goes when all has come."""
        was, now = self._name(source), self._name(target)
        there = {n: stamp for n, stamp in self.remote.list(was).items() if self._is_published(n)}
        for name in sorted(self.remote.list(now), key=_marker_first):
            self.remote.delete(name)
        for name in sorted(there, key=_marker):
            stamp = self.remote.copy(name, now + name.removeprefix(was))
            if Stamp.of(self.root / name) == there[name]:
                _date(self.root / name, stamp)
        for name in there:
            self.remote.delete(name)
        super().move(source, target)

    @contextlib.contextmanager
    def changing(self, path: Path) -> Iterator[None]:
        if not self._is_published(self._name(path)):
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

    def has_results(self) -> bool:
        paths = [PurePosixPath(name) for name in self.remote.list("")]
        # `match` looks from the right: without the number of parts, files of a storage inside this one match too
        return any(p.match(r) and len(p.parts) == r.count("/") + 1 for p in paths for r in RESULTS)

    def read(self, path: Path) -> bytes | None:
        return self.remote.read(self._name(path))

    def _upload(self, path: Path) -> None:
        _date(path, self.remote.upload(path, self._name(path)))

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def _is_published(self, name: str) -> bool:
        parts = name.split("/")
        ours = parts[0] in LOCAL_ONLY or name.endswith((".lock", ".lease"))
        return not ours and not any(is_temporary(part) for part in parts)

    @contextlib.contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        """Publishers share it; what is fetched is put in place by one alone."""
        with open(self.root / ".mirror.lock", "a") as lock:
            fcntl.flock(lock, how)
            yield


def _date(path: Path, stamp: Stamp) -> None:
    if stamp.mtime_ns is not None:
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))


def _marker(name: str) -> tuple[bool, str]:
    """Sorts the files of a folder so that those which say that it is whole come last."""
    return posixpath.basename(name) in MARKERS, name


def _marker_first(name: str) -> tuple[bool, str]:
    return not _marker(name)[0], name


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


def absolute_runtime(runtime: config.Runtime) -> config.Runtime:
    """With absolute paths: workers of a cluster have another working folder."""
    paths = {"storage": runtime.storage if is_uri(runtime.storage) else str(root_of(runtime))}
    if runtime.scratch is not None:
        paths["scratch"] = str(_scratch(runtime))
    return runtime.model_copy(update=paths)


def root_of(runtime: config.Runtime) -> Path:
    """The folder in which this machine works: the storage itself, or the mirror of a URI."""
    if not is_uri(runtime.storage):
        return Path(runtime.storage).absolute()
    uri = runtime.storage.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", uri)[-40:].strip("-")
    return _scratch(runtime) / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def run_folder(run: config.Run) -> Path:
    """Where a run keeps its results: its name and the hash of its value."""
    return root_of(run.runtime) / run.folder_name


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


def open_storage(runtime: config.Runtime) -> Storage:
    """The storage of a run as this process sees it.

    Raises `OSError` where it cannot be reached, or its folder not be written.
    """
    root = root_of(runtime)
    return _mirror(runtime.storage, root) if is_uri(runtime.storage) else Storage(root)


@functools.cache
def _mirror(uri: str, root: Path) -> Mirror:
    return Mirror(uri, root)
