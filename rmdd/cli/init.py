"""The command `rmdd init`: looks at this machine and at the data, and writes a run file that fits both."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rmdd import config
from rmdd.cli.command import Output, command
from rmdd.config.presets import find_preset, no_preset
from rmdd.config.template import template
from rmdd.core.files import atomic_path


@command(options=("debug",))
def init(
    file: Annotated[Path, typer.Argument(help="Path of the run file (YAML) to write.")] = Path("run.yaml"),
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Folder or table of images and captions to look at.")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", metavar="NAME", help="Preset to extend.")] = None,
    target: Annotated[
        Literal["cpu", "gpu"] | None, typer.Option("--for", help="Device; default: a GPU if this machine has one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> Output:
    """Look at this machine and at your data, and write a short run file that runs within minutes."""
    if file.exists() and not force:
        advice = "give another file name, or --force to overwrite it"
        raise config.ConfigError([f"this file exists already and was not changed; {advice}"], str(file))
    if preset is not None and target is not None:
        raise config.ConfigError(["give --preset or --for, not both: a preset says which device it needs"], "init")
    if preset is not None and find_preset(preset) is None:
        raise config.ConfigError([no_preset(preset)], "init")
    from rmdd.runs.first_run import Machine, first_run, run_name

    run = first_run(run_name(data, file), data, preset, target, Machine.here())
    head = [f"A run file for rmdd. Check it with `rmdd check {file}`, and run it with `rmdd run {file}`.", *run.lines]
    with atomic_path(file) as temporary:
        temporary.write_text(template(run.values, run.reasons, head), encoding="utf-8")
    return Output(lines=[*run.lines, f"wrote {file}; next: rmdd check {file}, then rmdd run {file}"])
