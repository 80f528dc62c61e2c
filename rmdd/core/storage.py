"""The storage of a run's files: a folder that all machines of the run share, or a cloud URI.

For a URI, every machine has a *mirror*: a local folder, so that all code works with plain paths. A finished file in the
mirror is published (uploaded to the same relative path) before the work that wrote it continues. Each step of a run
fetches the files that it needs before it reads them: after `fetch`, a local folder equals the one at the URI. So a
mirror can be out of date, or deleted, at any time. Credentials are read only from the environment.
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
from rmdd.core.locks import LeaseCell, LocalLeaseCell, held_in
from rmdd.core.remote import ObjectStore, RemoteLeaseCell, Stamp

MARKERS = ("manifest.json", "store.json", "expert.json", "set.json", "subset.json")
"""Files that mark their folder as complete. They are published after its other files, and removed before them."""

LOCAL_ONLY = ("cache",)
"""Folders at the top of a mirror whose files are never published (uploaded)."""
LOG_SECONDS = 10.0
"""Seconds between two uploads of a growing log."""
RESULTS = ("experts/*/store.json", "phases/*/phase-*/*", f"*-{'[0-9a-f]' * 8}/run.yaml")
"""Glob patterns of the results in a storage. The last pattern requires that a folder's name ends in a hash, because
folders that are no results can contain a `run.yaml` too."""


class Storage:
    """A storage in the folder `root`, which all machines see: nothing has to be fetched or published."""

    moves_atomically = True
    """Whether `move` is atomic: the complete folder is always at its old place or at its new one."""

    def __init__(self, root: Path):
        self.root = root

    def begin(self) -> None:
        """Check that files can be written, and remove the half-written files of killed processes.

        Raises an `OSError` that says what to do if the folder is not writable.
        """
        probe = temporary_beside(self.root / "probe")
        with explain_write_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        sweep(self.root)

    def has_results(self) -> bool:
        """Return whether the storage contains experts, phases or runs."""
        return any(next(self.root.glob(pattern), None) for pattern in RESULTS)

    def read(self, path: Path) -> bytes | None:
        """Return the bytes of the file `path` in the storage, or None if it does not exist. Makes no local copy."""
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def address(self, path: Path) -> str:
        """Return `path` as users write it: a URI if the storage is at a URI, otherwise a path."""
        return str(path)

    def fetch(self, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Make the local file or folder `path` equal to that in the storage; `wanted` selects files by their path."""

    def publish(self, folder: Path) -> None:
        """Upload the changed files of the local `folder`, and delete from the storage the files that `folder` lacks."""

    def move(self, source: Path, target: Path) -> None:
        """Move the folder `source` to `target`, replacing any folder there."""
        old = temporary_beside(target, "old")
        if target.exists():
            os.replace(target, old)
        os.replace(source, target)
        remove(old)

    def flush(self) -> None:
        """Publish the logs that have grown since their last upload."""


class Mirror(Storage):
    """A storage at the URI `uri`; this machine keeps a copy of the files that it uses in the folder `root`."""

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
        """See `Storage.fetch`. Skips folders that a live process of this machine holds: their local files are newer."""
        if not path.is_relative_to(self.root):
            return
        remote = {n: s for n, s in self.remote.list(self._name(path)).items() if self._is_published(n) and wanted(n)}
        busy = [self._name(folder) + "/" for folder in held_in(path)]
        local = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        stale = [n for n in map(self._name, local) if n not in remote and self._is_published(n) and wanted(n)]
        for name in sorted(stale, key=_marker_last) + sorted(remote, key=_marker_last):
            if not any(name.startswith(folder) for folder in busy):
                self._fetch_file(name, remote.get(name))

    def _fetch_file(self, name: str, stamp: Stamp | None) -> None:
        """Make the local file `name` equal to the object at the URI with this `stamp` (None: there is no object). A
        file that another process changes meanwhile is kept: it is newer, and its writer publishes it."""
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
            _set_time(copy, stamp)
            with self._lock(fcntl.LOCK_EX):
                if Stamp.of(path) == before:
                    os.replace(copy, path)
        finally:
            copy.unlink(missing_ok=True)

    def publish(self, folder: Path) -> None:
        if not folder.is_relative_to(self.root):
            return
        remote = self.remote.list(self._name(folder))
        local = {self._name(p): Stamp.of(p) for p in folder.rglob("*") if p.is_file()}
        local = {n: s for n, s in local.items() if self._is_published(n)}
        changed = [n for n in sorted(local, key=_marker_last) if local[n] != remote.get(n)]
        removed = [n for n in sorted(remote, key=_marker_first) if n not in local and self._is_published(n)]
        markers = [n for n in changed if _marker_last(n)[0] and n in remote]
        for name in [*(markers if len(changed) > len(markers) or removed else []), *removed]:
            self.remote.delete(name)
        for name in changed:
            self._upload(self.root / name)

    def move(self, source: Path, target: Path) -> None:
        """Copy every object of `source` to `target` at the URI, delete the old objects, and move the local folder."""
        old, new = self._name(source), self._name(target)
        stamps = {n: stamp for n, stamp in self.remote.list(old).items() if self._is_published(n)}
        for name in sorted(self.remote.list(new), key=_marker_first):
            self.remote.delete(name)
        for name in sorted(stamps, key=_marker_last):
            stamp = self.remote.copy(name, new + name.removeprefix(old))
            if Stamp.of(self.root / name) == stamps[name]:
                _set_time(self.root / name, stamp)
        for name in stamps:
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
                self.publish(path)  # this deletes the objects of the removed folder
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
        """Publish the logs in `folder`; call this before publishing a checkpoint, so that no log is older than it."""
        for path in [p for p in self._grown if p.is_relative_to(folder)]:
            self._grown.discard(path)
            if path.is_file():
                self._upload(path)

    def begin(self) -> None:
        super().begin()
        self.remote.sweep()

    def has_results(self) -> bool:
        paths = [PurePosixPath(name) for name in self.remote.list("")]
        # `match` compares only the end of a path; comparing depths leaves out results of a storage inside this one
        return any(p.match(r) and len(p.parts) == r.count("/") + 1 for p in paths for r in RESULTS)

    def read(self, path: Path) -> bytes | None:
        return self.remote.read(self._name(path))

    def _upload(self, path: Path) -> None:
        _set_time(path, self.remote.upload(path, self._name(path)))

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def _is_published(self, name: str) -> bool:
        parts = name.split("/")
        local = parts[0] in LOCAL_ONLY or name.endswith((".lock", ".lease"))
        return not local and not any(is_temporary(part) for part in parts)

    @contextlib.contextmanager
    def _lock(self, mode: int) -> Iterator[None]:
        """Hold the file lock of the mirror: shared to publish a file, exclusive to replace a file by a fetched one."""
        with open(self.root / ".mirror.lock", "a") as lock:
            fcntl.flock(lock, mode)
            yield


def _set_time(path: Path, stamp: Stamp) -> None:
    if stamp.mtime_ns is not None:
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))


def _marker_last(name: str) -> tuple[bool, str]:
    """Return a sort key that puts the markers of a folder (see `MARKERS`) after the folder's other files."""
    return posixpath.basename(name) in MARKERS, name


def _marker_first(name: str) -> tuple[bool, str]:
    return not _marker_last(name)[0], name


def is_uri(storage: str) -> bool:
    return "://" in storage


def absolute_runtime(runtime: config.Runtime) -> config.Runtime:
    """Return `runtime` with absolute paths, because workers on a cluster have a different working folder."""
    paths = {"storage": runtime.storage if is_uri(runtime.storage) else str(root_of(runtime))}
    if runtime.scratch is not None:
        paths["scratch"] = str(_scratch(runtime))
    return runtime.model_copy(update=paths)


def root_of(runtime: config.Runtime) -> Path:
    """Return the folder in which this machine works: the storage, or for a storage at a URI, the mirror."""
    if not is_uri(runtime.storage):
        return Path(runtime.storage).absolute()
    uri = runtime.storage.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", uri)[-40:].strip("-")
    return _scratch(runtime) / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def run_folder(run: config.Run) -> Path:
    """Return the folder with the results of a run, on this machine; its name is the run's name and hash."""
    return root_of(run.runtime) / run.folder_name


def address_of(runtime: config.Runtime, path: Path) -> str:
    """Return the address of a local `path` of the storage, valid on every machine: a path, or a URI."""
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
    """Open the storage of a run. Raises `OSError` if its URI cannot be reached."""
    root = root_of(runtime)
    return _mirror(runtime.storage, root) if is_uri(runtime.storage) else Storage(root)


@functools.cache
def _mirror(uri: str, root: Path) -> Mirror:
    return Mirror(uri, root)
