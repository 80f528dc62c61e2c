"""The run that the words of a command mean, with absolute paths."""

from collections.abc import Mapping
from typing import Any

import yaml

from rmdd import config
from rmdd.core.layout import locate_file
from rmdd.core.storage import is_uri, run_folder
from rmdd.runs.absolute import with_absolute_paths


def load(source: str | Mapping[str, Any], sets: list[str]) -> config.Run:
    """The run with absolute paths, so that it can be resumed from anywhere.

    The paths of weights and of a text encoder are in the hash of a run, which names its folder: the same files at
    another place make another run.
    """
    return with_absolute_paths(config.load(source, sets))


def load_folder(address: str) -> config.Run:
    """The run that was begun in a folder, or at a URI.

    Raises `ConfigError` for what is no folder of a run, `ValueError` where the storage has another layout.
    """
    storage, file = locate_file(address, "run.yaml", depth=1)
    if not file.is_file():
        absent = not is_uri(address) and not file.parent.is_dir()
        mistake = "there is no such folder" if absent else "no run.yaml, sweep.json or search.json in it"
        advice = "give the folder of a run, a sweep or a search, such as runs/demo-0123abcd"
        raise config.ConfigError([f"{mistake}; {advice}"], address)
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    if isinstance(raw, dict):
        raw["runtime"] = {**(raw.get("runtime") or {}), "storage": storage}
    try:
        run = config.load(raw)
    except config.ConfigError as error:
        raise config.ConfigError(error.mistakes, str(file)) from None
    if run_folder(run).name != file.parent.name:
        now = f"its run.yaml now means {run_folder(run).name}: it was changed, or the folder renamed"
        raise config.ConfigError([f"{now}; use `rmdd run {file}`"], address)
    return run
