"""What people have, one file per format. A source turns annotations into rows and opens no image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rmdd.config import Data
from rmdd.data.sources.row import Row


def rows(data: Data) -> tuple[Iterator[Row], list[Path]]:
    """The rows of `data.source` in file order, and the annotation files they come from.

    A layout that cannot be read raises `ValueError`, at the latest while the rows are drawn.
    """
    from rmdd.data.sources import karpathy, lists, scenes, table

    sources = {"karpathy": karpathy.rows, "lists": lists.rows, "table": table.rows, "scenes": scenes.rows}
    if data.root is not None and not Path(data.root).is_dir():
        raise ValueError(f"data.root {data.root} is not a folder; set it to the folder that image paths start in")
    return sources[data.source](data)
