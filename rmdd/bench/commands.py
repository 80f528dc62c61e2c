"""`rmdd bench ingest` as the command line has it."""

from pathlib import Path
from typing import Annotated

import typer


def bench_ingest(
    pairs: Annotated[int, typer.Option(help="Pairs to generate and read.")] = 20_000,
    side: Annotated[int, typer.Option(help="Side of the JPEGs.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that read.")] = 2,
    object_store: Annotated[int, typer.Option(help="Object store of Ray, in MiB.")] = 512,
    variants: Annotated[str, typer.Option(help="Of loop, loader, rmdd, in_turn; the first is the yardstick.")] = (
        "loop,loader,rmdd,in_turn"
    ),
    folder: Annotated[Path | None, typer.Option(help="Where the pairs lie and stay; default: a temporary one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure pairs per second and peak memory of an ingest beside a plain loop and a torch DataLoader."""
    from rmdd.cli import _outcome, _print_json

    with _outcome(debug):
        import tempfile

        from rmdd.bench import ingest

        case = ingest.Case(pairs=pairs, side=side, workers=workers, object_store_mb=object_store)
        with tempfile.TemporaryDirectory() as temporary:
            found = ingest.bench_ingest(case, folder or Path(temporary), variants.split(","), out)
        if json:
            _print_json(found)
        else:
            typer.echo(ingest.table(found))
