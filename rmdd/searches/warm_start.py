"""What earlier searches found, as far as a new one can use it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rmdd import config
from rmdd.core.files import read_json
from rmdd.core.storage import located
from rmdd.searches.space import Space


@dataclass(frozen=True)
class Known:
    """A trial of an earlier search: the values that it had of the new space's fields, and what came of it."""

    source: str
    values: dict[str, Any]
    value: float
    cost: dict[str, float]


def known_from(places: Iterable[str], base: config.Run) -> list[Known]:
    """Finished trials of the searches in `places` that lie within the space of `base`.

    Their other fields may differ from those of `base`: they show a sampler where to look, and are no results of the
    new search. Raises `ConfigError` for a folder that holds no search, or one over other data or another evaluation.
    """
    found: list[Known] = []
    mistakes = []
    for place in places:
        _, file = located(place, "results.json", depth=2)
        if not file.is_file():
            mistakes.append(f"search.warm_start: no results.json in {place}; give the folder of a search that ran")
            continue
        found_here, wrong = _known(place, file.parent, base)
        found += found_here
        mistakes += wrong
    if mistakes:
        raise config.ConfigError(mistakes, base.name)
    return found


def _known(place: str, folder: Path, base: config.Run) -> tuple[list[Known], list[str]]:
    space, found = Space(base.search), []
    earlier = config.load(read_json(folder / "search.json")["run"])
    for section in ("data", "evaluate"):
        if earlier.hash_of(section) != base.hash_of(section):
            told = f"search.warm_start: {place} has another `{section}` section, so its scores do not compare"
            return [], [told]
    for row in read_json(folder / "results.json")["trials"]:
        run_file = folder / "trials" / f"{row['number']:03d}" / "run.yaml"
        if row["state"] == "complete" and run_file.is_file():
            values = space.active(yaml.safe_load(run_file.read_text(encoding="utf-8")))
            if values is not None:
                found.append(Known(f"{place}#{row['number']}", values, row["val"], row["cost"]))
    return found, []
