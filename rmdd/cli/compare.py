"""The words of `rmdd compare`, `rmdd transfer` and `rmdd published`."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmdd import config
from rmdd.cli.common import Debug, Json, Quiet, Sets, load, outcome, print_json, stop_on_sigterm

if TYPE_CHECKING:
    from rmdd.comparisons.compare import Comparison
    from rmdd.comparisons.tables import Table
    from rmdd.comparisons.transfer import Transfer

Config = Annotated[
    str | None,
    typer.Option("--config", metavar="CONFIG", help="Protocol and data; default: what the first set was made by."),
]


def register(app: typer.Typer) -> None:
    for command in (compare, transfer, published):
        app.command()(command)


def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FOLDER...", help="Distilled sets, runs, subsets, and the words random, random:N and full."
        ),
    ],
    source: Config = None,
    set_: Sets = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="NAME", help="The row that others are compared with.")
    ] = None,
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Embed captions of sets with another text encoder anew.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate sets and subsets under one protocol, in one table, with published numbers apart."""

    def begin() -> "Comparison":
        from rmdd.comparisons.compare import begin

        return begin(words, source, set_ or [], against, reencode, load)

    go(begin, json, quiet, debug)


def transfer(
    word: Annotated[str, typer.Argument(metavar="[NAME=]SET", help="The folder of a distilled set, or of its run.")],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TOWER", help="IMAGE[@WEIGHTS], text:ENCODER or IMAGE+text:ENCODER; repeat it."),
    ] = None,
    source: Config = None,
    set_: Sets = None,
    random: Annotated[bool, typer.Option("--random", help="Random pairs for every tower, too.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All pairs for every tower, too: trains its experts.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train students with other towers on a set: learned rates, and rates chosen on val."""

    def begin() -> "Transfer":
        from rmdd.comparisons.transfer import begin

        return begin(word, to or [], source, set_ or [], random=random, full=full, load=load)

    go(begin, json, quiet, debug)


def published(
    dataset: Annotated[str | None, typer.Option(help="Such as flickr30k, flickr8k, coco, cc3m.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Nominal budget, or full.")] = None,
    method: Annotated[str | None, typer.Option(help="Such as LoRS.")] = None,
    json: Json = False,
) -> None:
    """Print published numbers, with source and protocol."""
    with outcome():
        from rmdd.comparisons import published as numbers

        try:
            rows = numbers.published(dataset, pairs, method)
        except ValueError as error:
            raise config.ConfigError([str(error)], "published") from error
        if json:
            print_json(rows)
            return
        _print([numbers.table("published, not measured here", rows)])


def go(begin: "Callable[[], Comparison | Transfer]", as_json: bool, quiet: bool, debug: bool) -> None:
    """Begin or go on, print the tables, and say where they are."""
    folders: dict[Path, str] = {}
    with outcome(debug, folders):
        asked = begin()
        from rmdd.core.progress import Progress
        from rmdd.core.storage import address_of

        runtime, folder = asked.run.runtime, asked.folder
        folders[folder] = address = address_of(runtime, folder)
        stop_on_sigterm()
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = asked.go(Progress(quiet))
        if as_json:
            rest = {"published": found.published} if hasattr(found, "published") else {"transfer_mean": found.mean}
            print_json({"comparison": address, "rows": found.rows} | rest)
        else:
            _print(found.tables)
            typer.echo(f"comparison: {address} (table.md, table.html, table.csv, results.json)")
        if found.failed:
            reasons = "".join(f"\n{row['name']}: {row['error']}" for row in found.failed)
            raise RuntimeError(f"{len(found.failed)} of {len(found.rows)} rows failed{reasons}")


LEFT_TO_FILES = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "parameters", "bytes", "seconds")
"""Columns of measured tables that a terminal has no room for."""


def _print(tables: "Sequence[Table]") -> None:
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table as Drawn
    from rich.text import Text

    from rmdd.cli.console import stdout
    from rmdd.comparisons.tables import TEXTS

    out = stdout()
    for table in tables:
        drawn = Drawn(title=Text(table.title), style="dim" if table.apart else "", box=box.SIMPLE_HEAD)
        shown = [k for k, name in enumerate(table.columns) if table.apart or name not in LEFT_TO_FILES]
        for k in shown:
            left = k == 0 or table.columns[k] in TEXTS
            drawn.add_column(Text(table.columns[k]), justify="left" if left else "right", overflow="fold")
        for cells in table.rows:
            drawn.add_row(*(Text(cells[k]) for k in shown))
        whole = Measurement.get(out, out.options.update(max_width=1000), drawn).maximum
        out.print(drawn, highlight=False, width=None if out.is_terminal else max(whole, out.width))
        for note in table.notes:
            out.print(f"- {note}", highlight=False, markup=False)
