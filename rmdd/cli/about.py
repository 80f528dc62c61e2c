"""Commands that change no run: `rmdd check`, `schema`, `verify`, `methods`, `version`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rmdd import config
from rmdd.cli import console
from rmdd.cli.command import Output, Sets, Source, command
from rmdd.cli.loading import load
from rmdd.core.files import atomic_path
from rmdd.core.version import VERSION


@command(options=("json", "debug"))
def check(source: Source, set_: Sets = None) -> Output:
    """Print what a run would do, and the estimated cost of each step, without starting the run."""
    run = load(source, set_ or [])
    from rmdd.evaluate.probes.of_run import faults
    from rmdd.runs.preflight import examine, storage_faults
    from rmdd.searches import facts_of

    if mistakes := storage_faults(run) + faults(run.data, run.evaluate.probes):
        raise config.ConfigError(mistakes, source)
    try:
        facts = examine(run, facts_of(run))
    except config.ConfigError:
        raise
    except ValueError as error:
        raise config.ConfigError([str(error)], source) from error
    over = facts["budget"]["over"] if run.distill.budget_check == "error" else ""
    return Output(facts, [console.plan(facts)], config.ConfigError([over], source) if over else None)


@command(options=())
def schema(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write; default: print the schema.")] = None,
) -> Output:
    """Print the JSON Schema of run files, by which editors complete and explain fields and mark mistakes.

    For VS Code with the YAML extension, run `rmdd schema --out rmdd.schema.json`, and begin a run file with the line
    `# yaml-language-server: $schema=rmdd.schema.json`.
    """
    from rmdd.config.schema import run_file_schema

    text = json.dumps(run_file_schema(), indent=2)
    if out is None:
        return Output(lines=[text])
    with atomic_path(out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Output(lines=[f"wrote {out}; begin a run file with `# yaml-language-server: $schema={out}`"])


@command(options=("json", "debug"))
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Path or URI of any folder that rmdd wrote.")],
) -> Output:
    """Check the files of a dataset, expert store, distilled set, run, search or whole storage; change no file."""
    from rmdd.searches.formats import verify as verify_

    result = verify_(path)
    lines = [f"BROKEN {fault.path}: {fault.wrong}; {fault.todo}" for fault in result.faults]
    lines += [f"not finished yet: {folder}" for folder in result.unfinished]
    lines += [f"folders: {len(result.checked)} checked, {len(result.faults)} broken"]
    return Output(result.as_json(), lines, typer.Exit(1) if result.faults else None)


@command(options=("json",))
def methods(name: Annotated[str | None, typer.Argument(help="Describe this method.")] = None) -> Output:
    """List the distillation methods, or describe one method in detail."""
    from rmdd.methods.about import about, listing

    try:
        facts: Any = listing() if name is None else about(name)
    except ValueError as error:
        raise config.ConfigError([str(error)], "methods") from error
    return Output(facts, [console.methods(facts)] if name is None else console.method(facts))


@command(options=())
def version() -> Output:
    """Print the version of rmdd."""
    return Output(lines=[VERSION])
