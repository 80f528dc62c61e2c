"""The rule by which the values of files give way to those of another distillation method.

A value comes from the first file that states it: the run file, the file that it extends, and so on. What a file of the
user, or `--set`, states itself holds for every method. A preset's values were chosen for the method of that preset, so
they give way if the run has another method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from rmdd.config import recipes
from rmdd.config.distill import Distill, Phase
from rmdd.config.recipes import Recipe
from rmdd.config.runfile import filled

OF_ANY_METHOD = ("method", "budget", "budget_check", "precision", "guard", "checkpoint_every", "snapshots", "seed")
"""Fields of `distill` that do not give way."""
OF_STUDENTS = ("epochs", "order", "between", "lr_drop", "schedule", "lr", "text_lr", "temperature", "augment")
"""Fields of `evaluate` that give way: how students learn the set of the method."""
GIVE_WAY = frozenset(
    {f"distill.{name}" for name in Distill.model_fields if name not in OF_ANY_METHOD}
    | {f"evaluate.{name}" for name in OF_STUDENTS}
)
SHAPING = ("model", "experts", "distill", "evaluate")
"""Sections of a run file with fields that can give way to those of another method."""
DEFAULT_METHOD: str = Distill.model_fields["method"].default


@dataclass(frozen=True)
class FileValues:
    """The values that one file states, without those of its `extends`."""

    name: str
    """The file as messages show it: the name of a preset, or a path."""
    values: dict[str, Any]
    method: str = DEFAULT_METHOD
    """The method of a run of this file: the one that it names, or else that of the files that it extends."""
    tuned: bool = False
    """Whether the values were chosen for this method: those of presets, and of their bases that name a method."""


@dataclass(frozen=True)
class Origins:
    """Where the values of a run come from."""

    names: Mapping[str, str] = field(default_factory=dict)
    """The name of the file that states a field, or `--set`; fields that no file states are missing."""
    for_any_method: Mapping[str, Any] = field(default_factory=dict)
    """The values that hold for every method, as sections of a run file."""
    preset: tuple[str, str] | None = None
    """The name and the method of the preset from which the run starts."""
    gave_way: tuple[str, ...] = ()
    """The fields of that preset that gave way to another method."""


def leaves(values: Mapping[Any, Any], before: str = "") -> Iterator[str]:
    """Return the dotted names of all fields in `values`; a list is one field."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def value_of(values: Any, name: str) -> Any:
    """Return the value of the field with the dotted name `name`; None if `values` lacks it."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def find(method: str) -> Recipe | None:
    """Return the class of a method; None if there is no method of that name."""
    try:
        return recipes.find(method)
    except ValueError:
        return None


def values_for(file: FileValues, recipe: Recipe) -> dict[str, Any]:
    """Return the values of `file` that hold in a run of the method `recipe`.

    A file of another method keeps all values, except options that the method of the run does not have.
    """
    other = find(file.method)
    if other is recipe:
        return file.values
    if not file.tuned:
        options = value_of(file.values, "distill.options")
        unknown = set(options if isinstance(options, Mapping) else ()) - set(recipe.Options.model_fields)
        return without(file.values, {f"distill.options.{name}" for name in unknown})
    own = {*leaves(recipe.defaults), *leaves(other.defaults if other else {})}
    of_any_method = tuple(f"distill.{name}." for name in OF_ANY_METHOD)
    return without(file.values, {*GIVE_WAY, *(name for name in own if not f"{name}.".startswith(of_any_method))})


def without(values: Mapping[Any, Any], names: set[str], before: str = "") -> dict[Any, Any]:
    """Return `values` without the fields and sections whose dotted names are in `names`."""
    return {
        key: without(value, names, f"{before}{key}.") if isinstance(value, Mapping) else value
        for key, value in values.items()
        if f"{before}{key}" not in names
    }


def combined(files: Sequence[FileValues], recipe: Recipe | None) -> tuple[dict[str, Any], Origins]:
    """Return the values of `files` that hold in a run of the method `recipe` (None: all), and where they come from."""
    raw: dict[str, Any] = {}
    for_any_method: dict[str, Any] = {}
    names: dict[str, str] = {}
    gave_way: list[str] = []
    for file in files:
        values = file.values if recipe is None else values_for(file, recipe)
        gave_way += set(leaves(file.values)) - set(leaves(values)) - set(names) if file.tuned else []
        names = dict.fromkeys(leaves(values), file.name) | names
        raw = filled(raw, values)
        for_any_method = for_any_method if file.tuned else filled(for_any_method, values)
    preset = next(((file.name, file.method) for file in files if file.tuned), None)
    return raw, Origins(names, for_any_method, preset, tuple(sorted(set(gave_way))))


def with_overrides(origins: Origins, overrides: Iterable[str], raw: Mapping[str, Any]) -> Origins:
    """Return `origins` after the overrides that were applied to `raw`: their values hold for every method."""
    names, for_any_method = dict(origins.names), dict(origins.for_any_method)
    for override in overrides:
        key = ".".join(takewhile(lambda part: not part.isdigit(), override.partition("=")[0].split(".")))
        value = value_of(raw, key)
        names = {name: by for name, by in names.items() if not f"{name}.".startswith(f"{key}.")}
        names |= dict.fromkeys(leaves(value, f"{key}.") if isinstance(value, Mapping) else [key], "--set")
        for part in reversed(key.split(".")):
            value = {part: value}
        for_any_method = filled(value, without(for_any_method, {key}))
    return replace(origins, names=names, for_any_method=for_any_method)


def phases_of_budget(recipe: Recipe, budget: Any) -> list[dict[str, Any]] | None:
    """Return the default phases of a method, whose pairs are scaled from its default budget to `budget`.

    Returns None if the budget is the default one or invalid.
    """
    usual = value_of(recipe.defaults, "distill.budget") or Distill.model_fields["budget"].default
    if budget in (None, usual) or type(budget) is not int or budget < 1:
        return None
    phases = value_of(recipe.defaults, "distill.phases") or [phase.model_dump() for phase in Distill().phases]
    return [{**phase, "pairs": max(2, phase["pairs"] * budget // usual)} for phase in phases]


def overridden(recipe: Recipe, used: Mapping[str, Any], origins: Origins | None) -> list[dict[str, Any]]:
    """Return the own values of a method that a run of it does not use: field, both values, and the other's file.

    `used` are the values of the run as JSON values. `by` is None if the run was not loaded from files.
    """
    rows = []
    for name in leaves(recipe.defaults):
        own, now = value_of(recipe.defaults, name), value_of(used, name)
        if name == "distill.phases":
            own = [Phase(**phase).model_dump(mode="json") for phase in own]
        if own != now:
            rows.append({"field": name, "own": own, "used": now, "by": (origins or Origins()).names.get(name)})
    return rows
