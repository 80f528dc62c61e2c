"""Tensors and facts in one safetensors file that knows its own checksum.

Tensors that belong together are named GROUP.NAME: the subsets of a set (`0.images`), or what a checkpoint holds
(`raw.images`). The metadata of a file holds one entry, for more would be written in no fixed order and equal runs would
give unequal bytes: JSON with `schema_version`, the facts, and the SHA-256 of all else.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmdd.core.files import atomic_path

SCHEMA_VERSION = 1

Groups = Mapping[str, Mapping[str, Tensor]]


class Damaged(ValueError):
    """A file does not hold what was written."""


def flatten_groups(groups: Groups) -> dict[str, Tensor]:
    """The tensors of all groups by their names in a file."""
    return {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def split_groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flatten_groups`; a group without tensors is not there."""
    groups: dict[str, dict[str, Tensor]] = {}
    for whole, t in tensors.items():
        group, _, name = whole.partition(".")
        groups.setdefault(group, {})[name] = t
    return groups


def save_checked(path: Path, tensors: Mapping[str, Tensor], entry: str, facts: Mapping[str, Any]) -> None:
    named = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    facts = {"schema_version": SCHEMA_VERSION, **facts}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would make it readable by its owner alone
        save_file(named, temporary, metadata={entry: json.dumps(facts | {"sha256": checksum(named, facts)})})
        os.chmod(temporary, mode)


def load_checked(path: Path, entry: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts. Raises `Damaged`, also for another schema version."""
    facts = facts_of(path, entry)
    expected = facts.pop("sha256", None)
    try:
        with safe_open(path, "pt") as file:
            # copied, for memory that lies elsewhere than torch puts it can change the last bit of a product
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise Damaged(str(error)) from error
    if expected != checksum(tensors, facts):
        raise Damaged("its SHA-256 is not the one it was written with")
    return tensors, facts


def facts_of(path: Path, entry: str) -> dict[str, Any]:
    """The facts in the header, read alone."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()[entry])
        version = facts.get("schema_version", SCHEMA_VERSION)
    except Exception as error:
        raise Damaged(f"its header cannot be read: {error}") from error
    if version != SCHEMA_VERSION:
        raise Damaged(f"it has schema version {version}, this rmdd reads {SCHEMA_VERSION}")
    return facts


def checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
