"""Tensors and facts in one safetensors file that knows its own checksum.

The metadata of a file holds one entry, for more would be written in no fixed order and equal runs would give unequal
bytes: JSON with `schema_version`, the facts, and the SHA-256 of all else.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmdd.core.files import atomic_path

SCHEMA_VERSION = 1


class Damaged(ValueError):
    """A file does not hold what was written."""


def save_checked(path: Path, tensors: Mapping[str, Tensor], entry: str, facts: Mapping[str, Any]) -> None:
    named = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    told = {"schema_version": SCHEMA_VERSION, **facts}
    with atomic_path(path) as temporary:
        save_file(named, temporary, metadata={entry: json.dumps(told | {"sha256": _checksum(named, told)})})


def load_checked(path: Path, entry: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts. Raises `Damaged`, also for another schema version; older files have no checksum."""
    facts = facts_of(path, entry)
    checksum = facts.pop("sha256", None)
    try:
        with safe_open(path, "pt") as file:
            # copied, for memory that lies elsewhere than torch puts it can change the last bit of a product
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise Damaged(str(error)) from error
    if checksum is not None and checksum != _checksum(tensors, facts):
        raise Damaged("its SHA-256 is not the one it was written with")
    return tensors, facts


def facts_of(path: Path, entry: str) -> dict[str, Any]:
    """The facts in the header, read alone."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        facts = json.loads(metadata[entry]) if entry in metadata else dict(metadata)  # as sets once were
        version = facts.get("schema_version", SCHEMA_VERSION)
    except Exception as error:
        raise Damaged(f"its header cannot be read: {error}") from error
    if version != SCHEMA_VERSION:
        raise Damaged(f"it has schema version {version}, this rmdd reads {SCHEMA_VERSION}")
    return facts


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
