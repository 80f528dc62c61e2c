"""Pretrained parts: where they lie, whether they are whole, and what an artefact says of them.

A part is named by a hub id, `ORGANISATION/NAME` or `ORGANISATION/NAME@REVISION`, or by a local folder. What is found
of it is pinned: a folder by the hash of its files, a hub id by its commit.
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
"""What a model's numbers lie in, the first that is there; large ones lie in parts that `<name>.index.json` lists."""
SMALL = ("*.json", "*.txt", "*.model", "README.md")
ABOUT_BYTES = {
    "openai/clip-vit-large-patch14": 1_710_000_000,
    "stabilityai/stable-diffusion-2-1-unclip-small": 6_400_000_000,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 5_480_000_000,
    "openai/clip-vit-base-patch32": 605_000_000,
    "Salesforce/blip-image-captioning-large": 1_880_000_000,
    "llava-hf/llava-1.5-7b-hf": 14_100_000_000,
}
"""Weights in float32 of the parts that presets name, from their numbers of parameters; shown where no hub answers."""


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model, or a pipeline of several, that a run asks for."""

    role: str
    """What it does in the run, such as `clip` or `decoder`; the artefact lists it under this word."""
    id: str
    """Hub id or local folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: its main branch, or what lies in the cache."""
    kind: Library = "transformers"
    """diffusers: a pipeline with a model_index.json and a folder for every component."""
    files: tuple[str, ...] = ()
    """Files that it needs beside configuration and weights, `a|b` is either; of a pipeline, the components."""
    option: str = ""
    """What to write in a run file to take it from a folder, for messages, such as `distill.options.decoder: FOLDER`."""

    @classmethod
    def of(
        cls, role: str, name: str, kind: Library = "transformers", files: Sequence[str] = (), option: str = ""
    ) -> PretrainedModel:
        """A part as a run file names it: a folder, or a hub id that may end in `@REVISION`."""
        path = Path(name).expanduser()
        if path.is_dir() or _is_path(name):
            return cls(role, os.path.abspath(path), None, kind, tuple(files), option)
        id, _, revision = name.partition("@")
        return cls(role, id, revision or None, kind, tuple(files), option)

    @property
    def is_local(self) -> bool:
        return _is_path(self.id) or Path(self.id).is_dir()

    def location(self) -> Path | None:
        """The folder that holds what there is of it; None when nothing is there. Asks no network."""
        if self.is_local:
            return Path(self.id) if Path(self.id).is_dir() else None
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        described = "config.json" if self.kind == "transformers" else "model_index.json"
        try:  # not snapshot_download, which takes a snapshot without the files that nobody loads for cut off
            path = try_to_load_from_cache(self.id, described, revision=self.revision)
        except HFValidationError:
            return None
        return Path(path).parent if isinstance(path, str) else None

    def lacking(self) -> list[str]:
        """What is not there of it, by file name; empty when it is whole."""
        folder = self.location()
        if folder is None:
            return ["all of it"]
        if self.kind == "transformers":
            return _lacking_model(folder, self.files)
        if not (folder / "model_index.json").is_file():
            return ["model_index.json"]
        listed = components(folder)
        gaps = [f"{name}/" for name in self.files if name not in listed]
        return gaps + [gap for name in listed for gap in _lacking_component(folder / name)]

    def folder(self) -> Path:
        """Where it lies, whole. Raises `ValueError` that says what is missing and how to get it."""
        if self.lacking():
            raise ValueError(self.how_to_get())
        folder = self.location()
        assert folder is not None
        return folder

    def how_to_get(self, why: str = "") -> str:
        """One line: what is missing, how large it is, and what to do."""
        lacking, size = self.lacking(), ABOUT_BYTES.get(self.id)
        shown = ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")
        field = f" ({self.option})" if self.option else ""
        if self.is_local:
            problem = "there is no such folder" if self.location() is None else f"it lacks {shown}"
            saved = "save_pretrained of its pipeline" if self.kind == "diffusers" else "save_pretrained, with processor"
            return f"{self.role}: folder {self.id}: {problem}; give a folder that was written by {saved}{field}"
        about = f", about {size / 1e9:.1f} GB" if size else ""
        at = f" --revision {self.revision}" if self.revision else ""
        name = self.id + (f"@{self.revision}" if self.revision else "")
        return (
            f"{self.role}: {name}{about} is not on this machine ({shown}{'; ' + why if why else ''}); where there is "
            f"a network run `hf download {self.id}{at}` and bring its cache here (HF_HOME), or give a folder "
            f"that holds it{field}"
        )

    def identity(self) -> str:
        """What pins its numbers: the commit of a hub id, `sha256:` and the hash of all its files for a folder."""
        folder = self.folder()
        if not self.is_local:
            return folder.name
        return "sha256:" + _content(folder, tuple((p, *_stamp(folder / p)) for p in self._used(folder)))

    def facts(self) -> dict[str, Any]:
        """What the artefact says of it. Licence None: its model card names none."""
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
    """Those that are not whole on this machine."""
    return [part for part in parts if part.lacking()]


def obtain(parts: Iterable[PretrainedModel]) -> None:
    """Download what is missing. Raises `ValueError` with every part that cannot be had."""
    lines = []
    for part in missing(parts):
        try:
            _download(part)
        except Exception as error:  # whatever keeps a hub from answering
            lines.append(part.how_to_get(_briefly(error)))
            continue
        if part.lacking():
            lines.append(part.how_to_get())
    if lines:
        raise ValueError(f"{len(lines)} pretrained part(s) are missing:\n" + "\n".join(f"  - {line}" for line in lines))


def faults(parts: Iterable[PretrainedModel]) -> list[str]:
    """What is missing and cannot be downloaded either, a line each. Downloads nothing."""
    lines = []
    for part in missing(parts):
        why = "" if part.is_local else _unreachable(part)
        if part.is_local or why:
            lines.append(part.how_to_get(why))
    return lines


def summary(part: PretrainedModel) -> dict[str, Any]:
    """What `rmdd check` shows: where it lies or what is missing, and its size where that is known."""
    lacking = part.lacking()
    if not lacking:
        return part.facts() | {"missing": []}
    about = {"role": part.role, "id": part.id, "local": part.is_local, "revision": part.revision, "licence": None}
    return about | {"bytes": ABOUT_BYTES.get(part.id), "missing": lacking}


def licence_of(folder: Path) -> str | None:
    """The licence that the model card in `folder` names in its metadata."""
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
    """The components of a pipeline's folder that are set, and their class."""
    index = read_json(folder / "model_index.json")
    return {name: value[1] for name, value in index.items() if isinstance(value, list) and all(value)}


def wanted(names: Sequence[str], kind: Library) -> list[str]:
    """Of the files of a part those that it is loaded from: small ones, and per folder one format of weights."""
    files = []
    for folder in sorted({os.path.dirname(n) for n in names}):
        if bool(folder) != (kind == "diffusers") and folder:
            continue
        here = {os.path.basename(n): n for n in names if os.path.dirname(n) == folder}
        files += [n for base, n in sorted(here.items()) if any(fnmatch.fnmatch(base, p) for p in SMALL)]
        if kind == "diffusers" and not folder:
            continue
        for stem in WEIGHTS:
            base, _, ending = stem.rpartition(".")
            parts = [n for b, n in sorted(here.items()) if fnmatch.fnmatch(b, f"{base}-*-of-*.{ending}")]
            if stem in here or parts:
                files += [here[stem]] if stem in here else parts
                break
    return files


def _is_path(name: str) -> bool:
    return Path(name).expanduser().is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _lacking_model(folder: Path, files: Sequence[str]) -> list[str]:
    gaps = [] if (folder / "config.json").is_file() else ["config.json"]
    gaps += _lacking_weights(folder)
    return gaps + [f for f in files if not any((folder / name).is_file() for name in f.split("|"))]


def _lacking_component(folder: Path) -> list[str]:
    if not folder.is_dir() or not any(p.suffix in (".json", ".txt") for p in folder.iterdir()):
        return [f"{folder.name}/"]
    weights = _lacking_weights(folder) if (folder / "config.json").is_file() else []
    return [f"{folder.name}/{name}" for name in weights]


def _lacking_weights(folder: Path) -> list[str]:
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
    """Hash of names and bytes. Times of change and sizes only say when what was hashed before can be used again."""
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
    snapshot_download(part.id, revision=part.revision, allow_patterns=names)  # a commit would leave no word of `main`


@functools.lru_cache(maxsize=16)
def _unreachable(part: PretrainedModel) -> str:
    """Why a hub cannot give a part; empty when it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(part.id, revision=part.revision, timeout=10)
    except Exception as error:  # whatever keeps a hub from answering
        return _briefly(error)
    return ""


def _briefly(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


@contextlib.contextmanager
def quiet(*libraries: Literal["transformers", "diffusers"]) -> Iterator[None]:
    """Load models without the progress bars and the advice of these libraries."""
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
