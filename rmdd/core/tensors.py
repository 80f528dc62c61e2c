"""Safetensors files with a checksum: they contain named tensors, and a dict of JSON values about them (`facts`).

Tensors that belong together are named GROUP.NAME, such as `0.images` in the first subset of a distilled set, or
`raw.images` in a checkpoint. The metadata of a file has a single entry. With several entries, whose order safetensors
does not fix, two equal runs would write different bytes. The entry is JSON with `schema_version`, `facts`, and the
SHA-256 of both `facts` and the tensors.
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
    """A file is damaged: it cannot be read, or its content does not match its checksum or schema version."""


def flatten_groups(groups: Groups) -> dict[str, Tensor]:
    """Return the tensors of all groups in one dict, named GROUP.NAME as in a file."""
    return {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def split_groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the groups of tensors named GROUP.NAME (undo `flatten_groups`, but leave out empty groups)."""
    groups: dict[str, dict[str, Tensor]] = {}
    for full_name, t in tensors.items():
        group, _, name = full_name.partition(".")
        groups.setdefault(group, {})[name] = t
    return groups


def save_checked(path: Path, tensors: Mapping[str, Tensor], entry: str, facts: Mapping[str, Any]) -> None:
    """Write `tensors` to the file `path`; `facts` and the checksum go into its metadata, under the key `entry`."""
    named = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    facts = {"schema_version": SCHEMA_VERSION, **facts}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would make the file readable by its owner only
        save_file(named, temporary, metadata={entry: json.dumps(facts | {"sha256": checksum(named, facts)})})
        os.chmod(temporary, mode)


def load_checked(path: Path, entry: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the dict `facts` of a file written by `save_checked`.

    Raises `Damaged` if the file cannot be read, or its checksum or schema version does not match.
    """
    facts = facts_of(path, entry)
    expected = facts.pop("sha256", None)
    try:
        with safe_open(path, "pt") as file:
            # `clone` aligns the memory as torch does; a different alignment can change the last bit of a matrix product
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise Damaged(str(error)) from error
    if expected != checksum(tensors, facts):
        raise Damaged("the content does not match its SHA-256")
    return tensors, facts


def facts_of(path: Path, entry: str) -> dict[str, Any]:
    """Return `facts`, with the checksum as `sha256`, of a file that `save_checked` wrote. Raises `Damaged`."""
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()[entry])
        version = facts.get("schema_version", SCHEMA_VERSION)
    except Exception as error:
        raise Damaged(f"the header cannot be read: {error}") from error
    if version != SCHEMA_VERSION:
        raise Damaged(f"the file has schema version {version}, and this version of rmdd reads {SCHEMA_VERSION}")
    return facts


def checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
