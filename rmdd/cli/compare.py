"""Commands that compare sets with each other and with published numbers: `rmdd compare`, `transfer`, `published`."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import RenderableType
from rich.text import Text

from rmdd import config
from rmdd.cli.command import Call, Output, Sets, command, failure, presets_from
from rmdd.cli.loading import load
from rmdd.cli.table import FittedTable
from rmdd.core.storage import address_of

if TYPE_CHECKING:
    from rmdd.comparisons import tables
    from rmdd.comparisons.compare import Comparison
    from rmdd.comparisons.transfer import Transfer

Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="Preset, run file or run folder with data and protocol; default: first set's.",
        autocompletion=presets_from,
    ),
]
ONLY_IN_FILES = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "parameters", "bytes", "seconds")
"""Columns of measured results that are written to files, but not printed: they do not fit on a terminal."""


@command
def compare(
    call: Call,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FOLDER...", help="Distilled sets, runs, coresets, or the words random, random:N and full."
        ),
    ],
    source: Config = None,
    set_: Sets = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="NAME", help="Name of the row that all others are compared with.")
    ] = None,
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Embed captions again for sets made with a different text encoder.")
    ] = False,
) -> Output:
    """Evaluate distilled sets and coresets under one protocol; print their scores, and published results."""
    from rmdd.comparisons.compare import prepare_comparison

    return run_comparison(call, prepare_comparison(words, source, set_ or [], against, reencode, load))


@command
def transfer(
    call: Call,
    word: Annotated[str, typer.Argument(metavar="[NAME=]SET", help="Folder of a distilled set or of a finished run.")],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TOWER", help="IMAGE[@WEIGHTS], text:ENCODER or IMAGE+text:ENCODER; repeatable."),
    ] = None,
    source: Config = None,
    set_: Sets = None,
    random: Annotated[bool, typer.Option("--random", help="Also train every tower on random pairs.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Also train every tower on all training pairs.")] = False,
) -> Output:
    """Train students with different towers on a set, with its learned learning rates and with rates chosen on val."""
    from rmdd.comparisons.transfer import prepare_transfer

    return run_comparison(
        call, prepare_transfer(word, to or [], source, set_ or [], random=random, full=full, load=load)
    )


@command(options=("json",))
def published(
    dataset: Annotated[str | None, typer.Option(help="Dataset, such as flickr30k, flickr8k, coco or cc3m.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Nominal budget in pairs, such as 500, or the word full.")] = None,
    method: Annotated[str | None, typer.Option(help="Distillation method, such as LoRS.")] = None,
) -> Output:
    """Print published results, each with the paper it is from and the protocol of that paper."""
    from rmdd.comparisons import published as numbers

    try:
        rows = numbers.published(dataset, pairs, method)
    except ValueError as error:
        raise config.ConfigError([str(error)], "published") from error
    return Output(rows, list(_rich_tables([numbers.table("published, not measured here", rows)])))


def run_comparison(call: Call, comparison: "Comparison | Transfer") -> Output:
    """Start or resume a comparison or transfer; return its tables and the path or URI of its folder."""
    address = address_of(comparison.run.runtime, comparison.folder)
    with call.working(comparison.folder, address) as progress:
        result: Any = comparison.execute(progress)
    other_facts = {"published": result.published} if hasattr(result, "published") else {"transfer_mean": result.mean}
    lines = [*_rich_tables(result.tables), f"comparison: {address} (table.md, table.html, table.csv, results.json)"]
    failed = failure(f"of {len(result.rows)} rows failed", [(row["name"], row["error"]) for row in result.failed])
    return Output({"comparison": address, "rows": result.rows} | other_facts, lines, failed)


def _rich_tables(measured: "Sequence[tables.ResultTable]") -> Iterable[RenderableType]:
    for table in measured:
        drawn = FittedTable(title=Text(table.title), style="dim" if table.apart else "", box=box.SIMPLE_HEAD)
        shown = [k for k, name in enumerate(table.columns) if table.apart or name not in ONLY_IN_FILES]
        for k in shown:
            justify: Literal["left", "right"] = "left" if table.aligned_left()[k] else "right"
            drawn.add_column(Text(table.columns[k]), justify=justify, overflow="fold")
        for cells in table.rows:
            drawn.add_row(*(Text(cells[k]) for k in shown))
        yield drawn
        yield from (Text(f"- {note}") for note in table.notes)
