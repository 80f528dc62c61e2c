"""Load the run that a command line names: a preset, a run file or a run folder, with absolute paths."""

from pathlib import Path

import yaml

from rmdd import config
from rmdd.config.presets import find_preset
from rmdd.core.layout import locate_file
from rmdd.core.storage import is_uri, run_folder
from rmdd.runs.absolute import with_absolute_paths


def load(source: config.Source, sets: list[str]) -> config.Run:
    """Load a run and make its paths absolute, so that the run can be resumed from any working folder.

    `source` is a mapping, the name of a preset, the path of a run file, or the path or URI of a run folder; `sets` are
    overrides such as `a.b=c`. The run's hash contains the paths of local weights and text encoders, so a run with
    different paths is a new run.
    """
    if isinstance(source, str) and find_preset(source) is None and (is_uri(source) or Path(source).is_dir()):
        source = load_folder(source, "no run.yaml in it; give a preset, a run file or the folder of a run")
    return with_absolute_paths(config.load(source, sets))


def load_folder(address: str, without: str = "") -> config.Run:
    """Load the run of a run folder, given as a path or URI. `without` is the error message for other folders.

    Raises `ConfigError` if `address` is not a run folder, and `ValueError` if this version of rmdd cannot read the
    layout of the folder's storage.
    """
    storage, file = locate_file(address, "run.yaml", depth=1)
    if not file.is_file():
        absent = not is_uri(address) and not file.parent.is_dir()
        mistake = (
            "this folder does not exist" if absent else "no run.yaml, sweep.json, search.json or comparison.json in it"
        )
        advice = "give the folder of a run, sweep, search or comparison, such as runs/demo-0123abcd"
        raise config.ConfigError([without or f"{mistake}; {advice}"], address)
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    if isinstance(raw, dict):
        raw["runtime"] = {**(raw.get("runtime") or {}), "storage": storage}
    try:
        run = config.load(raw)
    except config.ConfigError as error:
        raise config.ConfigError(error.mistakes, str(file)) from None
    if run_folder(run).name != file.parent.name:
        changed = f"run.yaml describes the run {run_folder(run).name}: the file was changed or the folder was renamed"
        raise config.ConfigError([f"{changed}; start it with `rmdd run {file}`"], address)
    return run
