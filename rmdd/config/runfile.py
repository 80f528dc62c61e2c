"""Parse and validate the content of run files: YAML, overrides, defaults, and a report of all mistakes at once.

The other modules of `rmdd.config` declare the fields of each section; `rmdd.config.presets` finds the files.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rmdd.config.hashing import Purpose

S = TypeVar("S", bound="Section")

MOVED: dict[str, str] = {
    "experts.gang": "experts.worker_group",
    "distill.blend": "distill.options.blend (only method: repblend; remove it with other methods)",
    "distill.anchors": "distill.options.anchors (only method: mct; remove it with other methods)",
    "distill.smooth_anchors": "distill.options.smooth_anchors (only method: mct; remove it with other methods)",
    "distill.start_points": "distill.options.start_points (only method: mct; remove it with other methods)",
    "distill.ranges": "distill.options.ranges (only method: amd; remove it with other methods)",
    "distill.starts": "distill.options.starts (only method: amd; remove it with other methods)",
    "distill.rate_branches": "distill.options.rate_branches (only method: lors, and methods derived from it)",
}
"""Fields that were moved since older releases: the old place of each, and the new place as errors show it."""


class Clash(str):
    """An error message about a combination of fields that does not work."""

    fields: frozenset[str]
    """Names of the fields that the message is about, and of their sections. The message is not shown if one of these
    fields is itself invalid."""

    def __new__(cls, text: str, *names: str) -> Clash:
        clash = super().__new__(cls, text)
        clash.fields = frozenset(part for name in names for part in (name, *name.split(".")))
        return clash


class Section(BaseModel):
    """Base class of the sections of a run file: a frozen pydantic model that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def clashes(self) -> list[Clash]:
        """Return error messages about combinations of valid fields that do not work."""
        return []

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Return fields to leave out of the hash for `purpose`: those without effect, given the values of the other
        fields; see `rmdd.config.hashing`."""
        return ()

    @model_validator(mode="after")
    def _check(self, info: Any) -> Section:
        clashes = [c if isinstance(c, Clash) else Clash(c) for c in self.clashes()]  # plugins may return plain strings
        if clashes and info.context is None:
            raise ValueError("; ".join(clashes))
        if clashes and info.context is not None:
            info.context.extend(clashes)  # `validate` reports all clashes together
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # some fields are mappings, which cannot be hashed


class ConfigError(ValueError):
    """All mistakes of a run file: one line for each, which names the field."""

    def __init__(self, mistakes: Iterable[str], where: str = "run file"):
        self.mistakes = list(mistakes)
        self.where = where
        super().__init__(f"{where}: {len(self.mistakes)} mistake(s)\n" + "\n".join(f"  - {m}" for m in self.mistakes))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.mistakes, self.where)


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads on, off, yes and no as words, not as booleans: `runtime.ray` is `on` or `off`."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse(text: str) -> Any:
    """Parse one YAML value. Raises `yaml.YAMLError`."""
    return _Loader(text).get_single_data()


def apply(raw: dict[str, Any], override: str, defaults: Mapping[str, Any], mistakes: list[str]) -> None:
    """Apply an override such as `a.b=c` to `raw`, in place. If the override is wrong, add a message to `mistakes`.

    An override of a list entry, such as `a.0=c`, changes the list in `raw` or else a copy of that in `defaults`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        mistakes.append(f"--set {override}: write it as section.field=value")
        return
    try:
        value = parse(text)
    except yaml.YAMLError:
        mistakes.append(f"--set {override}: '{text}' is not a YAML value; put it in quotes")
        return
    put(raw, key, value, defaults, mistakes, f"--set {override}")


def put(
    raw: dict[str, Any], key: str, value: Any, defaults: Mapping[str, Any], mistakes: list[str], where: str
) -> None:
    """Put `value` into `raw`, in place, under the dotted name `key`; messages about a wrong name begin with `where`."""
    node: Any = raw
    default: Any = defaults
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                mistakes.append(f"{where}: no entry '{part}'; the list has {len(node)} entries, counted from 0")
                return
            node = node[int(part)]
        else:
            default = default.get(part) if isinstance(default, Mapping) else None
            node = node.setdefault(part, copy.deepcopy(default) if isinstance(default, list) else {})
        if not isinstance(node, dict | list):
            mistakes.append(f"{where}: '{part}' is a value, not a section")
            return
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            mistakes.append(f"{where}: no entry '{last}'; the list has {len(node)} entries, counted from 0")
            return
        node[int(last)] = value
    else:
        node[last] = value


def nested(raw: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """Return a copy of a run file that has the value of each dotted key, such as `distill.batch: 8`, in its section.

    Such a value replaces the one that the section itself states. Raises `ConfigError` for a wrong name.
    """
    dotted = [key for key in raw if isinstance(key, str) and "." in key]
    out = copy.deepcopy({key: value for key, value in raw.items() if key not in dotted})
    mistakes: list[str] = []
    for key in dotted:
        put(out, key, raw[key], {}, mistakes, key)
    if mistakes:
        raise ConfigError(mistakes, where)
    return out


def filled(raw: Mapping[Any, Any], defaults: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a copy of `raw` with missing keys, at any depth, taken from `defaults`. Lists are not merged."""
    out = copy.deepcopy(dict(raw))
    for key, value in defaults.items():
        if isinstance(value, Mapping):
            inner = out.get(key)
            if inner is None or isinstance(inner, Mapping):
                out[key] = filled(inner or {}, value)
        else:
            out.setdefault(key, copy.deepcopy(value))
    return out


KEYS = "`rmdd init` writes a file with all keys"


def validate(kind: type[S], raw: dict[str, Any], listed_by: str = KEYS) -> tuple[S | None, list[str]]:
    """Validate `raw` as a section of class `kind`; return the section (None if there are mistakes) and all mistakes.

    Combinations of fields can be checked only if each field is valid. So the invalid fields are deleted from `raw`, in
    place, and the other fields are checked again. Messages about a deleted field are not returned.
    """
    mistakes: list[str] = []
    broken: set[str] = set()
    while True:
        clashes: list[Clash] = []
        try:
            value = kind.model_validate(raw, context=clashes)
        except ValidationError as error:
            mistakes += [] if broken else [_mistake(e, kind, listed_by) for e in error.errors()]
            deleted = _delete_fields(raw, [e["loc"] for e in error.errors()])
            if not deleted:
                return None, mistakes
            broken |= deleted
            continue
        mistakes += [str(clash) for clash in dict.fromkeys(clashes) if not clash.fields & broken]
        return (None if mistakes else value), mistakes


def _mistake(error: Any, kind: type[Section], listed_by: str) -> str:
    """Return one of pydantic's errors about a section of class `kind` as a line: the field, what is wrong, the value.

    `listed_by` says where the valid keys are listed.
    """
    # pydantic gives the location of an error as field names and, for a union, the type that it tried, such as `str`
    place = error["loc"]
    if place[:2] == ("evaluate", "probes"):  # `place[3]` is the kind of the probe, not a field
        place = (*place[:3], *place[4:])
    where = ".".join(str(part) for part in place if part != "str" and "[" not in str(part))
    if where in MOVED:
        return f"{where}: moved to {MOVED[where]}"
    if error["type"] == "extra_forbidden":
        similar = " or ".join(_similar(kind, place))
        return f"{where}: unknown key; " + (f"did you mean {similar}?" if similar else listed_by)
    message = error["msg"].removeprefix("Value error, ")
    shown = (
        ""
        if isinstance(error.get("input"), dict | BaseModel) or error["type"] == "missing"
        else f", found {error.get('input')!r}"
    )
    return f"{where}: {message}{shown}" if where else message


def _similar(kind: type[Section], place: Sequence[Any]) -> list[str]:
    """Return what the unknown key at `place` may stand for: a similar key beside it, or else up to three paths of keys
    elsewhere in a section of class `kind`."""
    sections: set[type[Section]] = {kind}
    for part in place[:-1]:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = {inner for field in fields for _, inner in _sections_in(field.annotation)} or sections
    name = str(place[-1])
    if beside := difflib.get_close_matches(name, [key for section in sections for key in section.model_fields], n=1):
        return beside
    paths = list(_paths(kind))
    keys = difflib.get_close_matches(name, {path.rpartition(".")[2] for path in paths}, n=1, cutoff=0.8)
    return [path for path in paths if path.rpartition(".")[2] in keys][:3]


def _paths(kind: type[Section], place: str = "") -> Iterator[str]:
    """Yield the dotted path of every field of a section and of the sections in it."""
    for name, field in kind.model_fields.items():
        yield f"{place}{name}"
        for entry, inner in _sections_in(field.annotation):
            yield from _paths(inner, f"{place}{name}.{entry}")


def _sections_in(annotation: Any) -> Iterator[tuple[str, type[Section]]]:
    """Yield the section classes in a type hint, each with the key of an example entry if it is in a list or mapping."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield "", annotation
    entry = {tuple: "0.", list: "0.", dict: "NAME."}.get(get_origin(annotation), "")
    for part in get_args(annotation):
        yield from ((entry + key, inner) for key, inner in _sections_in(part))


def _delete_fields(raw: dict[str, Any], places: Iterable[Sequence[Any]]) -> set[str]:
    """Delete the field at each of `places` from `raw` itself; if `raw` lacks a field, delete its closest parent.

    Returns the names of the deleted fields.
    """
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
