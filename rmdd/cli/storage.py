"""Commands that look after a storage: `rmdd runs` and `rmdd clean`."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from rmdd import config
from rmdd.cli.command import Output, command
from rmdd.cli.console import duration, size
from rmdd.cli.table import FittedTable
from rmdd.core.storage import is_uri
from rmdd.inventory.contents import open_contents

if TYPE_CHECKING:
    from rmdd.inventory.cleaning import Cleaning
    from rmdd.inventory.listing import Listed

StorageAddress = Annotated[str, typer.Argument(metavar="[STORAGE]", help="Folder or URI of runtime.storage.")]


@command(options=("json", "debug"))
def runs(storage: StorageAddress = "runs") -> Output:
    """List the runs, sweeps, searches, comparisons, coresets and models of a storage: scores, stage, disk use, age."""
    from rmdd.inventory.listing import listed

    with open_contents(storage) as contents:
        rows = listed(contents)
    lines = [_table(rows)] if rows else [f"{storage} holds no runs yet; start one with `rmdd run` or `rmdd demo`"]
    problems = [f"{row.folder}: cannot be loaded by this version of rmdd: {row.problem}" for row in rows if row.problem]
    return Output([row.as_json() for row in rows], [*lines, *problems])


@command(options=("json", "debug"))
def clean(
    storage: StorageAddress = "runs",
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed; without it, nothing is removed.")] = False,
    drop: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="NAME", help="Also drop this run, model, sweep ... (`*` allowed); repeatable."),
    ] = None,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than", metavar="AGE", help="Remove only what did not change for 12h, 30d or 4w, also of --run."
        ),
    ] = "0d",
    keep_experts: Annotated[bool, typer.Option("--keep-experts", help="Keep experts that nothing needs.")] = False,
) -> Output:
    """List, and with --yes remove, what no run, sweep, search, comparison or coreset of a storage needs."""
    from rmdd.inventory.cleaning import plan_cleaning

    if is_uri(storage):
        raise config.ConfigError(["only folders can be cleaned, not URIs; see `rmdd docs storage`"], storage)
    if not (age := re.fullmatch(r"(\d+)([hdw])", older_than)):
        raise config.ConfigError([f"--older-than {older_than}: write a number and h, d or w, such as 30d"], "clean")
    seconds = float(age[1]) * {"h": 3600, "d": 86400, "w": 604800}[age[2]]
    with open_contents(storage) as contents:
        cleaning = plan_cleaning(contents, drop or [], seconds, keep_experts)
        if yes:
            cleaning.remove()
    return Output(cleaning.as_json() | {"removed": yes}, list(_lines(cleaning, yes)))


def _lines(cleaning: "Cleaning", removed: bool) -> Iterator[str]:
    """Yield a line per file or folder (one for all empty files), and what stays because too little is known."""
    word = "removed" if removed else "would remove"
    for removal in sorted((r for r in cleaning.removals if r.bytes), key=lambda r: -r.bytes):
        yield f"{word} {removal.name} ({size(removal.bytes)}): {removal.why}"
    for why, count in Counter(r.why for r in cleaning.removals if not r.bytes).items():
        yield f"{word} {count} empty {'file' if count == 1 else 'files'}: {why}"
    if cleaning.unclear:
        names = ", ".join(cleaning.unclear)
        yield (
            f"this version of rmdd cannot tell what {names} need, so nothing that they may need is removed; resume "
            f"them, or drop them with --run. {next(iter(cleaning.unclear))}: {next(iter(cleaning.unclear.values()))}"
        )
    total = f"{len(cleaning.removals)} files and folders, {size(cleaning.bytes)}"
    if not cleaning.removals:
        yield "nothing to remove"
    elif removed:
        yield f"removed {total}"
    else:
        yield f"{total}; nothing was removed yet: give --yes to remove them"
    if cleaning.working:
        yield f"--yes is refused while a process works in the storage: {', '.join(cleaning.working)}"


def _table(rows: "Sequence[Listed]") -> Table:
    caption = (
        "val, test: R@mean in %; for a sweep or search: the scores of its best run on val.\n"
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
