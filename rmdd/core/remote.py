"""Files at a URI (S3, Google Cloud, Azure, HDFS, ...): list, read, write atomically and copy with pyarrow or fsspec.

Credentials are read only from the environment, where these libraries look for them.
"""

import contextlib
import functools
import glob
import json
import posixpath
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rmdd.core.files import sweep, temporary_beside

ATOMIC_WRITES = ("s3", "gcs", "abfs")
"""File systems (pyarrow's names) that hide incomplete objects; in all others, rmdd first writes to a temporary name."""

ATTEMPTS = 4
"""How often an operation is tried before its error is raised."""
BUFFER = 2**20
"""Size in bytes of the buffer with which an object is read as a stream."""
T = TypeVar("T")


@dataclass(frozen=True)
class Stamp:
    """Size and modification time of a file, which tell two versions of it apart."""

    size: int
    mtime_ns: int | None

    @classmethod
    def of(cls, path: Path) -> "Stamp | None":
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return cls(status.st_size, status.st_mtime_ns)


class ObjectStore:
    """The files (objects) under a URI; the name of an object is its path relative to that URI."""

    def __init__(self, uri: str):
        self.uri = uri
        self.fs, self.base = self._try("reach", "", lambda: _file_system(uri))
        self.writes_atomically = self.fs.type_name in ATOMIC_WRITES

    def list(self, name: str) -> dict[str, Stamp]:
        """Return the stamp (size and time) of each object in the folder `name`, or of the object `name`, by name."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self.path(name), allow_not_found=True, recursive=True)

        def find() -> dict[str, Stamp]:
            infos = [self.fs.get_file_info(self.path(name))]
            if infos[0].type != FileType.File:
                infos = self.fs.get_file_info(selector)
            files = [f for f in infos if f.type == FileType.File]
            return {f.path[len(self.base) :].lstrip("/"): Stamp(f.size, f.mtime_ns) for f in files}

        return self._try("list", name, find)

    def stamp(self, name: str) -> Stamp | None:
        return self.list(name).get(name)

    def upload(self, path: Path, name: str) -> Stamp:
        """Copy a local file to the object `name`, atomically, and return the stamp of the object."""
        return self._put(name, lambda target: _copy(str(path), target, None, self.fs))

    def copy(self, name: str, to: str) -> Stamp:
        """Copy the object `name` to the object `to`, inside the cloud if possible, and return the stamp of the copy."""

        def copy(target: str) -> None:
            try:
                _copy(self.path(name), target, self.fs, self.fs)
            except (NotImplementedError, OSError):  # HDFS cannot copy, and S3 copies at most 5 GB
                with self.fs.open_input_stream(self.path(name)) as a, self.fs.open_output_stream(target) as b:
                    shutil.copyfileobj(a, b, 2**20)

        return self._put(to, copy)

    def write(self, name: str, value: bytes) -> None:
        def write(target: str) -> None:
            with self.fs.open_output_stream(target) as stream:
                stream.write(value)

        self._put(name, write)

    def _put(self, name: str, write: Callable[[str], None]) -> Stamp:
        path = self.path(name)
        folder, last = posixpath.split(path)
        hidden = posixpath.join(folder, temporary_beside(Path(last)).name)

        def put() -> Stamp:
            if self.writes_atomically:
                write(path)
            else:
                self.fs.create_dir(folder, recursive=True)
                write(hidden)
                self.fs.move(hidden, path)
            info = self.fs.get_file_info(path)
            return Stamp(info.size, info.mtime_ns)

        return self._try("write", name, put)

    def download(self, name: str, path: Path) -> None:
        self._try("read", name, lambda: _copy(self.path(name), str(path), self.fs, None))

    def read(self, name: str) -> bytes | None:
        def read() -> bytes | None:
            try:
                with self.fs.open_input_stream(self.path(name)) as stream:
                    content: bytes = stream.read()
                    return content
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

        return self._try("read", name, read)

    def open(self, name: str, seekable: bool = False) -> Any:
        """Open an object as a pyarrow file. Without `seekable`, it can only be read from start to end."""
        path = self.path(name)
        if seekable:
            return self._try("read", name, lambda: self.fs.open_input_file(path))
        return self._try("read", name, lambda: self.fs.open_input_stream(path, buffer_size=BUFFER))

    def info(self, name: str) -> Any:
        """Return pyarrow's `FileInfo` of an object or a folder; its type says whether it exists."""
        return self._try("find", name, lambda: self.fs.get_file_info(self.path(name)))

    def glob(self, name: str, pattern: str) -> Iterator[tuple[str, int]]:
        """Yield the path relative to `name` and the bytes of each object under `name` that matches `pattern`."""
        from fsspec.implementations.arrow import ArrowFSWrapper

        folder = self.path(name).rstrip("/")
        full_pattern = f"{glob.escape(folder)}/{pattern}"
        infos = self._try("list", name, lambda: ArrowFSWrapper(self.fs).glob(full_pattern, detail=True))
        for path, info in infos.items():
            if info["type"] == "file":
                yield path.lstrip("/")[len(folder.lstrip("/")) :].lstrip("/"), info["size"]

    def delete(self, name: str) -> None:
        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.delete_file(self.path(name))

        self._try("delete", name, delete)

    def sweep(self) -> None:
        """Remove the abandoned temporary files if the URI begins with `file://`; other URIs are left alone."""
        if self.fs.type_name == "local":
            sweep(self.base)

    def path(self, name: str) -> str:
        """Return the path of the object `name` in the pyarrow file system `fs`."""
        return posixpath.normpath(posixpath.join(self.base, name)) if name else self.base

    def _try(self, action: str, name: str, do: Callable[[], T]) -> T:
        """Call `do` and return its result. If `do` raises an error that may be temporary, call it again, up to
        `ATTEMPTS` times in all. The last error is raised with the name of the action and of the object."""
        for attempt in range(ATTEMPTS):
            try:
                return do()
            except OSError as error:
                if attempt + 1 < ATTEMPTS and not isinstance(error, FileNotFoundError | PermissionError):
                    time.sleep(0.5 * 4**attempt)
                    continue
                raise OSError(
                    f"cannot {action} {_without_query(self.uri)}{'/' if name else ''}{name}: {error}; check the "
                    "bucket, the network, and the credentials in the environment of this machine"
                ) from error
        raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class RemotePath:
    """A picklable path to a file or folder at a URI, with the methods of `pathlib.Path` that only read."""

    uri: str
    inside: str = ""
    """Path relative to `uri`, such as `images/1.jpg` or `../x`."""

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.uri, posixpath.normpath(posixpath.join(self.inside, name)))

    def __str__(self) -> str:
        return f"{self.uri.split('://', 1)[0]}://{self.path.lstrip('/')}"

    @property
    def store(self) -> ObjectStore:
        return _store(self.uri)

    @property
    def path(self) -> str:
        return self.store.path(self.inside)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def size(self) -> int:
        return int(self.store.info(self.inside).size)

    def is_file(self) -> bool:
        return bool(self.store.info(self.inside).is_file)

    def is_dir(self) -> bool:
        return bool(self.store.info(self.inside).type.name == "Directory")

    def open(self, mode: str = "rb") -> Any:
        """Open the file for reading from start to end."""
        assert mode == "rb"
        return self.store.open(self.inside)

    def read_bytes(self) -> bytes:
        content = self.store.read(self.inside)
        if content is None:
            raise FileNotFoundError(f"{self} does not exist")
        return content

    def glob(self, pattern: str) -> Iterator[tuple[str, int]]:
        return self.store.glob(self.inside, pattern)


@dataclass(frozen=True)
class RemoteLeaseCell:
    """A lease stored as an object at a URI. Two processes can write the lease at the same time, so `exact` is False."""

    store: ObjectStore
    name: str
    exact = False

    def read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] | None = json.loads(self.store.read(self.name) or b"null")
            return content
        except ValueError:
            return None

    def write(self, value: dict[str, Any]) -> None:
        self.store.write(self.name, json.dumps(value).encode())

    def remove(self) -> None:
        self.store.delete(self.name)


@functools.lru_cache(maxsize=8)
def _store(uri: str) -> ObjectStore:
    return ObjectStore(uri)


def _file_system(uri: str) -> tuple[Any, str]:
    """Open the file system of a URI with pyarrow, else with fsspec; return it and the path of the URI in it.

    Raises `ValueError` for a URI that neither library can read.
    """
    import pyarrow
    from pyarrow import fs

    try:
        file_system, path = fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        try:
            import fsspec

            other, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as second:
            raise ValueError(
                f"{_without_query(uri)} cannot be opened: pyarrow says '{error}', fsspec says '{second}'; install the "
                "package that fsspec names, or give a folder, or a URI of s3://, gs://, hdfs://, abfs:// or file://"
            ) from None
        file_system = fs.PyFileSystem(fs.FSSpecHandler(other))
    return file_system, path.rstrip("/")


def _without_query(uri: str) -> str:
    return uri.split("?", 1)[0].rstrip("/")


def _copy(source: str, target: str, source_fs: Any, target_fs: Any) -> None:
    from pyarrow import fs

    local = fs.LocalFileSystem()
    fs.copy_files(source, target, source_filesystem=source_fs or local, destination_filesystem=target_fs or local)
