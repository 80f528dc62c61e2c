"""The mapping in a run file: its YAML, overrides, default values, and checks that report every mistake at once.

The fields of each section are declared in the other modules of `rmdd.config`; `rmdd.config.presets` finds the files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rmdd.config.hashing import Purpose

S = TypeVar("S", bound="Section")

MOVED: dict[str, str] = {
    "experts.gang": "experts.worker_group",
    "distill.blend": "distill.options.blend (method: repblend; take it out with others)",
    "distill.anchors": "distill.options.anchors (method: mct; take it out with others)",
    "distill.smooth_anchors": "distill.options.smooth_anchors (method: mct; take it out with others)",
    "distill.start_points": "distill.options.start_points (method: mct; take it out with others)",
    "distill.ranges": "distill.options.ranges (method: amd; take it out with others)",
    "distill.starts": "distill.options.starts (method: amd; take it out with others)",
    "distill.rate_branches": "distill.options.rate_branches (method: lors, and those derived from it)",
}
"""Fields of older run files, and where each is now: the place to write it, for the message that names it."""


class Clash(str):
    """A sentence on fields that do not fit each other."""

    fields: frozenset[str]
    """The fields that it was derived from, and their sections; if one of them cannot be read, it is not shown."""

    def __new__(cls, text: str, *names: str) -> Clash:
        clash = super().__new__(cls, text)
        clash.fields = frozenset(part for name in names for part in (name, *name.split(".")))
        return clash


class Section(BaseModel):
    """Part of a run file, frozen and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def clashes(self) -> list[Clash]:
        """What is wrong between fields that are each right."""
        return []

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Fields that shape nothing for a purpose, as the others are set; see `rmdd.config.hashing`."""
        return ()

    @model_validator(mode="after")
    def _check(self, info: Any) -> Section:
        found = [c if isinstance(c, Clash) else Clash(c) for c in self.clashes()]  # other packages may give a `str`
        if found and info.context is None:
            raise ValueError("; ".join(found))
        if found and info.context is not None:
            info.context.extend(found)  # `validate` tells them all at once
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a field may hold a mapping


class ConfigError(ValueError):
    """Every mistake of a run file at once: one line each, naming the field."""

    def __init__(self, mistakes: Iterable[str], where: str = "run file"):
        self.mistakes = list(mistakes)
        self.where = where
        super().__init__(f"{where}: {len(self.mistakes)} mistake(s)\n" + "\n".join(f"  - {m}" for m in self.mistakes))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.mistakes, self.where)


class _Loader(yaml.SafeLoader):
    """YAML without the words on, off, yes and no for booleans: `ray: off` means the word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse(text: str) -> Any:
    """One YAML value; raises `yaml.YAMLError`."""
    return _Loader(text).get_single_data()


def apply(raw: dict[str, Any], override: str, defaults: Mapping[str, Any], mistakes: list[str]) -> None:
    """Set `a.b=c` in `raw`, in place; what is wrong with it is added to `mistakes`.

    An entry of a list that `raw` does not spell out changes the list of `defaults`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        mistakes.append(f"--set {override}: write it as section.field=value")
        return
    try:
        value = parse(text)
    except yaml.YAMLError:
        mistakes.append(f"--set {override}: '{text}' is not a YAML value")
        return
    node: Any = raw
    usual: Any = defaults
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                mistakes.append(f"--set {override}: no entry '{part}' (there are {len(node)})")
                return
            node = node[int(part)]
        else:
            usual = usual.get(part) if isinstance(usual, Mapping) else None
            node = node.setdefault(part, copy.deepcopy(usual) if isinstance(usual, list) else {})
        if not isinstance(node, dict | list):
            mistakes.append(f"--set {override}: '{part}' is a value, not a section")
            return
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            mistakes.append(f"--set {override}: no entry '{last}' (there are {len(node)})")
            return
        node[int(last)] = value
    else:
        node[last] = value


def filled(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with the values of `defaults` wherever it has none; lists are taken whole."""
    out = copy.deepcopy(dict(raw))
    for key, value in defaults.items():
        if isinstance(value, Mapping):
            inner = out.get(key)
            if inner is None or isinstance(inner, Mapping):
                out[key] = filled(inner or {}, value)
        else:
            out.setdefault(key, copy.deepcopy(value))
    return out


KEYS = "`rmdd init` writes every key with its meaning"


def validate(kind: type[S], raw: dict[str, Any], listed_by: str = KEYS) -> tuple[S | None, list[str]]:
    """`raw` as a section, and every mistake in it.

    Fields are checked against each other only where all can be read. So those that cannot are left out, and what
    then is wrong is told as well, unless it is about them. Changes `raw`.
    """
    mistakes: list[str] = []
    broken: set[str] = set()
    while True:
        clashes: list[Clash] = []
        try:
            value = kind.model_validate(raw, context=clashes)
        except ValidationError as error:
            mistakes += [] if broken else [_mistake(e, listed_by) for e in error.errors()]
            left_out = _without(raw, [e["loc"] for e in error.errors()])
            if not left_out:
                return None, mistakes
            broken |= left_out
            continue
        mistakes += [str(clash) for clash in dict.fromkeys(clashes) if not clash.fields & broken]
        return (None if mistakes else value), mistakes


def _mistake(error: Any, listed_by: str) -> str:
    """One line for one of pydantic's errors: the field, what is wrong, what was found; `listed_by` lists the keys."""
    # pydantic also names the member of a union that it tried, such as `str`
    place = error["loc"]
    if place[:2] == ("evaluate", "probes"):  # what is at the fourth place is the kind, by which a union is told apart
        place = (*place[:3], *place[4:])
    where = ".".join(str(part) for part in place if part != "str" and "[" not in str(part))
    if where in MOVED:
        return f"{where}: moved to {MOVED[where]}"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; {listed_by}"
    message = error["msg"].removeprefix("Value error, ")
    shown = (
        ""
        if isinstance(error.get("input"), dict | BaseModel) or error["type"] == "missing"
        else f", found {error.get('input')!r}"
    )
    return f"{where}: {message}{shown}" if where else message


def _without(raw: dict[str, Any], places: Iterable[Sequence[Any]]) -> set[str]:
    """Delete from `raw`, in place, the field nearest to each of `places`; returns the names of those deleted."""
    deleted = set()
    for place in places:
        node: Any = raw
        nearest: tuple[dict[str, Any], Any] | None = None
        for part in place:
            if isinstance(node, dict) and part in node:
                nearest = node, part
            elif not (isinstance(node, list) and isinstance(part, int) and part < len(node)):
                break
            node = node[part]
        if nearest is not None:
            del nearest[0][nearest[1]]
            deleted.add(str(nearest[1]))
    return deleted
