"""Where input lies: a path of this machine, or one on a store that is named by a URI.

URIs are read through pyarrow (s3, gs, hdfs, abfs) or else fsspec. Credentials come from the environment alone, as
those libraries look for them.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

_BUFFER = 2**20
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Remote:
    """The part of `pathlib.Path` that reading needs, on a remote file system. Travels between processes."""

    base: str
    """The URI that names the file system."""
    path: str
    """Within that file system."""

    def __truediv__(self, name: str) -> Remote:
        return Remote(self.base, posixpath.normpath(posixpath.join(self.path, name)))

    def __str__(self) -> str:
        return f"{self.base.split('://', 1)[0]}://{self.path.lstrip('/')}"

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def is_file(self) -> bool:
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        return self._info().type.name == "Directory"

    def open(self, mode: str = "rb") -> Any:
        """A pyarrow stream, for reading from front to end."""
        assert mode == "rb"
        return _file_system(self.base)[0].open_input_stream(self.path, buffer_size=_BUFFER)

    def open_at_random(self) -> Any:
        """A pyarrow file that can seek."""
        return _file_system(self.base)[0].open_input_file(self.path)

    def read_bytes(self) -> bytes:
        with _file_system(self.base)[0].open_input_stream(self.path) as f:
            return f.read()

    def glob(self, pattern: str) -> Iterator[tuple[str, int]]:
        from fsspec.implementations.arrow import ArrowFSWrapper

        fs, _ = _file_system(self.base)
        inside = self.path.rstrip("/")
        found = ArrowFSWrapper(fs).glob(f"{glob.escape(inside)}/{pattern}", detail=True)
        for path, info in found.items():
            if info["type"] == "file":
                yield path.lstrip("/")[len(inside.lstrip("/")) :].lstrip("/"), info["size"]

    def _info(self) -> Any:
        return _file_system(self.base)[0].get_file_info(self.path)


Place = Path | Remote


def place(root: str) -> Place:
    """The folder that `data.root` names. Raises `ValueError` for a URI that nothing here can read."""
    scheme, separator, rest = root.partition("://")
    if not separator:
        return Path(root)
    if scheme == "file":
        return Path(rest)
    return Remote(root, _file_system(root)[1].rstrip("/"))


def absolute(root: str) -> str:
    """The same place from any working folder."""
    return root if is_remote(root) else str(Path(root.removeprefix("file://")).absolute())


def is_remote(root: str | None) -> bool:
    return isinstance(root, str) and "://" in root and not root.startswith("file://")


def size_of(file: Place) -> int:
    return int(file._info().size) if isinstance(file, Remote) else file.stat().st_size


def hash_of(file: Place) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(_BUFFER):
            digest.update(block)
    return digest.hexdigest()


def find(root: Place, patterns: str) -> list[tuple[str, int]]:
    """Relative path and size of the files that `patterns` names, sorted, each once.

    Patterns are joined by `::`. `{000..146}` counts, `{a,b}` chooses, and `*`, `?` and `**` are those of a glob. Raises
    `ValueError` for a counted or chosen file that is not there.
    """
    found: dict[str, int] = {}
    for pattern in itertools.chain.from_iterable(_expanded(p) for p in patterns.split("::")):
        if glob.has_magic(pattern):
            if isinstance(root, Remote):
                found.update(root.glob(pattern))
            else:
                files = (p for p in root.glob(pattern) if p.is_file())
                found.update((p.relative_to(root).as_posix(), p.stat().st_size) for p in files)
        elif (root / pattern).is_file():
            found[pattern] = size_of(root / pattern)
        else:
            raise ValueError(f"{root / pattern} is not there but '{patterns}' names it; correct the pattern")
    return sorted(found.items())


def _expanded(pattern: str) -> list[str]:
    if match := _RANGE.search(pattern):
        first, last = match[1], match[2]
        middles = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    elif match := _CHOICE.search(pattern):
        middles = match[1].split(",")
    else:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for middle in middles for whole in _expanded(before + middle + after)]


@functools.lru_cache(maxsize=8)
def _file_system(uri: str) -> tuple[Any, str]:
    """A pyarrow file system and the path that `uri` names on it."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        reason: Exception = error  # no file system of pyarrow's own
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{_shown(uri)} cannot be opened: {error}") from None
    try:
        import fsspec

        found, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError, OSError) as error:
        raise ValueError(
            f"{_shown(uri)} cannot be opened: pyarrow says '{reason}', fsspec says '{error}'; "
            "install the package that fsspec names, or copy the data here"
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(found)), path


def _shown(uri: str) -> str:
    return uri.split("?", 1)[0]
