"""The objects at a URI: listed, read, written whole, and copied; through pyarrow, or else fsspec."""

import contextlib
import json
import posixpath
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rmdd.core.files import sweep, temporary_beside

WHOLE_WHEN_WRITTEN = ("s3", "gcs", "abfs")
"""File systems whose objects appear when they are complete; elsewhere a temporary name is needed."""

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

    def copy(self, name: str, to: str) -> Stamp:
        """Without a way through this machine, where the store can."""

        def copy(target: str) -> None:
            try:
                _copy(self._path(name), target, self.fs, self.fs)
            except (NotImplementedError, OSError):  # HDFS has no copy, that of S3 ends at 5 GB
                with self.fs.open_input_stream(self._path(name)) as a, self.fs.open_output_stream(target) as b:
                    shutil.copyfileobj(a, b, 2**20)

        return self._put(to, copy)

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
