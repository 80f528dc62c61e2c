"""Planned rows to image bytes: find the file, decode it once to be sure, pass on what it holds.

Runs in the driver or in Ray workers, on a table of rows at a time.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rmdd.data.decode import ImageError, decode
from rmdd.data.shards import SCHEMA
from rmdd.data.sources import scenes
from rmdd.data.sources.layouts import alternatives

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
READ_SCHEMA = pa.schema([*SCHEMA, ("origin", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True)
class Reading:
    """What `read` needs beside the rows."""

    root: str
    layout: str | None
    max_pixels: int
    background: tuple[int, int, int]
    exif_orientation: bool
    reencode: int | None


def read(table: pa.Table, *, reading: Reading) -> pa.Table:
    """PLAN_SCHEMA to READ_SCHEMA, row by row: `image` is filled, or `reason` and `detail` say why not."""
    images: list[bytes | None] = []
    reasons: list[str | None] = []
    details: list[str | None] = []
    for pair_id, drawing in zip(table["pair_id"].to_pylist(), table["drawing"].to_pylist(), strict=True):
        try:
            data = scenes.draw(drawing) if drawing is not None else _file(pair_id, reading)
            images.append(_checked(data, reading))
            reasons.append(None)
            details.append(None)
        except ImageError as error:
            images.append(None)
            reasons.append(error.reason)
            details.append(error.detail)
    columns = {name: table[name] for name in ("pair_id", "captions", "split", "source", "origin")}
    found = columns | {"image": pa.array(images, pa.binary()), "reason": reasons, "detail": details}
    return pa.table({name: found[name] for name in READ_SCHEMA.names}, schema=READ_SCHEMA)


def _file(path: str, reading: Reading) -> bytes:
    root = Path(reading.root)
    try:
        for place in alternatives(path, reading.layout):
            if (root / place).is_file():
                return (root / place).read_bytes()
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte
        raise ImageError("unreadable", str(error)[:200]) from None
    raise ImageError("missing_file", "no such file under data.root")


def _checked(data: bytes, reading: Reading) -> bytes:
    image = decode(
        data,
        max_pixels=reading.max_pixels,
        background=reading.background,
        exif_orientation=reading.exif_orientation,
    )
    if reading.reencode is None:
        return data
    from PIL import Image

    out = io.BytesIO()
    image.resize((reading.reencode, reading.reencode), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()
