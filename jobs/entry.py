"""Entry point of all Ray jobs: run an `rmdd` command with the arguments of the job; if it fails, say how to resume."""

import argparse
import shlex
import sys
from pathlib import Path

from rmdd import config
from rmdd.cli import app as cli

SUBMIT = "ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python"
UNUSABLE = 2


def main(command: str, option: bool = False) -> None:
    """Run `rmdd COMMAND CONFIG --set ...` for a job started as `python jobs/X.py --config CONFIG --set ...`.

    If `option` is true, the command gets `--config CONFIG` instead of CONFIG. The exit code is that of the command.
    """
    description = f"Run rmdd {command} as a Ray job. All other arguments are passed to `rmdd {command}`."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="a preset's name or a YAML file in the working folder")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="set a field of the run file")
    arguments, further = parser.parse_known_args()
    try:
        if mistakes := relative_paths(config.load(arguments.config, arguments.set)):
            raise config.ConfigError(mistakes, arguments.config)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(UNUSABLE) from error
    try:
        source = ["--config", arguments.config] if option else [arguments.config]
        cli.main([command, *source, *(word for change in arguments.set for word in ("--set", change)), *further])
    except SystemExit as end:
        if end.code not in (None, 0, UNUSABLE):
            print(f"or submit it again: {SUBMIT} {shlex.join(sys.argv)}", file=sys.stderr)
        raise


def relative_paths(run: config.Run) -> list[str]:
    """Return a message for every relative path in a run; such paths lie in a folder that Ray deletes after the job."""
    image, text = run.model.image, run.model.text.name
    paths = {"runtime.storage": run.runtime.storage, "data.root": run.data.root}
    if image.weights != "pretrained" and not image.is_random:
        paths["model.image.weights"] = image.weights
    if Path(text).is_dir():
        paths["model.text.name"] = text
    return [
        f"{key}: '{path}' would be inside the job's temporary copy of the working folder; give an absolute path that "
        "exists on all nodes"
        for key, path in paths.items()
        if path is not None and "://" not in path and not Path(path).is_absolute()
    ]
