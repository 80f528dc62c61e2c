"""What of a run file shapes what: every field says it where it is declared.

A field without a mark shapes every hash that its section enters. `no_hash(...)` leaves it out of some purposes, or of
all; `hash_only(...)` lets it into these alone. What depends on the values of other fields is `Section.not_hashed`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NUMBERS_VERSION = 4
"""Part of every hash; raised when a change of the code moves the numbers of an unchanged run file."""

Purpose = Literal[
    "run",  # the results of a run
    "ingest",  # a dataset as it is written
    "view",  # pictures and captions as models see them
    "features",  # those of them that do not depend on a split
    "experts",  # one expert
    "phases",  # what is distilled
    "plan",  # phases that are found from the experts
    "baseline",  # students of random pairs and of full data
    "learned",  # a student of one set of pairs
    "search",  # what a search tries
]
PURPOSES: tuple[str, ...] = get_args(Purpose)


def no_hash(*purposes: Purpose) -> dict[str, Any]:
    """For `Field(json_schema_extra=...)`: the field enters no hash, or none for these purposes."""
    return {"hash": [p for p in PURPOSES if purposes and p not in purposes]}


def hash_only(*purposes: Purpose) -> dict[str, Any]:
    """For `Field(json_schema_extra=...)`: the field enters the hash of these purposes alone."""
    return {"hash": list(purposes)}


def purposes_of(field: FieldInfo) -> tuple[str, ...]:
    """What a field shapes, if its section does."""
    mark = field.json_schema_extra
    found: Any = mark.get("hash") if isinstance(mark, dict) else None
    return PURPOSES if found is None else tuple(found)


def hashed(section: BaseModel, purpose: Purpose) -> dict[str, Any]:
    """The fields of a section that shape `purpose`, as plain values."""
    value = section.model_dump(mode="json")
    left_out = section.not_hashed(purpose)  # type: ignore[attr-defined]
    for name, field in type(section).model_fields.items():
        if purpose not in purposes_of(field) or name in left_out:
            del value[name]
        elif isinstance(inner := getattr(section, name), BaseModel):
            value[name] = hashed(inner, purpose)
    return value


def hash_value(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
