"""Read the trials of earlier searches (`search.warm_start`) whose values lie inside the space of a new search."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rmdd import config
from rmdd.core.files import read_json
from rmdd.core.layout import locate_file
from rmdd.searches.space import Space

COMPARED_SECTIONS = ("data", "evaluate")
"""Sections of the run file that must be equal in the earlier and the new search, to keep scores comparable."""


@dataclass(frozen=True)
class EarlierTrial:
    """A trial of an earlier search: its values for the fields of the new space, its val R@mean and its cost."""

    source: str
    values: dict[str, Any]
    value: float
    cost: dict[str, float]


def earlier_trials(search: config.Search, hashes: Mapping[str, str], name: str) -> list[EarlierTrial]:
    """Return the finished trials of the searches in `search.warm_start` whose values lie inside `search.space`.

    `hashes` maps each of `COMPARED_SECTIONS` to the section's hash in the new search. Other sections may differ, as
    earlier trials only guide the sampler. Raises `ConfigError` for the run `name` if a folder holds no search or has a
    different layout. Also raises this error if an earlier search used different data or a different evaluation.
    """
    trials: list[EarlierTrial] = []
    mistakes = []
    for source in search.warm_start:
        try:
            _, file = locate_file(source, "results.json", depth=2)
        except ValueError as error:
            mistakes.append(f"search.warm_start: cannot use {source}, remove it: {error}")
            continue
        if not file.is_file():
            mistakes.append(f"search.warm_start: no results.json in {source}; give the folder of a finished search")
            continue
        folder = file.parent
        earlier = config.load(read_json(folder / "search.json")["run"])
        if other := [section for section in hashes if earlier.hash_of(section) != hashes[section]]:
            mistakes.append(
                f"search.warm_start: {source} has a different `{other[0]}` section, so its scores cannot be compared; "
                "remove this entry"
            )
            continue
        trials += _finished(source, folder, Space(search))
    if mistakes:
        raise config.ConfigError(mistakes, name)
    return trials


def _finished(source: str, folder: Path, space: Space) -> list[EarlierTrial]:
    trials = []
    for row in read_json(folder / "results.json")["trials"]:
        run_file = folder / "trials" / f"{row['number']:03d}" / "run.yaml"
        if row["state"] == "complete" and run_file.is_file():
            values = space.active(yaml.safe_load(run_file.read_text(encoding="utf-8")))
            if values is not None:
                trials.append(EarlierTrial(f"{source}#{row['number']}", values, row["val"], row["cost"]))
    return trials
