"""What people have, one file per format. A source of annotations turns them into rows and opens no image; a source of
whole samples (tars, Parquet files with the images inside) lists its files, and workers read them."""

from __future__ import annotations

from collections.abc import Iterator

from rmdd.config import Data
from rmdd.data.inputs import InputPath, input_path
from rmdd.data.sources.row import Row

WHOLE = ("webdataset", "parquet")
"""Sources whose files hold images and captions together."""


def rows(data: Data) -> tuple[Iterator[Row], list[InputPath]]:
    """The rows of `data.source` in file order, and the annotation files they come from.

    A layout that cannot be read raises `ValueError`, at the latest while the rows are drawn.
    """
    from rmdd.data.sources import classes, cocoqa, karpathy, lists, scenes, table

    sources = {"karpathy": karpathy.rows, "lists": lists.rows, "table": table.rows, "scenes": scenes.rows}
    sources |= {"classes": classes.rows, "cocoqa": cocoqa.rows}
    _check_root(data)
    return sources[data.source](data)


def files(data: Data) -> list[tuple[str, int, str | None]]:
    """Path below the root, size in bytes and split (None: not in its name) of every file of a source in `WHOLE`."""
    from rmdd.data.sources import parquet, webdataset

    _check_root(data)
    return (webdataset.files if data.source == "webdataset" else parquet.files)(data)


def _check_root(data: Data) -> None:
    if data.root is not None and not (root := input_path(data.root)).is_dir():
        raise ValueError(f"data.root {root} is not a folder; set it to the folder that image paths start in")
