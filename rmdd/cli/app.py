"""The command line: words to functions. Heavy modules are imported by the command that needs them."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmdd import config
from rmdd.cli import compare as comparisons
from rmdd.cli.analyse import analyse
from rmdd.cli.bench import bench
from rmdd.cli.common import (
    Debug,
    Json,
    Quiet,
    Sets,
    Source,
    do,
    load,
    load_folder,
    outcome,
    print_json,
    stop_on_sigterm,
)
from rmdd.cli.coresets import coreset
from rmdd.cli.probe import probe

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil image-text data into a few hundred synthetic pairs. Start with `rmdd demo`.",
    epilog="Exit codes: 0 done, 1 a run failed, 2 a run file cannot be used, 130 stopped (a resumable run says how).",
)
app.add_typer(bench, name="bench")
app.add_typer(analyse, name="analyse")
app.command("coreset")(coreset)
app.command("probe")(probe)
comparisons.register(app)


@app.command()
def demo(
    set_: Sets = None,
    storage: Annotated[str | None, typer.Option(help="Folder of all runs; default: runs.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Distil drawn scenes on this machine, in minutes, and print how well it went."""
    sets = [*(set_ or []), *([f"runtime.storage={storage}"] if storage else [])]
    do(lambda: load("demo", sets), _everything, json, quiet, debug)


@app.command()
def init(file: Annotated[Path, typer.Argument(help="The YAML file to write.")]) -> None:
    """Write a run file with every key, its default and its meaning."""
    with outcome():
        from rmdd.config.template import template
        from rmdd.core.files import atomic_path

        if file.exists():
            raise config.ConfigError(["exists already and is left as it is; give another name"], str(file))
        with atomic_path(file) as temporary:
            temporary.write_text(template(str(file)), encoding="utf-8")
    typer.echo(f"wrote {file}")


@app.command()
def check(source: Source, set_: Sets = None, json: Json = False, debug: Debug = False) -> None:
    """Say what a run would do and cost; touch nothing."""
    with outcome(debug):
        run = load(source, set_ or [])
        from rmdd.evaluate.probes.of_run import faults
        from rmdd.runs.preflight import examine

        if mistakes := faults(run):
            raise config.ConfigError(mistakes, source)
        try:
            facts = examine(run)
        except config.ConfigError:
            raise
        except ValueError as error:
            raise config.ConfigError([str(error)], source) from error
        if json:
            print_json(facts)
        else:
            from rmdd.cli import console

            console.stdout().print(console.plan(facts), highlight=False)
        if facts["budget"]["over"] and run.distill.budget_check == "error":
            raise config.ConfigError([facts["budget"]["over"]], source)


@app.command()
def ingest(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Bring the pairs in: shards, a manifest and a quarantine."""
    do(lambda: load(source, set_ or []), _ingest, json, quiet, debug, check=False)


@app.command()
def experts(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Train the experts that are missing."""
    do(lambda: load(source, set_ or []), _experts, json, quiet, debug)


@app.command()
def distill(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Distil the phases that are not finished."""
    do(lambda: load(source, set_ or []), _distill, json, quiet, debug)


@app.command()
def evaluate(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Train students, choose on val, read test once."""
    do(lambda: load(source, set_ or []), _evaluate, json, quiet, debug)


@app.command()
def report(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write the distilled set and its page."""
    do(lambda: load(source, set_ or []), _report, json, quiet, debug)


@app.command()
def health(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Distil what is not there, and say how far the embeddings of the set have collapsed, beside real pairs."""
    do(lambda: load(source, set_ or []), _health, json, quiet, debug)


@app.command("run")
def run_(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """All steps, in order; what is there already is used."""
    do(lambda: load(source, set_ or []), _everything, json, quiet, debug)


@app.command()
def sweep(
    source: Source,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="A.B=C,D", help="A field and its values; can be repeated."),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", metavar="YAML", help="A list of mappings from fields to values.")
    ] = None,
    set_: Sets = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Many runs as one, side by side: seeds, methods or settings; what they share is made once."""

    def members() -> list[Any]:
        from rmdd.searches.sweeps import members, read_over, read_settings

        listed = read_settings(settings) if settings else []
        return members(lambda chosen: load(source, [*(set_ or []), *chosen]), read_over(over or []), listed)

    _sweep(members, json, quiet, debug)


@app.command()
def search(
    source: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A preset's name or a YAML file.")] = None,
    set_: Sets = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="FOLDER", help="Go on with the search in this folder, or URI."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Try values of the fields in `search.space`, compare them on val, and write the best run file."""
    _search(lambda: _search_of(source, set_ or [], resume), json, quiet, debug)


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="That, or URI, of a run, sweep, search, ...")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Go on with a run, a sweep, a search or a comparison where it stopped."""
    runs: list[Any] = []
    base: config.Run | None = None
    compared: Any = None
    with outcome(debug):
        from rmdd.comparisons import begun_in as comparison_in
        from rmdd.searches import begun_in
        from rmdd.searches.sweeps import members_in

        runs, base, compared = members_in(folder), begun_in(folder), comparison_in(folder)
    if compared is not None:
        comparisons.go(lambda: compared, json, quiet, debug)
    elif base is not None:
        _search(lambda: base, json, quiet, debug)
    elif runs:
        _sweep(lambda: runs, json, quiet, debug)
    else:
        do(lambda: load_folder(folder), _everything, json, quiet, debug)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder that rmdd wrote, or its URI.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check manifests, hashes, numbers of a dataset, store, phase, set, run, sweep, search, storage; touch nothing."""
    with outcome(debug):
        from rmdd.cli.verify import verify as verify_

        found = verify_(path)
        if json:
            print_json(found.as_json())
        else:
            for fault in found.faults:
                typer.echo(f"BROKEN {fault.path}: {fault.wrong}; {fault.todo}")
            for place in found.unfinished:
                typer.echo(f"not finished: {place}")
            typer.echo(f"{len(found.checked)} checked, {len(found.faults)} broken")
    if found.faults:
        raise typer.Exit(1)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset's file.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Print it with the values of what it extends.")] = False,
) -> None:
    """List the run files that come with rmdd, or print one."""
    with outcome():
        names = config.preset_names()
        if name is not None and name not in names:
            raise config.ConfigError([config.no_preset(name)], "presets")
        if name is not None and whole:
            typer.echo(config.as_yaml(config.read(name)).rstrip())
            return
        for each in names if name is None else [name]:
            text = (config.PRESETS / f"{each}.yaml").read_text(encoding="utf-8")
            first = text.partition("\n")[0].removeprefix("#").strip()
            typer.echo(f"{each:30} {first}" if name is None else text.rstrip())


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one.")] = None, json: Json = False
) -> None:
    """List the methods that a run file can name, or tell about one."""
    with outcome():
        from rmdd.methods.about import about, listing

        try:
            facts: Any = listing() if name is None else about(name)
        except ValueError as error:
            raise config.ConfigError([str(error)], "methods") from error
        if json:
            print_json(facts)
            return
        from rmdd.cli import console

        if name is None:
            console.stdout().print(console.methods(facts))
            return
        for line in console.method(facts):
            typer.echo(line)


@app.command()
def version() -> None:
    """Print the version."""
    from rmdd.core.version import VERSION

    typer.echo(VERSION)


def main(words: list[str] | None = None) -> None:
    """Entry point of the `rmdd` script, and of jobs with the `words` of a command line. Ends by `SystemExit`."""
    stop_on_sigterm()
    app(words, prog_name="rmdd")


# -- steps: each returns what it left, with `say` for people ---------------------------------------------------------


def _ingest(pipeline: "Pipeline") -> dict[str, Any]:
    dataset = pipeline.ingest()
    rejected = dataset.manifest["quarantine"]
    told = ", ".join(f"{n} {reason}" for reason, n in rejected.items())
    lines = [f"dataset: {dataset.path}", *([f"quarantine: {told}"] if told else [])]
    return {"dataset": str(dataset.path), "counts": dataset.counts, "quarantine": rejected, "say": lines}


def _experts(pipeline: "Pipeline") -> dict[str, Any]:
    store = pipeline.experts()
    left = {"store": str(store.path), "complete": store.complete(), "bytes": store.size()}
    return left | {"say": [f"experts: {store.path}"]}


def _distill(pipeline: "Pipeline") -> dict[str, Any]:
    folders = [str(folder) for folder in pipeline.distill()]
    return {"phases": folders, "say": [f"phase {p}: {folder}" for p, folder in enumerate(folders)]}


def _evaluate(pipeline: "Pipeline") -> dict[str, Any]:
    evaluation, path = pipeline.evaluate(), str(pipeline.folder / "evaluation.json")
    return {"evaluation": path, "table": evaluation["table"], "say": [_table(evaluation), f"evaluation: {path}"]}


def _health(pipeline: "Pipeline") -> dict[str, Any]:
    from rmdd.report.health import write_health

    found = pipeline.health()
    files = [str(file) for file in write_health(found, pipeline.folder)]
    from rmdd.cli.console import health_table

    return {**found, "files": files, "say": [health_table(found["rows"]), *(f"wrote {file}" for file in files)]}


def _report(pipeline: "Pipeline") -> dict[str, Any]:
    page, set_ = str(pipeline.report()), str(pipeline.folder / "set")
    return {"set": set_, "page": page, "say": [f"distilled set: {set_}", f"page: {page}"]}


def _everything(pipeline: "Pipeline") -> dict[str, Any]:
    began = time.perf_counter()
    result = pipeline.all()
    seconds = {"this_sitting": round(time.perf_counter() - began, 2), "steps": result.seconds}
    steps = ", ".join(f"{step} {value:.0f}" for step, value in result.seconds.items())
    return {
        "set": str(result.set),
        "page": str(result.report),
        "table": result.evaluation["table"],
        "seconds": seconds,
        "say": [
            _table(result.evaluation),
            f"distilled set: {result.set}",
            f"page: {result.report}",
            f"run folder: {pipeline.folder}",
            f"seconds: {seconds['this_sitting']:.0f} now; over all sittings {steps}",
        ],
    }


def _sweep(members: Callable[[], list[Any]], as_json: bool, quiet: bool, debug: bool) -> None:
    folders: dict[Path, str] = {}
    with outcome(debug, folders):
        runs = members()
        from rmdd.core.progress import Progress
        from rmdd.core.storage import address_of
        from rmdd.runs.preflight import impossible
        from rmdd.searches.sweeps import run_all, sweep_folder

        if mistakes := [f"{m.label}: {mistake}" for m in runs for mistake in impossible(m.run)]:
            raise config.ConfigError(mistakes, "sweep")
        folder = sweep_folder(runs)
        folders[folder] = address_of(runs[0].run.runtime, folder)
        stop_on_sigterm()
        with contextlib.redirect_stdout(sys.stderr):
            swept = run_all(runs, Progress(quiet))
        if as_json:
            print_json({"sweep": folders[folder], "runs": swept.runs, "groups": swept.groups})
        else:
            from rmdd.cli.console import stdout, sweep_table

            stdout().print(sweep_table(swept.runs, swept.groups), highlight=False)
            typer.echo(f"sweep: {folders[folder]} (results.json, runs.csv)")
        if swept.failed:
            reasons = "".join(f"\n{row['settings']}: {row['error']}" for row in swept.failed)
            raise RuntimeError(f"{len(swept.failed)} of {len(runs)} runs failed{reasons}")


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
        told = "--set changes what the search is; only search.trials, concurrency, storage and runtime may change"
        raise config.ConfigError([told], folder)
    return changed


def _search(begin: Callable[[], config.Run], as_json: bool, quiet: bool, debug: bool) -> None:
    folders: dict[Path, str] = {}
    with outcome(debug, folders):
        base = begin()
        from rmdd.core.progress import Progress
        from rmdd.core.storage import address_of
        from rmdd.runs.preflight import impossible
        from rmdd.searches import check as check_
        from rmdd.searches import run_search, search_folder

        check_(base)
        if mistakes := impossible(base):
            raise config.ConfigError(mistakes, base.name)
        folder = search_folder(base)
        folders[folder] = address = address_of(base.runtime, folder)
        stop_on_sigterm()
        with contextlib.redirect_stdout(sys.stderr):
            found = run_search(base, Progress(quiet))
        table, best = found.table, found.table.winner
        if as_json:
            print_json({"search": address, "best": best, "front": table.best, "trials": table.rows})
        else:
            from rmdd.cli.console import search_table, stdout

            stdout().print(search_table(table.rows, table.best), highlight=False)
            typer.echo(f"search: {address} (results.json, trials.csv, report.html)")
            typer.echo(f"best run file: {address}/best.yaml" if best else "no trial has finished")
        if found.failures:
            reasons = "".join(f"\n{name}: {why}" for name, why in found.failures.items())
            raise RuntimeError(f"{len(found.failures)} trial(s) could not be finished{reasons}")


def _table(evaluation: dict[str, Any]) -> Any:
    from rmdd.cli.console import results

    return results(evaluation)
