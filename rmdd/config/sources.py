"""Find a source of pairs by its name, among the modules of `rmdd.data.sources` and the sources of other packages.

A module of `rmdd.data.sources` has the name of its source and defines `SOURCE`. A package adds a source by an entry
point of the group `rmdd.sources`. A source is imported only when it is used, not by importing `rmdd.config`.
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
"""Names of the sources that only the `data` section of a probe can use."""


def built_in() -> dict[str, str]:
    """Return the import paths (module:attribute) of the built-in sources, by their names."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    return {m.name: f"{PACKAGE}.{m.name}:SOURCE" for m in pkgutil.iter_modules(spec.submodule_search_locations)}


def names() -> dict[str, str]:
    """Return the import paths (module:attribute) of all sources, by their names."""
    return {p.name: p.value for p in entry_points(group=GROUP)} | built_in()


def mistake(name: str) -> str | None:
    """Return an error message if there is no source of pairs called `name`, otherwise None."""
    if name in built_in() or name in (available := names()):
        return None
    listed = ", ".join(["dataset", *sorted(available.keys() - set(OF_PROBES))])
    near = difflib.get_close_matches(name, available, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; a package adds one by an entry point of the group {GROUP}"
    return f"unknown source '{name}'; available: {listed}{hint}"


def find(name: str) -> Any:
    """Return the source of pairs called `name`. Raises `ValueError` if it does not exist or cannot be imported."""
    if message := mistake(name):
        raise ValueError(f"data.source: {message}")
    module, _, attribute = names()[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import source '{name}' ({module}:{attribute}): {error}") from error
