"""The run file that `rmdd init` writes: all fields with their defaults and descriptions."""

import inspect
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from rmdd import config

HEAD = """# A run file of rmdd with all fields and their defaults. Delete the lines that you do not change.
# Check it with `rmdd check {name}`, and run it with `rmdd run {name}`.
# Fields that are missing here get their defaults, or with `extends: NAME` the values of that preset or YAML file.
"""


def template(name: str) -> str:
    """Return a run file, as YAML, with all defaults. The comments in it call the file `name`."""
    return HEAD.format(name=name) + "\n".join(_section(config.Run(), 0)) + "\n"


def _section(section: config.Section, depth: int) -> list[str]:
    pad = "  " * depth
    lines = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, config.Section):
            lines += [""] if depth == 0 else []
            lines += [f"{pad}# {line}" for line in _meaning(value)]
            lines += [f"{pad}{key}:", *_section(value, depth + 1)]
        elif isinstance(value, tuple) and value and isinstance(value[0], config.Section):
            lines += [f"{pad}# {line}" for line in _meaning(value[0])]
            fields = type(value[0]).model_fields.items()
            lines += [f"{pad}# {name}: {about}" for name, f in fields if (about := _about(f))]
            lines += [f"{pad}{key}:"] + [f"{pad}  - {_inline(entry.model_dump(mode='json'))}" for entry in value]
        else:
            about = _about(field)
            shown = _inline(section.model_dump(mode="json")[key])
            lines.append(f"{pad}{key}: {shown}" + (f" # {about}" if about else ""))
    return lines


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
