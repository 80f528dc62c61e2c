"""Find a distillation method by its name, among the built-in methods and those of other packages.

A package adds a method by an entry point of the group `rmdd.methods`. A run file can also give an import path,
`module:Class`. The class of a method (its recipe) is imported only when it is used, not by importing `rmdd.config`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, runtime_checkable

from rmdd.config.runfile import Clash

Family = Literal["trajectory", "distribution", "generative"]

BUILT_IN = {
    "mtt_vl": "rmdd.methods.mtt_vl:MTTVL",
    "tesla_vl": "rmdd.methods.tesla_vl:TeslaVL",
    "lors": "rmdd.methods.lors:LoRS",
    "repblend": "rmdd.methods.repblend:RepBlend",
    "ptm_st": "rmdd.methods.ptm_st:PTMST",
    "datm": "rmdd.methods.datm:DATM",
    "mct": "rmdd.methods.mct:MCT",
    "amd": "rmdd.methods.amd:AMD",
    "ncfm": "rmdd.methods.ncfm:NCFM",
    "covmatch": "rmdd.methods.covmatch:CovMatch",
    "mdm": "rmdd.methods.mdm:MDM",
    "pds": "rmdd.methods.pds:PDS",
    "edge": "rmdd.methods.edge:EDGE",
    "evlf": "rmdd.methods.evlf:EVLF",
}
TITLES = {
    "mtt_vl": "MTT-VL",
    "tesla_vl": "TESLA-VL",
    "lors": "LoRS",
    "repblend": "RepBlend",
    "ptm_st": "PTM-ST",
    "datm": "DATM",
    "mct": "MCT",
    "amd": "AMD",
    "ncfm": "NCFM",
    "covmatch": "CovMatch",
    "mdm": "MDM",
    "pds": "PDS",
    "edge": "EDGE",
    "evlf": "EVLF",
}
"""Names of the built-in methods as tables and reports show them."""
GROUP = "rmdd.methods"


@runtime_checkable
class Recipe(Protocol):
    """The attributes of a distillation method's class that the run file needs; `rmdd.methods.Method` has them."""

    family: Family
    """Kind of distillation loop that the method uses: trajectory, distribution or generative."""
    defaults: Mapping[str, Any]
    """Default values of run file fields for this method, as sections of a run file."""
    reference: str | None
    """Name of the evaluation protocol of the method's paper, or None."""
    version: int
    """Version of the method's code, part of the hash of every phase."""
    learns_rates: bool
    """Whether the inner learning rates of students are learned with the set."""
    Options: Any
    """The section class that declares the fields of `distill.options` for this method."""
    plain_options: Mapping[str, Any]
    """Option values that turn off a method's special start epochs: students then start at whole epochs of the phase's
    range, on the path of `distill.trajectory`."""

    def mistakes(self, run: Any) -> list[str]:
        """Return error messages about fields of `run` that do not fit this method."""
        ...

    def clashes_of_family(self, rule: Any, experts: Any, runtime: Any) -> list[Clash]:
        """Return error messages about combinations of fields that fail with all methods of this family; `rule` is the
        section `distill`."""
        ...

    def idle_fields(self) -> tuple[str, ...]:
        """Return the names of the fields of `distill` that the method does not read."""
        ...

    def real_starts(self, rule: Any) -> bool:
        """Return whether students may start between two epochs, such as at epoch 1.5."""
        ...

    def endpoint_of(self, rule: Any, epochs: int, phase: int) -> int:
        """Return the last expert epoch that phase number `phase` (from 0) reads; experts have `epochs` epochs."""
        ...


def names() -> dict[str, str]:
    """Return the import paths of all built-in and installed methods, by their names."""
    return BUILT_IN | {p.name: p.value for p in entry_points(group=GROUP) if p.name not in BUILT_IN}


def find(name: str) -> Recipe:
    """Return the recipe of the method `name`. Raises `ValueError` if there is none, or if it is not a `Recipe`."""
    path = BUILT_IN.get(name, name)
    if ":" not in path:
        path = names().get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        available = names()
        near = difflib.get_close_matches(name, available, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; or give one of your own as module:Class"
        raise ValueError(f"unknown method '{name}'; available: {', '.join(sorted(available))}{hint}")
    try:
        recipe: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot import method '{path}': {error}; install its package, or add its folder to PYTHONPATH, on every "
            "node"
        ) from error
    if not (isinstance(recipe, type) and isinstance(recipe, Recipe)):
        raise ValueError(f"'{path}' is not a method; derive it from rmdd.methods.Method")
    return recipe


def learns_rates(method: str) -> bool:
    """Return whether `method` learns the learning rates of students; True for a method that is not installed here."""
    try:
        return find(method).learns_rates
    except ValueError:
        return True
