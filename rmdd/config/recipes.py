"""Recipes by name: the published methods, and those that other packages bring.

A package brings its own by an entry point of the group `rmdd.methods`; a run file may also name one by its import
path, `module:Class`. A recipe is imported when it is asked for, so that this package knows none of them.
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
"""What tables and pages call a method; one from outside goes by its name."""
GROUP = "rmdd.methods"


@runtime_checkable
class Recipe(Protocol):
    """What a run file asks of the method that it names, a class; `rmdd.methods.Method` has it."""

    family: Family
    """Which loop it is a recipe of."""
    defaults: Mapping[str, Any]
    """Values of the run file that hold where it says nothing, by section."""
    reference: str | None
    """The protocol by which its paper scored students."""
    version: int
    """Part of the hash of every phase."""
    learns_rates: bool
    """Whether the inner rates of a set are learned."""
    Options: Any
    """Fields of `distill.options`, a section."""
    plain_options: Mapping[str, Any]
    """Options with which students start at whole epochs of the stated range, on the path of `distill.trajectory`."""

    def mistakes(self, run: Any) -> list[str]:
        """What is wrong with a run of this method."""
        ...

    def clashes_of_family(self, rule: Any, experts: Any, runtime: Any) -> list[Clash]:
        """What is wrong between the fields of a run, whatever the options."""
        ...

    def real_starts(self, rule: Any) -> bool:
        """Whether students start at real-valued epochs; else at whole ones."""
        ...

    def endpoint_of(self, rule: Any, epochs: int, phase: int) -> int:
        """The last expert epoch that a phase reads."""
        ...


def names() -> dict[str, str]:
    """Every method that can be named without its import path, and where it is."""
    return BUILT_IN | {p.name: p.value for p in entry_points(group=GROUP) if p.name not in BUILT_IN}


def find(name: str) -> Recipe:
    """The recipe called `name`. Raises `ValueError` when there is none, or when it is no `Recipe`."""
    place = BUILT_IN.get(name, name)
    if ":" not in place:
        place = names().get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        known = names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; or give one of your own as module:Class"
        raise ValueError(f"no method '{name}'; there are: {', '.join(sorted(known))}{hint}")
    try:
        recipe: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot import method '{place}': {error}; install its package, or put its folder on PYTHONPATH, on every "
            "node"
        ) from error
    if not (isinstance(recipe, type) and isinstance(recipe, Recipe)):
        raise ValueError(f"'{place}' is no method; derive it from rmdd.methods.Method")
    return recipe
