"""Other questions to the students of a finished set or run: `rmdd probe`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, Sets, command
from rmdd.cli.console import probe_table, results
from rmdd.cli.loading import load, load_folder


@command
def probe(
    call: Call,
    address: Annotated[str, typer.Argument(metavar="SET_OR_RUN", help="A distilled set, or the folder of a run.")],
    probes: Annotated[Path, typer.Option("--probes", metavar="YAML", help="A mapping, as evaluate.probes.")],
    set_: Sets = None,
) -> Output:
    """Ask the students of a finished set or run other questions; what is trained already is not trained again."""
    path = Path(address).expanduser()
    if not (path / "set.json").is_file():
        with call.pipeline(_run_with(address, probes, set_ or [])) as pipeline:
            evaluation, file = pipeline.evaluate(), str(pipeline.folder / "evaluation.json")
        table = {row: scores["probes"] for row, scores in evaluation["table"].items()}
        return Output({"evaluation": file, "table": table}, [results(evaluation), f"evaluation: {file}"])
    from rmdd.comparisons.probe_set import probe_set, run_of

    run = run_of(path, _read(probes), set_ or [])
    with call.working() as progress:
        answers = probe_set(path, run, progress)
    lines = [probe_table(answers, name) for name in answers["probes"]]
    return Output(answers, [*lines, f"probes: {answers['folder']}/probes.json"])


def _run_with(address: str, file: Path, overrides: list[str]) -> config.Run:
    begun = load_folder(address)
    raw = begun.model_dump(mode="json")
    raw["evaluate"]["probes"] = _read(file)
    run = load(raw, overrides)
    if run.hash_of() != begun.hash_of():
        wrong = "--set changes what the run is; only evaluate.probes, storage and runtime may change"
        raise config.ConfigError([wrong], address)
    return run


def _read(file: Path) -> dict[str, Any]:
    probes = config.read(file)
    if not probes:
        raise config.ConfigError(["write a mapping from names to probes, as in evaluate.probes"], str(file))
    return probes
