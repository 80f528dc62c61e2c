"""The run file that `rmdd init` writes: the values that are set, then all other fields as comments."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from rmdd import config

REST = """
# All other fields follow, with the values that they have now and their meaning. To set a field, delete the # at the
# beginning of its line and change the value. A name such as distill.batch stands for the field batch in the section
# distill; it can also be written there."""


def template(values: Mapping[str, Any], reasons: Mapping[str, str], head: list[str]) -> str:
    """Return a run file, as YAML, that sets `values` and lists all other fields as comments.

    `reasons` are comments on fields by their dotted names. `head` are the lines of the comment at the top.
    """
    stated = _stated(values, reasons, "", 0)
    rest = _rest(config.load(values), values, "")
    return "\n".join([*(f"# {line}".rstrip() for line in head), *stated, REST, *rest]) + "\n"


def _stated(values: Mapping[str, Any], reasons: Mapping[str, str], prefix: str, depth: int) -> Iterator[str]:
    for key, value in values.items():
        name, pad = f"{prefix}{key}", "  " * depth
        note = f" # {reasons[name]}" if name in reasons else ""
        if isinstance(value, Mapping) and depth == 0:
            yield ""
            yield f"{pad}{key}:{note}"
            yield from _stated(value, reasons, f"{name}.", depth + 1)
        else:
            yield f"{pad}{key}: {_inline(value)}{note}"


def _rest(section: config.Section, values: Any, prefix: str) -> Iterator[str]:
    """Yield the lines of those fields of `section` that `values` does not set."""
    for key, field in type(section).model_fields.items():
        value, name = getattr(section, key), f"{prefix}{key}"
        has = isinstance(values, Mapping) and key in values
        if isinstance(value, config.Section) and (not has or isinstance(values[key], Mapping)):
            yield ""
            yield from (f"# {line}" for line in _meaning(value))
            yield from _rest(value, values[key] if has else None, f"{name}.")
        elif not has:
            if isinstance(value, tuple) and value and isinstance(value[0], config.Section):
                yield ""
                yield from (f"# {line}" for line in _meaning(value[0]))
                fields = type(value[0]).model_fields.items()
                yield from (f"# {inner}: {about}" for inner, f in fields if (about := _about(f)))
            about = _about(field)
            shown = _inline(section.model_dump(mode="json")[key])
            yield f"#{name}: {shown}" + (f" # {about}" if about else "")


def _meaning(section: config.Section) -> list[str]:
    doc = type(section).__doc__
    return inspect.cleandoc(doc).splitlines() if doc and doc is not config.Section.__doc__ else []


def _about(field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    listed = " | ".join(choices)
    return "; ".join(part for part in (listed, field.description) if part)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [_inline(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (None, dict, tuple):
        return []
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.strip().removesuffix("\n...")
