"""Images for the rows of an ingest plan: read from files, or drawn by the `draw` function of the data source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmdd.config import Data
from rmdd.data.decode import ImageError
from rmdd.data.image_files import read_image
from rmdd.data.inputs import InputPath, input_path, is_remote
from rmdd.data.source import Candidate

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


def candidates(plan: Path, data: Data, draw: Callable[[InputPath, str], bytes] | None) -> Iterator[Candidate]:
    """Read the rows of an ingest plan from the Parquet file `plan`; yield each row with the bytes of its image.

    `draw` is the function of the data source that draws images, if it has one.
    """
    root = input_path(data.root)

    def image_of(row: dict[str, Any]) -> bytes | ImageError:
        try:
            drawing = row["drawing"]
            if drawing is None:
                return read_image(row["pair_id"], root, data)
            assert draw is not None, f"source {data.source} has rows to draw but no `draw` function"
            return draw(root, drawing)
        except ImageError as error:
            return error

    with pq.ParquetFile(plan) as file, ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        for batch in file.iter_batches(batch_size=_CONCURRENT_READS):
            rows = batch.to_pylist()
            images = pool.map(image_of, rows) if is_remote(data.root) else map(image_of, rows)
            for row, image in zip(rows, images, strict=True):
                captions = tuple(row["captions"])
                yield Candidate(row["pair_id"], captions, row["split"], row["source"], row["origin"], image)
