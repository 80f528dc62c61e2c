"""Input files, local or at a URI: functions that turn `data.root` into a path, and open, hash and list files."""

from __future__ import annotations

import glob
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

from rmdd.core.remote import BUFFER, RemotePath

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


InputPath = Path | RemotePath


def input_path(root: str | None) -> InputPath:
    """Return `data.root` as a local path or a remote path. Raises `ValueError` for a URI that cannot be opened."""
    scheme, separator, rest = (root or "").partition("://")
    if not separator:
        return Path(root or "")
    if scheme == "file":
        return Path(rest)
    path = RemotePath(root or "")
    try:
        path.store  # noqa: B018  # opening the store here reports a wrong URI early
    except OSError as error:
        raise ValueError(str(error)) from error
    return path


def absolute(root: str) -> str:
    """Return a local folder as an absolute path; a URI is returned unchanged."""
    return root if is_remote(root) else str(Path(root.removeprefix("file://")).absolute())


def is_remote(root: str | None) -> bool:
    return isinstance(root, str) and "://" in root and not root.startswith("file://")


def size_of(file: InputPath) -> int:
    return file.size if isinstance(file, RemotePath) else file.stat().st_size


def seekable(file: InputPath) -> Any:
    """Open a file for reading bytes, with support for `seek`."""
    return file.store.open(file.inside, seekable=True) if isinstance(file, RemotePath) else file.open("rb")


def parquet_file(file: InputPath) -> Any:
    import pyarrow.parquet as pq  # pyarrow.parquet is slow to import, and callers that only handle paths do not need it

    return pq.ParquetFile(seekable(file) if isinstance(file, RemotePath) else file)


def hash_of(file: InputPath) -> str:
    """Return the SHA-256 of the content of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(BUFFER):
            digest.update(block)
    return digest.hexdigest()


def find(root: InputPath, patterns: str) -> list[tuple[str, int]]:
    """Return the relative path and size in bytes of each file that matches `patterns`, sorted, without duplicates.

    Several patterns are separated by `::`. In a pattern, `{000..146}` stands for a range of numbers, `{a,b}` for a list
    of alternatives, and `*`, `?` and `**` are glob patterns. Raises `ValueError` if a file that a range or a list names
    is missing.
    """
    sizes: dict[str, int] = {}
    for pattern in itertools.chain.from_iterable(_expanded(p) for p in patterns.split("::")):
        if glob.has_magic(pattern):
            if isinstance(root, RemotePath):
                sizes.update(root.glob(pattern))
            else:
                files = (p for p in root.glob(pattern) if p.is_file())
                sizes.update((p.relative_to(root).as_posix(), p.stat().st_size) for p in files)
        elif (root / pattern).is_file():
            sizes[pattern] = size_of(root / pattern)
        else:
            raise ValueError(f"{root / pattern} is missing but '{patterns}' names it; correct the pattern")
    return sorted(sizes.items())


def _expanded(pattern: str) -> list[str]:
    if match := _RANGE.search(pattern):
        first, last = match[1], match[2]
        middles = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    elif match := _CHOICE.search(pattern):
        middles = match[1].split(",")
    else:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for middle in middles for path in _expanded(before + middle + after)]
