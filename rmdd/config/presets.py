"""Reading run files: presets by name, YAML files by path, and the values that `extends` takes from other files.

A file in the folder `rmdd/presets` has the runs of one method on one dataset. Each entry under `budgets` is a preset,
named after the file and the entry's key: the entry `500` of `flickr30k_lors.yaml` is `flickr30k_lors_500`. A preset has
the values of its entry, then those above `budgets`, then those of the file's `extends`. `extends` has two special uses:

- above `budgets`, it can name a file with budgets: each entry then extends the entry with the same key in that file
- in an entry, it can be the key of an entry of the same file, whose values then replace those above `budgets`
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rmdd.config.precedence import DEFAULT_METHOD, FileValues, combined, value_of
from rmdd.config.runfile import ConfigError, filled, nested, parse

PRESETS = Path(__file__).parents[1] / "presets"


def preset_files() -> dict[str, list[str]]:
    """Return the names of the preset files (without .yaml), each with the keys under `budgets` in that file."""
    return {path.stem: list(_budgets(path)) for path in sorted(PRESETS.glob("*.yaml"))}


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(name for stem, keys in preset_files().items() for name in _names(stem, keys))


def find_preset(name: str) -> tuple[Path, str] | None:
    """Return the file of a preset and its key under `budgets` ("" without budgets); None if there is no such preset."""
    for path in PRESETS.glob("*.yaml"):
        if name.startswith(path.stem):
            keys = list(_budgets(path))
            names = _names(path.stem, keys)
            if name in names:
                return path, keys[names.index(name)] if keys else ""
    return None


def preset(name: str) -> dict[str, Any] | None:
    """Return the values of the preset `name`, without those of its `extends`; None if no preset has this name."""
    place = find_preset(name)
    if place is None:
        return None
    path, key = place
    common, entries = copy.deepcopy(_preset_file(path)), copy.deepcopy(_budgets(path))
    if not key:
        return common
    del common["budgets"]
    entry = {"name": name, **entries[key]}
    base = str(entry.get("extends"))
    if base in entries:
        return {**entry, "extends": f"{path.stem}_{base}"}
    run = filled(entry, common)
    same_key = f"{run.get('extends')}_{key}"
    return run if find_preset(same_key) is None else {**run, "extends": same_key}


def read(source: str | Path) -> dict[str, Any]:
    """Return the unchecked mapping of a preset or a YAML file, with the values of the files that it extends.

    Raises `ConfigError` when a file is missing or is not valid YAML.
    """
    return combined(files_of(source), None)[0]


def files_of(source: str | Path | Mapping[str, Any]) -> list[FileValues]:
    """Return the values of a preset, a YAML file or a mapping, and below them those of the files that it extends.

    Raises `ConfigError` when a file is missing or is not valid YAML.
    """
    if isinstance(source, Mapping):
        return _with_methods(_chain(copy.deepcopy(dict(source)), Path(), "run"))
    name = str(source)
    raw = preset(name)  # a file that has the name of a preset must be given as ./NAME
    if raw is not None:
        return _with_methods(_chain(raw, PRESETS, name, (name,)))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(["no such file; " + _choices() if path.suffix else no_preset(name)], name)
    return _with_methods(_chain(_mapping(path, name), path.parent, name, (str(path.resolve()),)))


def _chain(
    raw: dict[str, Any], folder: Path, where: str, before: tuple[str, ...] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """Return `raw` and the values of the files that its key `extends` leads to, each with the name of its file.

    `extends` is the name of a preset, or a path relative to `folder`. `before` lists the presets and files whose
    `extends` led to `raw`. Raises `ConfigError` if there is no such file, or if files extend each other in a circle.
    """
    raw = nested(raw, where)
    name = raw.pop("extends", None)
    if "budgets" in raw:
        advice = "write the values of a single run, or start from a preset with `extends: flickr30k_lors_500`"
        raise ConfigError([f"budgets: only the presets of rmdd have several budgets in a file; {advice}"], where)
    if name is None:
        return [(where, raw)]
    if not isinstance(name, str):
        raise ConfigError([f"extends: give the name of a preset or the path of a YAML file, found {name!r}"], where)
    base, label, path = preset(name), name, PRESETS / f"{name}.yaml"
    if base is None and name.startswith("bases/") and path.is_file():  # bases hold values that presets share
        base = copy.deepcopy(_preset_file(path))
    elif base is None:
        path = folder / Path(name).expanduser()
        if not path.is_file():
            missing = f"; there is no file {path}" if path.suffix else ""
            raise ConfigError([f"extends: {no_preset(name)}{missing}"], where)
        base, label = _mapping(path, str(path)), str(path.resolve())
    if label in before:
        circle = " -> ".join(Path(p).name for p in (*before[before.index(label) :], label))
        raise ConfigError([f"extends: files extend each other in a circle, {circle}; remove one `extends`"], where)
    return [(where, raw), *_chain(base, path.parent, label, (*before, label))]


def _with_methods(chain: Sequence[tuple[str, dict[str, Any]]]) -> list[FileValues]:
    """Return the values of each file in a chain of `extends`, with its method and whether they were chosen for it.

    Those of a preset and of the files that it extends were chosen for the method of this preset, except those of bases
    that name no method.
    """
    files: list[FileValues] = []
    named: str | None = None
    for name, values in reversed(chain):
        method = value_of(values, "distill.method")
        named = named if method is None else str(method)
        neutral = named is None and name.startswith("bases/")
        whole = values.pop("for_any_method", None)  # only files that `config.dump` wrote have this key
        tuned = not neutral and (name.startswith("bases/") or find_preset(name) is not None)
        files = [replace(file, method=named or DEFAULT_METHOD) if tuned and file.tuned else file for file in files]
        shown = Path(name).name if Path(name).is_absolute() else name
        if isinstance(whole, Mapping):
            files = [FileValues(shown, dict(whole), named or DEFAULT_METHOD), *files]
        files = [FileValues(shown, values, named or DEFAULT_METHOD, tuned or isinstance(whole, Mapping)), *files]
    return files


def counterpart(name: str, method: str, other: str) -> str | None:
    """Return the preset of the method `other` for the data and budget of `name`, a preset of `method`; None if none."""
    place = find_preset(name)
    if place is None:
        return None
    path, key = place
    data, budget = path.stem.removesuffix(f"_{method}"), next((part for part in key.split("_") if part.isdigit()), "")
    return next((n for n in (f"{data}_{other}_{key}", f"{data}_{other}_{budget}") if find_preset(n)), None)


def no_preset(name: str) -> str:
    """Return the error that `name` is no preset; it suggests a similar name or, for a preset file, its presets."""
    files = preset_files()
    if name in files:
        return f"'{name}' has several budgets; give one of {', '.join(_names(name, files[name]))}"
    near = difflib.get_close_matches(name, preset_names(), n=1)
    return f"no preset '{name}'; " + (f"did you mean {near[0]}? " if near else "") + _choices()


def _choices() -> str:
    return f"give one of the {len(preset_names())} presets that `rmdd presets` lists, or a YAML file"


def _names(stem: str, keys: list[str]) -> list[str]:
    return [f"{stem}_{key}" for key in keys] or [stem]


def _budgets(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries under `budgets` of a preset file, by their keys; none for a file without `budgets`."""
    return {str(key): entry or {} for key, entry in (_preset_file(path).get("budgets") or {}).items()}


@functools.cache
def _preset_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a file of the folder `presets`. It is cached, so callers must not change it."""
    return _mapping(path, path.stem)


def _mapping(path: Path, where: str) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises `ConfigError` if the file contains something else."""
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {' '.join(str(error).split())}"], where) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError([f"expected sections such as `data:` at the top, found a {type(raw).__name__}"], where)
    return raw
