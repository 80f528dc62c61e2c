"""The JSON Schema of run files, by which editors complete and explain fields and mark mistakes."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rmdd.config import Run, recipes
from rmdd.config.precedence import SHAPING
from rmdd.config.presets import preset_names

DIALECT = "https://json-schema.org/draft/2020-12/schema"
WORDS: dict[str, list[Any]] = {
    "Distill.phases": ["auto", "adaptive"],
    "Evaluate.reference": [True, False],
    "Runtime.track": ["none", "tensorboard", "wandb", "mlflow"],
}
"""Values that a field takes besides those of its type, by the section and the name of the field."""


def run_file_schema() -> dict[str, Any]:
    """Return the JSON Schema of run files.

    A file that a run accepts is valid, also if it states only some fields and extends another file. Combinations of
    fields that do not work are not in the schema; `rmdd check` finds them.
    """
    schema = Run.model_json_schema()
    parts = schema.pop("$defs")
    for name, part in parts.items():
        _loosen(part, required=name in ("Phase", "Dimension"))
    _loosen(schema, required=False)
    for place, words in WORDS.items():
        section, _, field = place.partition(".")
        allowed = parts[section]["properties"][field]
        described = {key: allowed.pop(key) for key in ("description", "default") if key in allowed}
        parts[section]["properties"][field] = {**described, "anyOf": [{"enum": words}, allowed]}
    _add_methods(parts)
    for _, field in _fields(schema):
        if "$ref" in field:
            parts[field["$ref"].rpartition("/")[2]]["type"] = ["object", "null"]  # YAML reads `distill:` as null
    extends = {
        "description": "name of a preset, or path of a YAML file: fields that are missing here get its values",
        "anyOf": [{"enum": preset_names()}, {"type": "string"}],
    }
    for_any_method = {
        "description": "written by a run: the values that hold if the method is changed later",
        "type": "object",
        "properties": {section: schema["properties"][section] for section in SHAPING},
        "additionalProperties": False,
    }
    return {
        "$schema": DIALECT,
        "title": "run file of rmdd",
        "description": "settings of a run; `rmdd run FILE` computes a distilled set and a report from them",
        "type": "object",
        "properties": {"extends": extends, **schema["properties"], "for_any_method": for_any_method},
        "patternProperties": dict(_dotted(schema, parts)),
        "additionalProperties": False,
        "$defs": parts,
    }


def _fields(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from part.get("properties", {}).items()


def _loosen(node: Any, required: bool) -> None:
    """Change the schema of a section, in place: fields that another file may state are not `required`, and of several
    kinds of a section any may fit. Titles, the defaults of whole sections, and the sections' own notes are removed."""
    if isinstance(node, list):
        for each in node:
            _loosen(each, required)
    if not isinstance(node, dict):
        return
    for key in ("discriminator", *(() if required else ("required",)), *(("default",) if "$ref" in node else ())):
        node.pop(key, None)
    for key in ("title", "hash"):  # a field of that name would have a mapping as its value
        if not isinstance(node.get(key), dict):
            node.pop(key, None)
    if "oneOf" in node:
        node["anyOf"] = node.pop("oneOf")
    for each in node.values():
        _loosen(each, required)


def _add_methods(parts: dict[str, Any]) -> None:
    """Add the names of methods to the section `distill`, in place, and the options of each method that a file names."""
    distill, conditions = parts["Distill"], []
    for name in recipes.names():
        options = recipes.find(name).Options.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        inner = options.pop("$defs", {})
        _loosen([options, inner], required=False)
        parts |= {f"{name}.{key}": part for key, part in inner.items()} | {f"{name}.options": options}
        named = {"properties": {"method": {"const": name}}, "required": ["method"]}
        conditions.append({"if": named, "then": {"properties": {"options": {"$ref": f"#/$defs/{name}.options"}}}})
    method = distill["properties"]["method"]
    distill["properties"]["method"] = {**method, "anyOf": [{"enum": list(recipes.names())}, {"pattern": ":"}]}
    distill["allOf"] = conditions


def _dotted(part: Mapping[str, Any], parts: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a pattern of dotted names, such as `distill.batch`, and the schema of each, for the fields of a section."""
    for name, field in _fields(part):
        key = f"{place}{re.escape(name)}"
        if place:
            yield f"^{key}$", field
        for kind in (field, *field.get("anyOf", ())):
            for inner, entry in ((kind, ""), (kind.get("items") or {}, r"\d+\.")):
                if "$ref" in inner:
                    yield from _dotted(parts[inner["$ref"].rpartition("/")[2]], parts, rf"{key}\.{entry}")
            if "additionalProperties" in kind:
                yield rf"^{key}\..+$", {}
