"""The command `rmdd probe`: score students on more tasks (probes), such as zero-shot classification."""

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
    address: Annotated[str, typer.Argument(metavar="SET_OR_RUN", help="Folder of a distilled set or of a run.")],
    probes: Annotated[Path, typer.Option("--probes", metavar="YAML", help="File of probes, as in evaluate.probes.")],
    set_: Sets = None,
) -> Output:
    """Score the students of a distilled set or run on more probes, without training finished students again."""
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
    original = load_folder(address)
    raw = original.model_dump(mode="json")
    raw["evaluate"]["probes"] = _read(file)
    run = load(raw, overrides)
    if run.hash_of() != original.hash_of():
        wrong = "--set would make this another run; it may change only evaluate.probes, storage and runtime"
        raise config.ConfigError([wrong], address)
    return run


def _read(file: Path) -> dict[str, Any]:
    probes = config.read(file)
    if not probes:
        raise config.ConfigError(["this file has no probes; map names to probes, as in evaluate.probes"], str(file))
    return probes
