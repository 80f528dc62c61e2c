"""Many runs as one: `rmdd sweep`, `search`, and `resume` for all that can go on where it stopped."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmdd import config
from rmdd.cli.command import Call, Folder, Output, Sets, Source, command, failure
from rmdd.cli.compare import compared
from rmdd.cli.console import search_table, sweep_table
from rmdd.cli.loading import load, load_folder
from rmdd.cli.steps import everything
from rmdd.core.storage import address_of

if TYPE_CHECKING:
    from rmdd.searches.sweeps import Member

Over = Annotated[
    list[str] | None, typer.Option("--over", metavar="A.B=C,D", help="A field and its values; can be repeated.")
]
Settings = Annotated[
    Path | None, typer.Option("--settings", metavar="YAML", help="A list of mappings from fields to values.")
]
Begun = Annotated[
    str | None, typer.Option("--resume", metavar="FOLDER", help="Go on with the search in this folder, or URI.")
]


@command
def sweep(call: Call, source: Source, over: Over = None, settings: Settings = None, set_: Sets = None) -> Output:
    """Many runs as one, side by side: seeds, methods or settings; what they share is made once."""
    from rmdd.searches.sweeps import members, read_over, read_settings

    listed = read_settings(settings) if settings else []
    return swept(call, members(lambda more: load(source, [*(set_ or []), *more]), read_over(over or []), listed))


def swept(call: Call, members: "list[Member]") -> Output:
    """Do a sweep or go on with it."""
    from rmdd.searches.sweeps import run_all, sweep_folder

    if mistakes := [f"{m.label}: {mistake}" for m in members for mistake in call.mistakes(m.run)]:
        raise config.ConfigError(mistakes, "sweep")
    folder = sweep_folder(members)
    address = address_of(members[0].run.runtime, folder)
    with call.working(folder, address) as progress:
        result = run_all(members, progress)
    lines = [sweep_table(result.runs, result.groups), f"sweep: {address} (results.json, runs.csv)"]
    failed = failure(f"of {len(members)} runs failed", [(row["settings"], row["error"]) for row in result.failed])
    return Output({"sweep": address, "runs": result.runs, "groups": result.groups}, lines, failed)


@command
def search(
    call: Call,
    source: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A preset's name or a YAML file.")] = None,
    set_: Sets = None,
    resume: Begun = None,
) -> Output:
    """Try values of the fields in `search.space`, compare them on val, and write the best run file."""
    return searched(call, _search_of(source, set_ or [], resume))


def _search_of(source: str | None, sets: list[str], folder: str | None) -> config.Run:
    """The run that a search begins with, or was begun with, `search.trials` and the like changed."""
    from rmdd.searches import begun_in, search_folder

    if folder is None:
        if source is None:
            raise config.ConfigError(["give CONFIG to begin a search, or --resume FOLDER to go on with one"], "search")
        return load(source, sets)
    if source is not None:
        raise config.ConfigError([f"--resume {folder} has its own run file; leave '{source}' out"], "search")
    begun = begun_in(folder)
    if begun is None:
        raise config.ConfigError(["no search.json in it; give a folder such as runs/searches/demo-0123abcd"], folder)
    changed = config.load(begun.model_dump(mode="json"), sets)
    if search_folder(changed).name != search_folder(begun).name:
        wrong = "--set changes what the search is; only search.trials, concurrency, storage and runtime may change"
        raise config.ConfigError([wrong], folder)
    return changed


def searched(call: Call, base: config.Run) -> Output:
    """Do a search or go on with it."""
    from rmdd.searches import check, run_search, search_folder

    check(base)
    call.check(base)
    folder = search_folder(base)
    address = address_of(base.runtime, folder)
    with call.working(folder, address) as progress:
        result = run_search(base, progress)
    table, best = result.table, result.table.winner
    lines = [
        search_table(table.rows, table.best),
        f"search: {address} (results.json, trials.csv, report.html)",
        f"best run file: {address}/best.yaml" if best else "no trial has finished",
    ]
    facts = {"search": address, "best": best, "front": table.best, "trials": table.rows}
    return Output(facts, lines, failure("trial(s) could not be finished", result.failures.items()))


@command
def resume(call: Call, folder: Folder) -> Output:
    """Go on with a run, a sweep, a search or a comparison where it stopped."""
    from rmdd import searches
    from rmdd.comparisons import resume as comparisons
    from rmdd.searches.sweeps import members_in

    if members := members_in(folder):
        return swept(call, members)
    if base := searches.begun_in(folder):
        return searched(call, base)
    if comparison := comparisons.begun_in(folder):
        return compared(call, comparison)
    with call.pipeline(load_folder(folder)) as pipeline:
        return everything(pipeline)
