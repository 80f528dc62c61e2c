"""Find, check and download pretrained models, and describe them for the artefact of a run.

A model is named by a hub id (`ORGANISATION/NAME` or `ORGANISATION/NAME@REVISION`) or by a local folder. The artefact
records the version of the model: the commit for a hub id, and the hash of all files for a folder.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rmdd.core.files import read_json, sha256_file

Library = Literal["transformers", "diffusers"]

WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""Possible names of the weights file; the first that exists is used. Large models split the file into parts, which
`<name>.index.json` lists."""
SMALL = ("*.json", "*.txt", "*.model", "README.md")
ABOUT_BYTES = {
    "openai/clip-vit-large-patch14": 1_710_000_000,
    "stabilityai/stable-diffusion-2-1-unclip-small": 6_400_000_000,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 5_480_000_000,
    "openai/clip-vit-base-patch32": 605_000_000,
    "Salesforce/blip-image-captioning-large": 1_880_000_000,
    "llava-hf/llava-1.5-7b-hf": 14_100_000_000,
}
"""Approximate size in bytes of the models that presets name, in float32; shown when a model is missing."""


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model, or a pipeline of several models, that a run needs."""

    role: str
    """Purpose of the model in the run, such as `clip` or `decoder`; the artefact lists the model under this name."""
    id: str
    """Hub id or local folder of the model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None means the main branch, or the version that is already in the cache."""
    kind: Library = "transformers"
    """Library that loads the model; `diffusers` loads a pipeline: a model_index.json and one folder per component."""
    files: tuple[str, ...] = ()
    """Files that a model needs besides configuration and weights, where `a|b` means either file; for a pipeline, the
    names of the components that it needs."""
    option: str = ""
    """The run-file setting that loads this model from a folder, such as `distill.options.decoder: FOLDER`; it is shown
    in error messages."""

    @classmethod
    def of(
        cls, role: str, name: str, kind: Library = "transformers", files: Sequence[str] = (), option: str = ""
    ) -> PretrainedModel:
        """Parse the name in a run file: a folder, or a hub id with an optional `@REVISION`."""
        path = Path(name).expanduser()
        if path.is_dir() or _is_path(name):
            return cls(role, os.path.abspath(path), None, kind, tuple(files), option)
        id, _, revision = name.partition("@")
        return cls(role, id, revision or None, kind, tuple(files), option)

    @property
    def is_local(self) -> bool:
        return _is_path(self.id) or Path(self.id).is_dir()

    def location(self) -> Path | None:
        """Return the folder of the model's files on this machine, or None. Does not use the network."""
        if self.is_local:
            return Path(self.id) if Path(self.id).is_dir() else None
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        config_file = "config.json" if self.kind == "transformers" else "model_index.json"
        try:  # `snapshot_download` would also require files that are not needed here
            path = try_to_load_from_cache(self.id, config_file, revision=self.revision)
        except HFValidationError:
            return None
        return Path(path).parent if isinstance(path, str) else None

    def missing_files(self) -> list[str]:
        """Return the names of the files that this machine lacks; empty if the model is complete."""
        folder = self.location()
        if folder is None:
            return ["all files"]
        if self.kind == "transformers":
            return _missing_model_files(folder, self.files)
        if not (folder / "model_index.json").is_file():
            return ["model_index.json"]
        listed = components(folder)
        gaps = [f"{name}/" for name in self.files if name not in listed]
        return gaps + [gap for name in listed for gap in _missing_component_files(folder / name)]

    def folder(self) -> Path:
        """Return the folder of the model. Raises `ValueError` if files are missing, and says how to get them."""
        if self.missing_files():
            raise ValueError(self.how_to_get())
        folder = self.location()
        assert folder is not None
        return folder

    def how_to_get(self, why: str = "") -> str:
        """Return a line for the user: the missing files, the size of the model, the cause `why`, and what to do."""
        missing_files, size = self.missing_files(), ABOUT_BYTES.get(self.id)
        shown = ", ".join(missing_files[:4]) + (f" and {len(missing_files) - 4} more" if len(missing_files) > 4 else "")
        field = f" ({self.option})" if self.option else ""
        if self.is_local:
            problem = "the folder does not exist" if self.location() is None else f"it lacks {shown}"
            saved = "save_pretrained of its pipeline" if self.kind == "diffusers" else "save_pretrained, with processor"
            return f"{self.role}: folder {self.id}: {problem}; give a folder written by {saved}{field}"
        about = f", about {size / 1e9:.1f} GB" if size else ""
        at = f" --revision {self.revision}" if self.revision else ""
        name = self.id + (f"@{self.revision}" if self.revision else "")
        return (
            f"{self.role}: {name}{about} is not on this machine (missing: {shown}{'; ' + why if why else ''}); run "
            f"`hf download {self.id}{at}` on a machine with a network and copy the cache of that machine here "
            f"(HF_HOME), or give a folder with this model{field}"
        )

    def identity(self) -> str:
        """Return the version of the model: the commit on the hub, or `sha256:` and the hash of a folder's files."""
        folder = self.folder()
        if not self.is_local:
            return folder.name
        return "sha256:" + _content(folder, tuple((p, *_stamp(folder / p)) for p in self._used(folder)))

    def facts(self) -> dict[str, Any]:
        """Return what an artefact records about the model; the licence is None if the model card names none."""
        folder = self.folder()
        used = [folder / name for name in self._used(folder)]
        return {
            "role": self.role,
            "id": self.id if not self.is_local else Path(self.id).name,
            "local": self.is_local,
            "revision": self.identity(),
            "licence": licence_of(folder),
            "bytes": sum(p.stat().st_size for p in used),
        }

    def _used(self, folder: Path) -> list[str]:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        return [n for n in wanted(names, self.kind) if n != "README.md"]


def missing(parts: Iterable[PretrainedModel]) -> list[PretrainedModel]:
    """Return the models that are incomplete on this machine."""
    return [part for part in parts if part.missing_files()]


def obtain(parts: Iterable[PretrainedModel]) -> None:
    """Download the missing models. Raises `ValueError` that lists all models that are still incomplete."""
    lines = []
    for part in missing(parts):
        try:
            _download(part)
        except Exception as error:  # the hub and the network can fail in many ways
            lines.append(part.how_to_get(_briefly(error)))
            continue
        if part.missing_files():
            lines.append(part.how_to_get())
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        raise ValueError(f"{len(lines)} pretrained model(s) are missing:\n{listed}")


def faults(parts: Iterable[PretrainedModel]) -> list[str]:
    """Return one message for each model that is missing and cannot be downloaded. Downloads nothing."""
    lines = []
    for part in missing(parts):
        why = "" if part.is_local else _unreachable(part)
        if part.is_local or why:
            lines.append(part.how_to_get(why))
    return lines


def summary(part: PretrainedModel) -> dict[str, Any]:
    """Return what `rmdd check` prints about a model: `facts()` if it is complete, otherwise missing files and size."""
    missing_files = part.missing_files()
    if not missing_files:
        return part.facts() | {"missing": []}
    about = {"role": part.role, "id": part.id, "local": part.is_local, "revision": part.revision, "licence": None}
    return about | {"bytes": ABOUT_BYTES.get(part.id), "missing": missing_files}


def licence_of(folder: Path) -> str | None:
    """Return the licence that the model card in `folder` (README.md) names in its metadata, or None."""
    import yaml

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text.split("---", 2)
    if len(head) < 3 or head[0].strip():
        return None
    try:
        facts = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return None
    licence = (facts.get("license_name") or facts.get("license")) if isinstance(facts, dict) else None
    return " or ".join(map(str, licence)) if isinstance(licence, list) else licence if licence is None else str(licence)


def components(folder: Path) -> dict[str, str]:
    """Return the class name of each component of the pipeline in `folder`; components without a class are left out."""
    index = read_json(folder / "model_index.json")
    return {name: value[1] for name, value in index.items() if isinstance(value, list) and all(value)}


def wanted(names: Sequence[str], kind: Library) -> list[str]:
    """Select the files that loading a model needs: configuration, tokenizer, and weights in one format per folder."""
    files = []
    for folder in sorted({os.path.dirname(n) for n in names}):
        if bool(folder) != (kind == "diffusers") and folder:
            continue
        path_of = {os.path.basename(n): n for n in names if os.path.dirname(n) == folder}
        files += [n for base, n in sorted(path_of.items()) if any(fnmatch.fnmatch(base, p) for p in SMALL)]
        if kind == "diffusers" and not folder:
            continue
        for stem in WEIGHTS:
            base, _, ending = stem.rpartition(".")
            parts = [n for b, n in sorted(path_of.items()) if fnmatch.fnmatch(b, f"{base}-*-of-*.{ending}")]
            if stem in path_of or parts:
                files += [path_of[stem]] if stem in path_of else parts
                break
    return files


def _is_path(name: str) -> bool:
    return Path(name).expanduser().is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _missing_model_files(folder: Path, files: Sequence[str]) -> list[str]:
    gaps = [] if (folder / "config.json").is_file() else ["config.json"]
    gaps += _missing_weights(folder)
    return gaps + [f for f in files if not any((folder / name).is_file() for name in f.split("|"))]


def _missing_component_files(folder: Path) -> list[str]:
    if not folder.is_dir() or not any(p.suffix in (".json", ".txt") for p in folder.iterdir()):
        return [f"{folder.name}/"]
    weights = _missing_weights(folder) if (folder / "config.json").is_file() else []
    return [f"{folder.name}/{name}" for name in weights]


def _missing_weights(folder: Path) -> list[str]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return []
        if (index := folder / f"{name}.index.json").is_file():
            listed = sorted(set(read_json(index)["weight_map"].values()))
            return [part for part in listed if not (folder / part).is_file()]
    return ["weights (*.safetensors)"]


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_mtime_ns, path.stat().st_size


@functools.lru_cache(maxsize=16)
def _content(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Return a hash of file names and contents; computed again if the modification time or size of a file changed."""
    digest = hashlib.sha256()
    for name, _, _ in files:
        digest.update(f"{name}\0{sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def _download(part: PretrainedModel) -> None:
    if part.is_local:
        return
    from huggingface_hub import HfApi, snapshot_download

    listed = HfApi().model_info(part.id, revision=part.revision)
    names = wanted([s.rfilename for s in listed.siblings or []], part.kind)
    # Pass the name of the revision: a download by commit would not record in the cache which commit `main` is.
    snapshot_download(part.id, revision=part.revision, allow_patterns=names)


@functools.lru_cache(maxsize=16)
def _unreachable(part: PretrainedModel) -> str:
    """Return why the hub cannot provide a model, or an empty string if it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(part.id, revision=part.revision, timeout=10)
    except Exception as error:  # the hub and the network can fail in many ways
        return _briefly(error)
    return ""


def _briefly(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


@contextlib.contextmanager
def quiet(*libraries: Literal["transformers", "diffusers"]) -> Iterator[None]:
    """A context in which the given libraries show no progress bars and no warnings."""
    logs = [importlib.import_module(f"{library}.utils.logging") for library in libraries]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (level, bar) in zip(logs, before, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
