"""Describe distillation methods for the command `rmdd methods`: docstring, defaults, options and presets of each."""

import inspect
import json
import sys
from typing import Any, Literal, get_args, get_origin

from rmdd import config, methods
from rmdd.config.recipes import Family, names
from rmdd.config.runfile import Section
from rmdd.methods.base import BaseMethod


def listing() -> list[dict[str, Any]]:
    """Return one record per distillation method, sorted by family and name.

    A record holds the method's summary, its required inputs, its publication (`card`), a text on what tests verify
    (`status`) and its presets. If a method cannot be imported, its summary and status hold the error message.
    """
    presets = presets_by_method()
    records = []
    for name, place in sorted(names().items()):
        try:
            details = {"summary": summary(name), **_attributes(methods.find(name))}
        except ValueError as error:
            details = {"summary": str(error), "family": "", "needs": [], "card": "", "status": str(error)}
        records.append({"name": name, "place": place, **details, "presets": presets.get(name, [])})
    order = [*get_args(Family), ""]
    return sorted(records, key=lambda record: order.index(record["family"]))


def about(name: str) -> dict[str, Any]:
    """Return all details of one distillation method: the record that `listing` returns, and its docstring, defaults
    and options.

    `name` is a name or an import path `module:Class`, as in `distill.method`. Raise `ValueError` for an unknown name.
    """
    method = methods.find(name)
    return {
        "name": name,
        "place": f"{method.__module__}:{method.__qualname__}",
        "summary": summary(name),
        **_attributes(method),
        "text": _docstring(method),
        "defaults": dict(method.defaults),
        "options": _options(method.Options),
        "presets": presets_by_method().get(name, []),
    }


def _options(section: type[Section], before: str = "") -> dict[str, str]:
    """Describe the fields of a method's `distill.options`: the meaning, allowed values and default of each field."""
    described: dict[str, str] = {}
    for name, field in section.model_fields.items():
        key, kind = f"{before}{name}", field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            described |= _options(kind, f"{key}.")
            continue
        choices = [str(c) for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
        default = (
            "none" if field.is_required() else json.dumps(field.get_default(call_default_factory=True), default=str)
        )
        allowed = [f"one of {', '.join(choices)}"] if choices else []
        facts = "; ".join([*allowed, f"default {default}"])
        described[key] = f"{field.description} ({facts})" if field.description else facts
    return described


def _attributes(method: type[BaseMethod]) -> dict[str, Any]:
    """Return a method's family, its required inputs, its publication, and a text on what tests verify."""
    return {
        "family": method.family,
        "needs": list(method.needs),
        "card": method.card,
        "status": method.verified,
    }


def summary(name: str) -> str:
    """Return the first paragraph of a method's docstring as one line. Raise `ValueError` for an unknown name."""
    return " ".join(_docstring(methods.find(name)).partition("\n\n")[0].split())


def presets_by_method() -> dict[str, list[str]]:
    """Return, for each distillation method, the names of the presets that use it."""
    default_method, presets = config.Distill().method, dict[str, list[str]]()
    for preset in config.preset_names():
        presets.setdefault(config.read(preset).get("distill", {}).get("method", default_method), []).append(preset)
    return presets


def _docstring(method: type[BaseMethod]) -> str:
    """Return the docstring of the method's module, or of its class if the module has none."""
    return inspect.cleandoc(sys.modules[method.__module__].__doc__ or method.__doc__ or "")
