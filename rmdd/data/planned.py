"""Images for the rows of an ingest plan: read from files, or drawn by the `draw` function of the data source."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.config import Data
from rmdd.data.decode import ImageError
from rmdd.data.inputs import InputPath, input_path, is_remote
from rmdd.data.layouts import alternatives
from rmdd.data.source import AnnotationSource, Candidate

PLAN_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("drawing", pa.string()),
    ]
)

_CONCURRENT_READS = 32
"""Number of simultaneous read requests to a remote store."""

_PATH_ERRORS = (errno.EACCES, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
"""System errors that concern a single image, which is then quarantined; all other I/O errors stop the ingest."""


def candidates(plan: Path, data: Data, source: AnnotationSource) -> Iterator[Candidate]:
    """Read the rows of an ingest plan from the Parquet file `plan`; yield each row with the bytes of its image."""
    root = input_path(data.root)

    def image_of(row: dict[str, Any]) -> bytes | ImageError:
        try:
            drawing = row["drawing"]
            if drawing is None:
                return _read(row["pair_id"], root, data)
            assert source.draw is not None, f"source {data.source} has rows to draw but no `draw` function"
            return source.draw(root, drawing)
        except ImageError as error:
            return error

    with pq.ParquetFile(plan) as file, ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        for batch in file.iter_batches(batch_size=_CONCURRENT_READS):
            rows = batch.to_pylist()
            images = pool.map(image_of, rows) if is_remote(data.root) else map(image_of, rows)
            for row, image in zip(rows, images, strict=True):
                captions = tuple(row["captions"])
                yield Candidate(row["pair_id"], captions, row["split"], row["source"], row["origin"], image)


def _read(path: str, root: InputPath, data: Data) -> bytes:
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
