"""Commands that start many runs: `rmdd sweep` and `search`; also `resume`, which continues interrupted work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmdd import config
from rmdd.cli.command import SOURCE, Call, Folder, Output, Sets, command, failure, presets_from
from rmdd.cli.compare import run_comparison
from rmdd.cli.console import search_table, sweep_table
from rmdd.cli.loading import load, load_folder
from rmdd.cli.steps import run_all_steps
from rmdd.core.storage import address_of

if TYPE_CHECKING:
    from rmdd.searches.sweeps import Member

Over = Annotated[
    list[str] | None, typer.Option("--over", metavar="A.B=C,D", help="A field and the values to try; repeatable.")
]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG...", help="Presets' names or YAML files to run.", autocompletion=presets_from),
]
Settings = Annotated[
    Path | None, typer.Option("--settings", metavar="YAML", help="File with a list; each entry maps fields to values.")
]
SearchFolder = Annotated[
    str | None, typer.Option("--resume", metavar="FOLDER", help="Resume the search in this folder (path or URI).")
]


@command
def sweep(call: Call, source: Sources, over: Over = None, settings: Settings = None, set_: Sets = None) -> Output:
    """Run many seeds, presets or settings side by side. Runs that need the same experts train them once."""
    from rmdd.searches.sweeps import members_of_files, read_over, read_settings

    listed = read_settings(settings) if settings else []
    return run_sweep(call, members_of_files(source, load, set_ or [], read_over(over or []), listed))


def run_sweep(call: Call, members: "list[Member]") -> Output:
    """Start or resume a sweep; return the table of its runs and the path or URI of its folder."""
    from rmdd.runs.recipe import remarks_of
    from rmdd.searches.sweeps import run_all, sweep_folder

    if mistakes := [f"{m.label}: {mistake}" for m in members for mistake in call.mistakes(m.run)]:
        raise config.ConfigError(mistakes, "sweep")
    folder = sweep_folder(members)
    address = address_of(members[0].run.runtime, folder)
    with call.working(folder, address) as progress:
        for remark in dict.fromkeys(remark for m in members for remark in remarks_of(m.run)):
            progress.say(f"note: {remark}")
        result = run_all(members, progress)
    lines = [sweep_table(result.runs, result.groups), f"sweep: {address} (results.json, runs.csv)"]
    reasons = [(row["settings"], row["error"]) for row in result.failed]
    failed = failure(f"of {len(members)} runs failed", reasons, again=any(row["may_pass"] for row in result.failed))
    return Output({"sweep": address, "runs": result.runs, "groups": result.groups}, lines, failed)


@command
def search(
    call: Call,
    source: Annotated[str | None, SOURCE] = None,
    set_: Sets = None,
    resume: SearchFolder = None,
) -> Output:
    """Try values of the fields in `search.space`, compare scores on val, and write a run file with the best values."""
    return run_search(call, _base_run(source, set_ or [], resume))


def _base_run(source: str | None, sets: list[str], folder: str | None) -> config.Run:
    """Return the run whose fields the trials vary: from CONFIG or, with `--resume`, from the search folder."""
    from rmdd.searches import base_run_in, search_folder

    if folder is None:
        if source is None:
            raise config.ConfigError(["give CONFIG to start a search, or --resume FOLDER to continue one"], "search")
        return load(source, sets)
    if source is not None:
        raise config.ConfigError([f"the search in {folder} has a run file already; remove '{source}'"], "search")
    base = base_run_in(folder)
    if base is None:
        raise config.ConfigError(
            ["no search.json in this folder; give a folder such as runs/searches/demo-0123abcd"], folder
        )
    changed = config.load(base.plain(), sets)
    if search_folder(changed).name != search_folder(base).name:
        wrong = (
            "--set would make this another search; with --resume it may change only search.trials, search.concurrency, "
            "search.storage and runtime"
        )
        raise config.ConfigError([wrong], folder)
    return changed


def run_search(call: Call, base: config.Run) -> Output:
    """Start or resume a search; return a table of its best trials and the path or URI of its folder."""
    from rmdd import searches

    searches.check(base)
    call.check(base)
    folder = searches.search_folder(base)
    address = address_of(base.runtime, folder)
    with call.working(folder, address) as progress:
        result = searches.run_search(base, progress)
    table, best = result.table, result.table.winner
    lines = [
        search_table(table.rows, table.best),
        f"search: {address} (results.json, trials.csv, report.html)",
        f"best run file: {address}/best.yaml" if best else "no trial has finished yet",
    ]
    facts = {"search": address, "best": best, "front": table.best, "trials": table.rows}
    return Output(facts, lines, failure("trial(s) failed", result.failures.items()))


@command
def resume(call: Call, folder: Folder) -> Output:
    """Resume an interrupted run, sweep, search or comparison."""
    from rmdd import searches
    from rmdd.comparisons import resume as comparisons
    from rmdd.searches.sweeps import members_in

    if members := members_in(folder):
        return run_sweep(call, members)
    if base := searches.base_run_in(folder):
        return run_search(call, base)
    if comparison := comparisons.comparison_in(folder):
        return run_comparison(call, comparison)
    with call.pipeline(load_folder(folder)) as pipeline:
        return run_all_steps(pipeline)
