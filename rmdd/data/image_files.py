"""Image files below `data.root`: which paths are accepted, and reading the bytes of a file."""

from __future__ import annotations

import errno
import re
from pathlib import PurePosixPath
from typing import Any

from rmdd.config import Data
from rmdd.data.counts import is_text
from rmdd.data.decode import ImageError
from rmdd.data.inputs import InputPath, is_remote
from rmdd.data.layouts import alternatives

PROBLEMS = {
    "no_path": "the image path is missing or not text",
    "absolute_path": "absolute paths are not allowed; write it relative to data.root",
    "escaping_path": "the path leads out of data.root",
}

_DRIVE = re.compile(r"[A-Za-z]:")
_PATH_ERRORS = (errno.EACCES, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
"""System errors that concern a single image, which is then quarantined; all other I/O errors stop the ingest."""


def checked_path(value: Any) -> tuple[str, str | None]:
    """Return a normalised relative POSIX path and None, or an empty path and the reason why the path is rejected."""
    if not isinstance(value, str) or not value.strip() or not is_text(value) or "\0" in value:
        return "", "no_path"
    path = PurePosixPath(value.strip().replace("\\", "/"))
    if path.is_absolute() or _DRIVE.match(str(path)):
        return "", "absolute_path"
    if ".." in path.parts:
        return "", "escaping_path"
    return (str(path), None) if path.parts else ("", "no_path")


def read_image(path: str, root: InputPath, data: Data) -> bytes:
    """Read the image file with a checked path below `root`. Raises `ImageError` if it is missing or unreadable."""
    for name in alternatives(path, data.layout):
        try:
            return (root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and (error.errno not in _PATH_ERRORS or is_remote(data.root)):
                raise
            raise ImageError("unreadable", str(error)[:200]) from None
    raise ImageError("missing_file", "no such file under data.root")
