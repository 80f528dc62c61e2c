"""Sources of pairs by name: the files of `rmdd.data.sources`, and those that other packages bring.

A file there is called as its source and defines `SOURCE`; a package brings one by an entry point of the group
`rmdd.sources`. A source is imported when it is asked for, so that this package knows none of them.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

GROUP = "rmdd.sources"
PACKAGE = "rmdd.data.sources"
OF_PROBES = ("classes", "cocoqa")
"""Sources with settings that the data of a probe has, and that of a run has not."""


def built_in() -> dict[str, str]:
    """The sources of this package, and the module and attribute that each is."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    return {m.name: f"{PACKAGE}.{m.name}:SOURCE" for m in pkgutil.iter_modules(spec.submodule_search_locations)}


def names() -> dict[str, str]:
    """Every source, and the module and attribute that it is."""
    return {p.name: p.value for p in entry_points(group=GROUP)} | built_in()


def mistake(name: str) -> str | None:
    """What is wrong when there is no source `name`."""
    if name in built_in() or name in (known := names()):
        return None
    listed = ", ".join(["dataset", *sorted(known.keys() - set(OF_PROBES))])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; a package brings one by an entry point of the group {GROUP}"
    return f"no source '{name}'; there are: {listed}{hint}"


def find(name: str) -> Any:
    """The source called `name`. Raises `ValueError` when it is not there or cannot be imported."""
    if wrong := mistake(name):
        raise ValueError(f"data.source: {wrong}")
    module, _, attribute = names()[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import source '{name}' ({module}:{attribute}): {error}") from error
