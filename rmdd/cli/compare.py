"""Sets beside each other and beside published numbers: `rmdd compare`, `transfer`, `published`."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rmdd import config
from rmdd.cli.command import Call, Output, Sets, command, failure
from rmdd.cli.loading import load
from rmdd.core.storage import address_of

if TYPE_CHECKING:
    from rmdd.comparisons import tables
    from rmdd.comparisons.compare import Comparison
    from rmdd.comparisons.transfer import Transfer

Config = Annotated[
    str | None,
    typer.Option("--config", metavar="CONFIG", help="Protocol and data; default: what the first set was made by."),
]
LEFT_TO_FILES = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "parameters", "bytes", "seconds")
"""Columns of measured tables that a terminal has no room for."""


@command
def compare(
    call: Call,
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
) -> Output:
    """Evaluate sets and subsets under one protocol, in one table, with published numbers apart."""
    from rmdd.comparisons.compare import begin

    return compared(call, begin(words, source, set_ or [], against, reencode, load))


@command
def transfer(
    call: Call,
    word: Annotated[str, typer.Argument(metavar="[NAME=]SET", help="The folder of a distilled set, or of its run.")],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TOWER", help="IMAGE[@WEIGHTS], text:ENCODER or IMAGE+text:ENCODER; repeat it."),
    ] = None,
    source: Config = None,
    set_: Sets = None,
    random: Annotated[bool, typer.Option("--random", help="Random pairs for every tower, too.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All pairs for every tower, too: trains its experts.")] = False,
) -> Output:
    """Train students with other towers on a set: learned rates, and rates chosen on val."""
    from rmdd.comparisons.transfer import begin

    return compared(call, begin(word, to or [], source, set_ or [], random=random, full=full, load=load))


@command(options=("json",))
def published(
    dataset: Annotated[str | None, typer.Option(help="Such as flickr30k, flickr8k, coco, cc3m.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Nominal budget, or full.")] = None,
    method: Annotated[str | None, typer.Option(help="Such as LoRS.")] = None,
) -> Output:
    """Print published numbers, with source and protocol."""
    from rmdd.comparisons import published as numbers

    try:
        rows = numbers.published(dataset, pairs, method)
    except ValueError as error:
        raise config.ConfigError([str(error)], "published") from error
    return Output(rows, list(_drawn([numbers.table("published, not measured here", rows)])))


def compared(call: Call, begun: "Comparison | Transfer") -> Output:
    """Begin or go on, print the tables, and say where they are."""
    address = address_of(begun.run.runtime, begun.folder)
    with call.working(begun.folder, address) as progress:
        result: Any = begun.go(progress)
    rest = {"published": result.published} if hasattr(result, "published") else {"transfer_mean": result.mean}
    lines = [*_drawn(result.tables), f"comparison: {address} (table.md, table.html, table.csv, results.json)"]
    failed = failure(f"of {len(result.rows)} rows failed", [(row["name"], row["error"]) for row in result.failed])
    return Output({"comparison": address, "rows": result.rows} | rest, lines, failed)


def _drawn(measured: "Sequence[tables.ResultTable]") -> Iterable[RenderableType]:
    for table in measured:
        drawn = Table(title=Text(table.title), style="dim" if table.apart else "", box=box.SIMPLE_HEAD)
        shown = [k for k, name in enumerate(table.columns) if table.apart or name not in LEFT_TO_FILES]
        for k in shown:
            justify: Literal["left", "right"] = "left" if table.left()[k] else "right"
            drawn.add_column(Text(table.columns[k]), justify=justify, overflow="fold")
        for cells in table.rows:
            drawn.add_row(*(Text(cells[k]) for k in shown))
        yield drawn
        yield from (Text(f"- {note}") for note in table.notes)
