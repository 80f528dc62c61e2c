"""`Entry`: one row of a comparison, opened from a set, a subset, or the words `random`, `random:N` and `full`."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rmdd import config
from rmdd.artefact import distilled
from rmdd.artefact.distilled import DistilledSet
from rmdd.core.files import read_json, sha256_file
from rmdd.core.layout import locate_file
from rmdd.core.storage import is_uri, open_storage, run_folder
from rmdd.coresets import subset as coreset
from rmdd.coresets.subset import Coreset
from rmdd.distill.trajectory.planning import PLAN, with_explicit_phases, with_plan
from rmdd.models.text import encoder_identity, text_width
from rmdd.runs.gate import is_decided

Kind = Literal["set", "subset", "random", "full"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One row of a comparison: its training pairs and its name."""

    name: str
    kind: Kind
    value: str
    """Hash of the training pairs of the entry."""
    path: Path | None = None
    """Local folder or file of a set or subset."""
    distilled: DistilledSet | None = None
    subset: Coreset | None = None
    pairs: int | None = None
    """Number of random pairs, if it differs from the budget of the run."""
    rates: Literal["learned", "tuned"] = "tuned"
    """Origin of the learning rates: `learned` (stored in the set), or `tuned` (chosen on val) if none are stored."""
    address: str = ""
    """Command-line argument of the entry with an absolute path, so that it is valid in any working folder."""

    @property
    def method(self) -> str:
        if self.distilled is not None:
            return self.distilled.method
        return self.subset.method if self.subset is not None else self.kind


LEASES = (".lock", ".lease")
"""Suffixes of lock files beside run folders; a shell pattern such as `runs/name-*` matches them too."""


def open_entries(words: Iterable[str]) -> list[Entry]:
    """Open an entry for each command-line argument. Raises `ConfigError` that lists all invalid arguments."""
    entries: list[Entry] = []
    mistakes: list[str] = []
    for word in words:
        if Path(word).suffix in LEASES and Path(word).is_file():
            continue
        try:
            entries.append(open_entry(word))
        except (ValueError, OSError) as error:
            mistakes.append(f"{word}: {error}")
    for k, entry in enumerate(entries):
        for other in entries[:k]:
            if (entry.kind, entry.value, entry.pairs) == (other.kind, other.value, other.pairs):
                mistakes.append(f"{entry.address} and {other.address} have the same content; remove one of them")
            elif entry.name == other.name:
                mistakes.append(f"two rows have the name {entry.name}; rename one, as in NAME=FOLDER")
    if not entries and not mistakes:
        mistakes.append("nothing to compare; give folders of distilled sets or subsets, or the words random and full")
    if mistakes:
        raise config.ConfigError(mistakes, "comparison")
    return entries


def open_entry(word: str) -> Entry:
    """Open the entry `[NAME=]FOLDER`, `random`, `random:N` or `full`. Raises `ValueError` for invalid text."""
    if match := re.fullmatch(r"random(?::([1-9]\d*))?|full", word):
        pairs = int(match[1]) if match[1] else None
        return Entry(word, "full" if word == "full" else "random", word, pairs=pairs, address=word)
    named = re.fullmatch(r"([A-Za-z0-9][\w.+ -]*)=(.+)", word)
    name, text = (named[1], named[2]) if named and not Path(word).exists() else ("", word)
    path = _local_path(text)
    address = text.rstrip("/") if is_uri(text) else str(path)
    if (path / "set" / distilled.DESCRIPTION).is_file():
        path, name = path / "set", name or path.name
    default = path.parent.name if path.name == "set" else path.stem if path.is_file() else path.name
    if (path / distilled.DESCRIPTION).is_file():
        full_set = DistilledSet.load(path)
        return Entry(name or default, "set", value_of(full_set), path, full_set, rates="learned", address=address)
    if (path / coreset.DESCRIPTION).is_file():
        subset = Coreset.load(path)
        value = hashlib.sha256(json.dumps(subset.records).encode()).hexdigest()[:16]
        return Entry(name or default, "subset", value, path, subset=subset, address=address)
    tensors = path if path.is_file() else path / distilled.TENSORS
    if tensors.suffix == ".safetensors" and tensors.is_file():
        bare, learned = bare_set(tensors)
        rates: Literal["learned", "tuned"] = "learned" if learned else "tuned"
        value = sha256_file(tensors)[:16]
        return Entry(name or default, "set", value, tensors, bare, rates=rates, address=address)
    raise ValueError(
        f"no {distilled.DESCRIPTION}, {coreset.DESCRIPTION} or {distilled.TENSORS} in this folder; give the folder of "
        "a distilled set, of a finished run or of a subset, or the word random or full"
    )


def _local_path(text: str) -> Path:
    """Return the absolute path of a folder or file; a URI is first copied to a local folder."""
    if not is_uri(text):
        return Path(text).expanduser().absolute()
    parent, _, name = text.rstrip("/").rpartition("/")
    storage = open_storage(config.load({"runtime": {"storage": parent}}).runtime)
    storage.fetch(storage.root / name)
    return storage.root / name


def value_of(set_: DistilledSet) -> str:
    """Return a hash of all parts of a set that affect the training of a student."""
    digest = hashlib.sha256()
    for subset in set_.subsets:
        for name, t in sorted(subset.tensors().items()):
            digest.update(f"{name} {tuple(t.shape)}".encode() + t.contiguous().numpy().tobytes())
        digest.update(repr(subset.alpha).encode())
    digest.update(repr((set_.loss, temperature_of(set_), set_.image_size, set_.mean, set_.std)).encode())
    if set_.order != "sequence":
        digest.update(repr((set_.order, set_.between)).encode())
    return digest.hexdigest()[:16]


def temperature_of(set_: DistilledSet) -> float | None:
    """Return the temperature with which the set was distilled; None if the set does not record it."""
    temperature = set_.config.get("distill", {}).get("temperature")
    return temperature or set_.config.get("model", {}).get("temperature") or set_.model.get("temperature")


def bare_set(path: Path) -> tuple[DistilledSet, bool]:
    """Load a set from a safetensors file without `set.json`; return it and whether it has learning rates.

    Tensors are named `0.images`, `0.texts`, ... as in a distilled set, or `images`, `texts` for a single subset. A
    similarity must be the full matrix (`similarity.matrix` or `similarity`), because the scale of low-rank factors is
    in `set.json`. Raises `ValueError` for other content.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from error
    if not all(name.partition(".")[0].isdigit() for name in tensors):
        tensors = {f"0.{name}": t for name, t in tensors.items()}
    numbers = sorted({int(name.partition(".")[0]) for name in tensors})
    learned = all(f"{k}.{rate}" in tensors for k in numbers for rate in ("lr_image", "lr_text"))
    subsets = []
    for k in numbers:
        named = {n.partition(".")[2]: t.float() for n, t in tensors.items() if n.partition(".")[0] == str(k)}
        named |= {"similarity.matrix": named.pop("similarity")} if "similarity" in named else {}
        allowed = {"images", "texts", "similarity.matrix", "lr_image", "lr_text"}
        if not {"images", "texts"} <= named.keys() <= allowed:
            raise ValueError(
                f"{path} holds {sorted(named)} for subset {k}; it needs images and texts, and may hold {allowed}"
            )
        images, no_names = named["images"], [""] * len(named["images"])
        matrix = {"matrix": named["similarity.matrix"]} if "similarity.matrix" in named else {}
        lr_image, lr_text = (float(named.get(rate, torch.zeros(()))) for rate in ("lr_image", "lr_text"))
        subsets.append(distilled.Subset(images, named["texts"], matrix, 1.0, lr_image, lr_text, no_names, no_names))
    return DistilledSet(tuple(subsets), (), (), model={}, method="tensors", loss="", config={}), learned


def source_run(entry: Entry) -> dict[str, Any] | None:
    """Return the run file of the run that made a set, as a mapping; None if the set does not record it.

    If the set is in the folder of its run, `data.root` and `runtime` come from that folder. Raises `ValueError` if the
    storage of the run has the layout of a different release.
    """
    if entry.distilled is None or not entry.distilled.config or entry.path is None:
        return None
    raw: dict[str, Any] = json.loads(json.dumps(entry.distilled.config))
    if raw.get("distill", {}).get("phases"):
        raw["distill"].pop("plan", None)  # the phases of the plan are already listed
    if entry.path.name != "set":
        return raw
    folder = entry.address.removesuffix("/set") if is_uri(entry.address) else str(entry.path.parent)
    storage, file = locate_file(folder, "run.yaml", depth=1)
    if file.is_file():
        import yaml

        run = yaml.safe_load(file.read_text(encoding="utf-8"))
        raw["data"]["root"] = run["data"]["root"]
        raw["runtime"] = run["runtime"] | {"storage": storage}
    return raw


def misfits(entry: Entry, model: config.Model, image_size: int, reencode: bool) -> list[str]:
    """Return the reasons why a set cannot train students of `model` with images of `image_size` pixels."""
    set_ = entry.distilled
    if set_ is None:
        return []
    wrong, towers = [], set_.model
    if set_.image_size != image_size:
        wrong.append(
            f"was made for images of {set_.image_size} pixels, but students use {image_size}; set data.image_size"
        )
    tower = image_tower_words(model.image.model_dump())
    if towers and (set_tower := image_tower_words(towers["image"])) != tower:
        wrong.append(
            f"was made for the image tower {set_tower}, but students have {tower}; use `rmdd transfer` for other towers"
        )
    if same_text(set_, model.text):
        return [f"{entry.name} {mistake}" for mistake in wrong]
    encoder = towers.get("text", {}).get("name", "unknown")
    if not reencode:
        wrong.append(
            f"was made for the text encoder {encoder} (width {set_.subsets[0].texts.shape[1]}), but students have "
            f"{model.text.name} or a different pooling; give --reencode to embed the nearest real captions again, or "
            "compare encoders with `rmdd transfer`"
        )
    elif not all(caption for subset in set_.subsets for caption in subset.captions):
        wrong.append("has no captions that could be embedded again; give a set that rmdd wrote")
    return [f"{entry.name} {mistake}" for mistake in wrong]


def same_text(set_: DistilledSet, tower: config.TextTower) -> bool:
    """Return whether a set's text embeddings come from the encoder `tower`; without `set.json`, compare only widths."""
    if set_.subsets[0].texts.shape[1] != text_width(tower):
        return False
    if not set_.model:
        return True
    theirs = config.TextTower(**set_.model["text"])
    shape = ["width"] if tower.name == "hashing" else ["pooling", "max_tokens"]
    space = all(getattr(tower, name) == getattr(theirs, name) for name in (*shape, "normalise"))
    return space and set_.model.get("text_encoder") == encoder_identity(tower)


def image_tower_words(tower: Mapping[str, Any]) -> str:
    """Return a text that names the architecture and the initial weights of an image tower."""
    shape = f" {tuple(tower['widths'])} in groups of {tower['groups']}" if tower["name"] == "convnet" else ""
    return f"{tower['name']}{shape} ({tower['weights']})"


def check_data(entry: Entry, data_hash: str) -> list[str]:
    """Return the reason why an entry is not from the dataset with this hash; sets without `set.json` pass."""
    theirs = None
    if entry.distilled is not None:
        data = entry.distilled.provenance.get("data")
        theirs = data.get("hash") if isinstance(data, dict) else None
    elif entry.subset is not None:
        theirs = entry.subset.data_hash
    if theirs in (None, data_hash):
        return []
    return [
        f"{entry.name} was made from different data (hash {theirs}, expected {data_hash}); compare it separately, with "
        "a CONFIG for its data"
    ]


def seconds_of(entry: Entry, storage: Path) -> float | None:
    """Return how many seconds a set's distillation or a subset's selection took; None if this is not recorded."""
    if entry.subset is not None:
        seconds = entry.subset.facts.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None
    if entry.distilled is None:
        return None
    folder = storage / "phases" / str(entry.distilled.provenance.get("phases", ""))
    logs = [folder / f"phase-{p}" / "metrics.jsonl" for p in range(len(entry.distilled.subsets))]
    if not all(log.is_file() for log in logs):
        return None
    lines = [line for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    total: float = sum(json.loads(line)["seconds"] for line in lines)
    return total


def renormalised(images: torch.Tensor, set_: DistilledSet, mean: Iterable[float], std: Iterable[float]) -> torch.Tensor:
    """Return a set's images, normalised with the pixel `mean` and `std` of the images that students are scored on."""
    target = tuple(map(float, mean)), tuple(map(float, std))
    if not set_.mean or target == (set_.mean, set_.std):
        return images
    (mean_, std_), old = target, (set_.mean, set_.std)
    m, s, m0, s0 = (torch.tensor(c)[:, None, None] for c in (mean_, std_, *old))
    return (images * s0 + m0 - m) / s


def with_planned_phases(run: config.Run, where: str) -> config.Run:
    """Return a copy of `run` that lists the phases of its plan.

    The number of updates of students of random pairs follows from the sizes of the phases.

    Raises `ConfigError` if the run has no plan yet, or if it is not yet decided which planned phases are kept.
    """
    if not run.distill.plan.plans:
        return run
    file = run_folder(run) / PLAN
    plan = read_json(file) if file.is_file() else None
    if plan is None or not is_decided(plan):
        found = "planned phases that may still be dropped" if plan else "no planned phases yet"
        mistake = f"the run has {found}; run it first, or give a CONFIG that lists the phases"
        raise config.ConfigError([mistake], where)
    return with_explicit_phases(with_plan(run, plan))
