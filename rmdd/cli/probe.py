"""The word `rmdd probe`."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rmdd import config
from rmdd.cli.common import Debug, Json, Quiet, Sets, do, load_folder, outcome, print_json, stop_on_sigterm
from rmdd.runs.absolute import with_absolute_paths


def probe(
    place: Annotated[str, typer.Argument(metavar="SET_OR_RUN", help="A distilled set, or the folder of a run.")],
    probes: Annotated[Path, typer.Option("--probes", metavar="YAML", help="A mapping, as evaluate.probes.")],
    set_: Sets = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Ask the students of a finished set or run other questions; what is trained already is not trained again."""
    if not (Path(place).expanduser() / "set.json").is_file():
        do(lambda: _run_with(place, probes, set_ or []), _evaluated, json, quiet, debug)
        return
    with outcome(debug):
        from rmdd.comparisons.probe_set import probe_set, run_of
        from rmdd.core.progress import Progress

        path = Path(place).expanduser()
        run = run_of(path, _read(probes), set_ or [])
        stop_on_sigterm()
        with contextlib.redirect_stdout(sys.stderr):
            found = probe_set(path, run, Progress(quiet))
        if json:
            print_json(found)
            return
        from rmdd.cli.console import probe_table, stdout

        for name in found["probes"]:
            stdout().print(probe_table(found, name), highlight=False)
        typer.echo(f"probes: {found['folder']}/probes.json")


def _run_with(place: str, file: Path, overrides: list[str]) -> config.Run:
    raw = load_folder(place).model_dump(mode="json")
    raw["evaluate"]["probes"] = _read(file)
    run, begun = with_absolute_paths(config.load(raw, overrides)), load_folder(place)
    if run.hash_of() != begun.hash_of():
        told = "--set changes what the run is; only evaluate.probes, storage and runtime may change"
        raise config.ConfigError([told], place)
    return run


def _read(file: Path) -> dict[str, Any]:
    found = config.read(file)
    if not found:
        raise config.ConfigError(["write a mapping from names to probes, as in evaluate.probes"], str(file))
    return found


def _evaluated(pipeline: Any) -> dict[str, Any]:
    from rmdd.cli.console import results

    evaluation, path = pipeline.evaluate(), str(pipeline.folder / "evaluation.json")
    table = {row: scores["probes"] for row, scores in evaluation["table"].items()}
    return {"evaluation": path, "table": table, "say": [results(evaluation), f"evaluation: {path}"]}
