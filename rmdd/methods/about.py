"""What there is to say about a method: its own words, the values it sets, and the presets that use it."""

import inspect
import sys
from typing import Any

from rmdd import config, methods


def listing() -> list[dict[str, Any]]:
    """Every method by name: where it is, one line about it, its presets. One that cannot be imported says so."""
    users = presets_by_method()
    listed = []
    for name, place in sorted(methods.names().items()):
        try:
            line = summary(name)
        except ValueError as error:
            line = str(error)
        listed.append({"name": name, "place": place, "summary": line, "presets": users.get(name, [])})
    return listed


def about(name: str) -> dict[str, Any]:
    """All about the method that `name` names as a run file does. Raises `ValueError` when there is none."""
    method = methods.find(name)
    return {
        "name": name,
        "place": f"{method.__module__}:{method.__qualname__}",
        "summary": summary(name),
        "text": _words(method),
        "defaults": dict(method.defaults),
        "options": {key: field.description or "" for key, field in method.Options.model_fields.items()},
        "presets": presets_by_method().get(name, []),
    }


def summary(name: str) -> str:
    """The first paragraph about a method, in one line. Raises `ValueError` when there is no such method."""
    return " ".join(_words(methods.find(name)).partition("\n\n")[0].split())


def presets_by_method() -> dict[str, list[str]]:
    """The names of the presets, by method."""
    usual, found = config.Distill().method, dict[str, list[str]]()
    for preset in config.preset_names():
        found.setdefault(config.read(preset).get("distill", {}).get("method", usual), []).append(preset)
    return found


def _words(method: type[methods.Method]) -> str:
    """The docstring of its module, else its own."""
    return inspect.cleandoc(sys.modules[method.__module__].__doc__ or method.__doc__ or "")
