"""What can be compared: distilled sets, subsets of real pairs, and the words `random`, `random:N` and `full`."""

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
from rmdd.distill.trajectory.planning import PLAN, with_explicit_phases, with_phases
from rmdd.models.text import encoder_identity, text_width

Kind = Literal["set", "subset", "random", "full"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One row of a comparison: what it trains on, and how the user named it."""

    name: str
    kind: Kind
    value: str
    """Hash of what it holds."""
    place: Path | None = None
    distilled: DistilledSet | None = None
    subset: Coreset | None = None
    pairs: int | None = None
    """Of random pairs, where another number than the budget's was asked for."""
    rates: Literal["learned", "tuned"] = "tuned"
    """Real pairs, and bare tensors without rates, have theirs chosen on val."""
    address: str = ""
    """How it was named, from any folder."""

    @property
    def method(self) -> str:
        if self.distilled is not None:
            return self.distilled.method
        return self.subset.method if self.subset is not None else self.kind


LEASES = (".lock", ".lease")
"""Lie beside folders; `runs/name-*` of a shell names them too."""


def open_entries(words: Iterable[str]) -> list[Entry]:
    """Every word as an entry. Raises `ConfigError` with all that cannot be opened."""
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
                mistakes.append(f"{entry.address} and {other.address} hold the same; leave one out")
            elif entry.name == other.name:
                mistakes.append(f"two rows would be called {entry.name}; name one yourself, as in NAME=FOLDER")
    if not entries and not mistakes:
        mistakes.append("nothing to compare; give folders of distilled sets or subsets, or the words random and full")
    if mistakes:
        raise config.ConfigError(mistakes, "comparison")
    return entries


def open_entry(word: str) -> Entry:
    """`[NAME=]FOLDER`, `random`, `random:N` or `full`. Raises ValueError for what is none of these."""
    if match := re.fullmatch(r"random(?::([1-9]\d*))?|full", word):
        pairs = int(match[1]) if match[1] else None
        return Entry(word, "full" if word == "full" else "random", word, pairs=pairs, address=word)
    named = re.fullmatch(r"([A-Za-z0-9][\w.+ -]*)=(.+)", word)
    name, text = (named[1], named[2]) if named and not Path(word).exists() else ("", word)
    place = _here(text)
    address = text.rstrip("/") if is_uri(text) else str(place)
    if (place / "set" / distilled.DESCRIPTION).is_file():
        place, name = place / "set", name or place.name
    usual = place.parent.name if place.name == "set" else place.stem if place.is_file() else place.name
    if (place / distilled.DESCRIPTION).is_file():
        whole = DistilledSet.load(place)
        return Entry(name or usual, "set", value_of(whole), place, whole, rates="learned", address=address)
    if (place / coreset.DESCRIPTION).is_file():
        subset = Coreset.load(place)
        value = hashlib.sha256(json.dumps(subset.records).encode()).hexdigest()[:16]
        return Entry(name or usual, "subset", value, place, subset=subset, address=address)
    tensors = place if place.is_file() else place / distilled.TENSORS
    if tensors.suffix == ".safetensors" and tensors.is_file():
        bare, learned = bare_set(tensors)
        rates: Literal["learned", "tuned"] = "learned" if learned else "tuned"
        value = sha256_file(tensors)[:16]
        return Entry(name or usual, "set", value, tensors, bare, rates=rates, address=address)
    raise ValueError(
        f"nothing there to compare: no {distilled.DESCRIPTION}, {coreset.DESCRIPTION} or {distilled.TENSORS}; give the "
        "folder of a distilled set, of a run that has one, or of a subset, or the word random or full"
    )


def _here(text: str) -> Path:
    """The folder or file that `text` names; what lies at a URI is fetched."""
    if not is_uri(text):
        return Path(text).expanduser().absolute()
    parent, _, name = text.rstrip("/").rpartition("/")
    storage = open_storage(config.load({"runtime": {"storage": parent}}).runtime)
    storage.fetch(storage.root / name)
    return storage.root / name


def value_of(set_: DistilledSet) -> str:
    """Hash of all that a student learns from a set, wherever it lies."""
    digest = hashlib.sha256()
    for subset in set_.subsets:
        for name, t in sorted(subset.tensors().items()):
            digest.update(f"{name} {tuple(t.shape)}".encode() + t.contiguous().numpy().tobytes())
        digest.update(repr(subset.alpha).encode())
    digest.update(repr((set_.loss, temperature_of(set_), set_.image_size, set_.mean, set_.std)).encode())
    return digest.hexdigest()[:16]


def temperature_of(set_: DistilledSet) -> float | None:
    """What the set was distilled with; None when it does not say."""
    own = set_.config.get("distill", {}).get("temperature")
    return own or set_.config.get("model", {}).get("temperature") or set_.model.get("temperature")


def bare_set(path: Path) -> tuple[DistilledSet, bool]:
    """Tensors named as in a distilled set, without its description: `0.images`, `0.texts`, ..., or `images`, `texts`
    for a single subset; and whether they bring learning rates.

    A similarity must be whole (`similarity.matrix`, or `similarity`), for the factors of one lack their scale.
    Raises ValueError for anything else.
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
        own = {n.partition(".")[2]: t.float() for n, t in tensors.items() if n.partition(".")[0] == str(k)}
        own |= {"similarity.matrix": own.pop("similarity")} if "similarity" in own else {}
        allowed = {"images", "texts", "similarity.matrix", "lr_image", "lr_text"}
        if not {"images", "texts"} <= own.keys() <= allowed:
            raise ValueError(
                f"{path} holds {sorted(own)} for subset {k}; it needs images and texts, and may hold {allowed}"
            )
        images, nameless = own["images"], [""] * len(own["images"])
        matrix = {"matrix": own["similarity.matrix"]} if "similarity.matrix" in own else {}
        lr_image, lr_text = (float(own.get(rate, torch.zeros(()))) for rate in ("lr_image", "lr_text"))
        subsets.append(distilled.Subset(images, own["texts"], matrix, 1.0, lr_image, lr_text, nameless, nameless))
    return DistilledSet(tuple(subsets), (), (), model={}, method="tensors", loss="", config={}), learned


def made_by(entry: Entry) -> dict[str, Any] | None:
    """The run file that a set was made by, as a mapping: with its data and storage where its run lies beside it.

    Raises `ValueError` when that run lies in a storage of another layout.
    """
    if entry.distilled is None or not entry.distilled.config or entry.place is None:
        return None
    raw: dict[str, Any] = json.loads(json.dumps(entry.distilled.config))
    if raw.get("distill", {}).get("phases"):
        raw["distill"].pop("plan", None)  # they were planned, and now are what they are
    if entry.place.name != "set":
        return raw
    folder = entry.address.removesuffix("/set") if is_uri(entry.address) else str(entry.place.parent)
    storage, file = locate_file(folder, "run.yaml", depth=1)
    if file.is_file():
        import yaml

        run = yaml.safe_load(file.read_text(encoding="utf-8"))
        raw["data"]["root"] = run["data"]["root"]
        raw["runtime"] = run["runtime"] | {"storage": storage}
    return raw


def misfits(entry: Entry, model: config.Model, image_size: int, reencode: bool) -> list[str]:
    """Why students of `model` that see pictures of `image_size` cannot learn from a set, as far as its files show."""
    set_ = entry.distilled
    if set_ is None:
        return []
    wrong, towers = [], set_.model
    if set_.image_size != image_size:
        wrong.append(f"was made for pictures of {set_.image_size} pixels, students see {image_size}")
    if towers and (its := image_start(towers["image"])) != (ours := image_start(model.image.model_dump())):
        wrong.append(f"was made for the image tower {its}, students have {ours}; `rmdd transfer` is for other towers")
    if same_text(set_, model.text):
        return [f"{entry.name} {each}" for each in wrong]
    encoder = towers.get("text", {}).get("name", "none that it names")
    if not reencode:
        wrong.append(
            f"was made for the text encoder {encoder} (texts of {set_.subsets[0].texts.shape[1]} numbers), "
            f"students have {model.text.name} or pool otherwise; --reencode embeds the nearest real captions anew, "
            "and `rmdd transfer` compares encoders"
        )
    elif not all(caption for subset in set_.subsets for caption in subset.captions):
        wrong.append("has no captions, which its texts would be encoded from anew; give a set that rmdd wrote")
    return [f"{entry.name} {each}" for each in wrong]


def same_text(set_: DistilledSet, ours: config.TextTower) -> bool:
    """Whether a set's texts are of the space of the encoder `ours`; bare tensors are trusted."""
    if set_.subsets[0].texts.shape[1] != text_width(ours):
        return False
    if not set_.model:
        return True
    theirs = config.TextTower(**set_.model["text"])
    shape = ["width"] if ours.name == "hashing" else ["pooling", "max_tokens"]
    space = all(getattr(ours, name) == getattr(theirs, name) for name in (*shape, "normalise"))
    return space and set_.model.get("text_encoder") == encoder_identity(ours)


def image_start(tower: Mapping[str, Any]) -> str:
    """Architecture and starting weights in words."""
    shape = f" {tuple(tower['widths'])} in groups of {tower['groups']}" if tower["name"] == "convnet" else ""
    return f"{tower['name']}{shape} ({tower['weights']})"


def check_data(entry: Entry, data_hash: str) -> list[str]:
    """Why an entry does not belong to the dataset of this hash; bare tensors are trusted."""
    theirs = None
    if entry.distilled is not None:
        data = entry.distilled.provenance.get("data")
        theirs = data.get("hash") if isinstance(data, dict) else None
    elif entry.subset is not None:
        theirs = entry.subset.data_hash
    if theirs in (None, data_hash):
        return []
    return [
        f"{entry.name} was made from other data (hash {theirs}, here {data_hash}); compare it by a CONFIG of its "
        "own data, in a table of its own"
    ]


def seconds_of(entry: Entry, storage: Path) -> float | None:
    """Seconds that it took to make, where that is known: outer updates of a set, the choice of a subset."""
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
    """Pictures of a set in the constants of those that students are scored on; as they are where these are the same."""
    ours = tuple(map(float, mean)), tuple(map(float, std))
    if not set_.mean or ours == (set_.mean, set_.std):
        return images
    (mean_, std_), old = ours, (set_.mean, set_.std)
    m, s, m0, s0 = (torch.tensor(c)[:, None, None] for c in (mean_, std_, *old))
    return (images * s0 + m0 - m) / s


def planned(run: config.Run, where: str) -> config.Run:
    """`run` with its phases listed: those of random pairs make as many updates. Raises `ConfigError` without a plan."""
    if not run.distill.plan.plans:
        return run
    file = run_folder(run) / PLAN
    if not file.is_file():
        mistake = "its phases are planned and it was not run yet; run it, or give a CONFIG that lists its phases"
        raise config.ConfigError([mistake], where)
    return with_explicit_phases(with_phases(run, read_json(file)["phases"]))
