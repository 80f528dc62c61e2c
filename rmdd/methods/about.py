"""What there is to say about a method: its own words, the values it sets, and the presets that use it."""

import inspect
import json
import sys
from typing import Any, Literal, get_args, get_origin

from rmdd import config, methods
from rmdd.config.recipes import Family, names
from rmdd.config.runfile import Section
from rmdd.methods.base import BaseMethod


def listing() -> list[dict[str, Any]]:
    """Every method by name, families together: where it is, one line about it, what it needs, its card, its status and
    its presets. One that cannot be imported says so."""
    users = presets_by_method()
    listed = []
    for name, place in sorted(names().items()):
        try:
            told = {"summary": summary(name), **_standing(methods.find(name))}
        except ValueError as error:
            told = {"summary": str(error), "family": "", "needs": [], "card": "", "status": str(error)}
        listed.append({"name": name, "place": place, **told, "presets": users.get(name, [])})
    order = [*get_args(Family), ""]
    return sorted(listed, key=lambda each: order.index(each["family"]))


def about(name: str) -> dict[str, Any]:
    """All about the method that `name` names as a run file does. Raises `ValueError` when there is none."""
    method = methods.find(name)
    return {
        "name": name,
        "place": f"{method.__module__}:{method.__qualname__}",
        "summary": summary(name),
        **_standing(method),
        "text": _words(method),
        "defaults": dict(method.defaults),
        "options": _options(method.Options),
        "presets": presets_by_method().get(name, []),
    }


def _options(section: type[Section], before: str = "") -> dict[str, str]:
    """Every field below `distill.options`: its meaning, what it may say, and its default."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        key, kind = f"{before}{name}", field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= _options(kind, f"{key}.")
            continue
        choices = [str(c) for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
        default = (
            "none" if field.is_required() else json.dumps(field.get_default(call_default_factory=True), default=str)
        )
        told = [f"one of {', '.join(choices)}"] if choices else []
        facts = "; ".join([*told, f"default {default}"])
        found[key] = f"{field.description} ({facts})" if field.description else facts
    return found


def _standing(method: type[BaseMethod]) -> dict[str, Any]:
    """Its family, what must be there before it begins, where it was published, and what was verified of it."""
    return {
        "family": method.family,
        "needs": list(method.needs),
        "card": method.card,
        "status": method.verified,
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


def _words(method: type[BaseMethod]) -> str:
    """The docstring of its module, else its own."""
    return inspect.cleandoc(sys.modules[method.__module__].__doc__ or method.__doc__ or "")
