"""What all jobs share: the words of a job become those of the command line, and its end says how to go on."""

import argparse
import shlex
import sys
from pathlib import Path

from rmdd import config
from rmdd.cli import app as cli

SUBMIT = "ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python"
UNUSABLE = 2


def main(command: str, option: bool = False) -> None:
    """Do `rmdd COMMAND CONFIG --set ...` for the job that was started as `python jobs/X.py --config CONFIG --set ...`.

    `option`: the command takes `--config CONFIG` itself.

    Ends with the exit code of the command line.
    """
    parser = argparse.ArgumentParser(description=f"rmdd {command} as a Ray job; further words go to `rmdd {command}`")
    parser.add_argument("--config", required=True, help="a preset's name or a YAML file in the working folder")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a field")
    known, further = parser.parse_known_args()
    try:
        if lost := lost_with_the_job(config.load(known.config, known.set)):
            raise config.ConfigError(lost, known.config)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(UNUSABLE) from error
    try:
        given = ["--config", known.config] if option else [known.config]
        cli.main([command, *given, *(word for change in known.set for word in ("--set", change)), *further])
    except SystemExit as end:
        if end.code not in (None, 0, UNUSABLE):
            print(f"or submit it again: {SUBMIT} {shlex.join(sys.argv)}", file=sys.stderr)
        raise


def lost_with_the_job(run: config.Run) -> list[str]:
    """Mistakes: places that would lie in the job's own copy of the working folder, which goes when the job does."""
    image, text = run.model.image, run.model.text.name
    places = {"runtime.storage": run.runtime.storage, "data.root": run.data.root}
    if image.weights != "pretrained" and not image.is_random:
        places["model.image.weights"] = image.weights
    if Path(text).is_dir():
        places["model.text.name"] = text
    return [
        f"{key}: '{place}' would lie in the job's copy of the working folder; give a path that all nodes see"
        for key, place in places.items()
        if place is not None and "://" not in place and not Path(place).is_absolute()
    ]
