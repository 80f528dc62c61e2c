"""Change every field of a run file in turn, and list the hashes that change with it."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rmdd import config
from rmdd.data.ingest import shaping
from rmdd.data.shards import Dataset
from rmdd.distill.trajectory.planning import key_of
from rmdd.runs import paths

RUN = config.Run.model_validate(
    {
        "data": {"image_size": 16, "reencode": 16, "scenes": {"size": 16}},
        "model": {
            "image": {"name": "convnet", "weights": "random", "projection": "linear"},
            "text": {"name": "hashing", "projection": "linear"},
            "width": 8,
        },
        "experts": {"keep": "all", "epochs": 12},
    }
)
SECTIONS = ("data", "model", "experts", "distill", "evaluate", "search", "runtime")


class Named(Dataset):
    """A stand-in for a dataset; it has only a path and a hash, because hashes of a run need no more."""

    hash = "of the data"
    path = Path("data")

    def __init__(self):
        pass


def other(value: Any, annotation: Any) -> Any:
    """Return a different value of the same type; if `value` is None, the type is one that `annotation` allows."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.01
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        return (*value, *(value[:1] or ("x",)))
    if isinstance(value, dict):
        return {**value, "x": 1}
    kinds = [k for k in typing.get_args(annotation) if k is not type(None)] or [annotation]
    return {int: 3, float: 0.5, str: "x"}.get(kinds[0], 3 if "int" in str(kinds) or "gt" in str(kinds) else "x")


def sections(section: BaseModel) -> Iterator[BaseModel]:
    """Yield a section of a run file and all sections nested in it."""
    yield section
    for name in type(section).model_fields:
        if isinstance(value := getattr(section, name), BaseModel):
            yield from sections(value)


def changes(section: BaseModel, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield, for every field, its dotted name and a copy of `section` in which the field is changed (unvalidated)."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            for key, changed in changes(value, f"{before}{name}."):
                yield key, section.model_copy(update={name: changed})
        else:
            yield f"{before}{name}", section.model_copy(update={name: other(value, field.annotation)})


def hashes(run: config.Run) -> dict[str, str]:
    """Return all hashes of a run by name."""
    places = paths.paths_of(run, Named())
    result = {name: getattr(places, name).name for name in ("store", "phases", "baseline")}
    return result | {
        "run": run.hash_of(),
        "ingest": config.hash_value(shaping(run.data)),
        "plan": key_of(run, "store"),
    }


def moved(monkeypatch: Any) -> dict[str, list[str]]:
    """Change each field of a run file; return, by field, the names of the hashes that the change alters."""
    for name in ("image_identity", "encoder_identity"):
        monkeypatch.setattr(paths, name, lambda tower: "")
    usual, table = hashes(RUN), {}
    for section in SECTIONS:
        for key, changed in changes(getattr(RUN, section), f"{section}."):
            if key in ("data.source", "distill.method", "distill.options"):  # values of these fields are module names
                continue
            now = hashes(RUN.model_copy(update={section: changed}))
            table[key] = sorted(name for name in now if now[name] != usual[name])
    return table
