"""Hashes of the run file, by which results, experts and caches are found again.

A hash has a purpose, such as "experts", and contains the fields that can change the result of that purpose. By default
a field is part of every hash that contains its section. `no_hash(PURPOSES)` leaves a field out of the hashes for these
purposes; `hash_only(PURPOSES)` leaves it out of the hashes for all purposes except these. `Section.not_hashed` may
leave out more fields.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NUMBERS_VERSION = 4
"""This number is part of every hash. It is increased when new code makes the same run file give different results."""

Purpose = Literal[
    "run",  # identifies the results of a run
    "ingest",  # identifies an ingested dataset
    "view",  # identifies preprocessed images and captions
    "features",  # identifies features of images and captions, of any split
    "experts",  # identifies one expert
    "phases",  # identifies one distilled phase
    "plan",  # identifies phases planned from the experts
    "baseline",  # identifies students trained on random pairs and on full data
    "learned",  # identifies a student trained on one set of pairs
    "search",  # identifies the trials of a search
]
PURPOSES: tuple[str, ...] = get_args(Purpose)


def no_hash(*purposes: Purpose) -> dict[str, Any]:
    """Return the `json_schema_extra` of a field that the hashes for `purposes` (default: all hashes) leave out."""
    return {"hash": [p for p in PURPOSES if purposes and p not in purposes]}


def hash_only(*purposes: Purpose) -> dict[str, Any]:
    """Return the `json_schema_extra` of a field that is only in the hashes of `purposes`."""
    return {"hash": list(purposes)}


def purposes_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the purposes for which `field` is hashed if its section is hashed."""
    mark = field.json_schema_extra
    purposes: Any = mark.get("hash") if isinstance(mark, dict) else None
    return PURPOSES if purposes is None else tuple(purposes)


def hashed(section: BaseModel, purpose: Purpose) -> dict[str, Any]:
    """Return the fields of a section that are hashed for `purpose`, as plain values."""
    value = section.model_dump(mode="json")
    not_hashed = section.not_hashed(purpose)  # type: ignore[attr-defined]
    for name, field in type(section).model_fields.items():
        if purpose not in purposes_of(field) or name in not_hashed:
            del value[name]
        elif isinstance(inner := getattr(section, name), BaseModel):
            value[name] = hashed(inner, purpose)
    return value


def hash_value(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
