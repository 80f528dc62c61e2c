"""Commands that look after a storage: `rmdd runs`."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from rmdd.cli.command import Output, command
from rmdd.cli.console import duration, size
from rmdd.cli.table import FittedTable

if TYPE_CHECKING:
    from rmdd.inventory.listing import Listed

StorageAddress = Annotated[str, typer.Argument(metavar="[STORAGE]", help="Folder or URI of runtime.storage.")]


@command(options=("json", "debug"))
def runs(storage: StorageAddress = "runs") -> Output:
    """List the runs, sweeps, searches, comparisons and coresets of a storage: scores, stage, disk use and age."""
    from rmdd.inventory.contents import open_contents
    from rmdd.inventory.listing import listed

    with open_contents(storage) as contents:
        rows = listed(contents)
    lines = [_table(rows)] if rows else [f"{storage} holds no runs yet; start one with `rmdd run` or `rmdd demo`"]
    problems = [f"{row.folder}: cannot be loaded by this version of rmdd: {row.problem}" for row in rows if row.problem]
    return Output([row.as_json() for row in rows], [*lines, *problems])


def _table(rows: "Sequence[Listed]") -> Table:
    caption = (
        "val, test: R@mean in %; of a sweep or search, of the run that is best on val.\n"
        "disk: the folder itself + the data, experts, phases and baselines it needs, which others may share."
    )
    table = FittedTable(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("folder", overflow="fold")
    for name in ("kind", "method"):
        table.add_column(name)
    for name in ("pairs", "val", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("stage")
    for name in ("disk", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        scores = ["" if score is None else f"{score:.1f}" for score in (row.val, row.test)]
        disk = f"{size(row.bytes)} + {size(row.shared_bytes)}" if row.shared_bytes else size(row.bytes)
        stage, age = f"{row.stage}, running" if row.running else row.stage, duration(time.time() - row.changed)
        pairs = "" if row.budget is None else f"{row.budget:,}"
        cells = [row.folder, row.kind, row.method, pairs, *scores, stage, disk, age]
        table.add_row(*map(Text, cells))
    return table
