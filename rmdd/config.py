"""The run file as typed, frozen models: every number of a run is decided here.

This module imports neither torch nor ray. Three kinds of fields never enter a hash, since they say where
things are and not what is computed: `name`, `data.root` and everything under `runtime`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PRESETS = resources.files("rmdd") / "presets"

NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]


class ConfigError(ValueError):
    """Every mistake of a run file at once: one line each, naming the field."""

    def __init__(self, mistakes: Iterable[str], where: str = "run file"):
        self.mistakes = list(mistakes)
        self.where = where
        super().__init__(f"{where}: {len(self.mistakes)} mistake(s)\n" + "\n".join(f"  - {m}" for m in self.mistakes))

    def __reduce__(self):
        return type(self), (self.mistakes, self.where)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class Captions(Section):
    """The papers' caption rule. Turning a part off keeps the caption as it was written."""

    lowercase: bool = True
    strip_punctuation: bool = Field(True, description='replace . ! " ( ) * # : ; ~ by a space')
    max_words: PositiveInt | None = Field(30, description="keep the first words; null keeps all")


class Augment(Section):
    """Training-time augmentation of the experts, in this order. The defaults are the published protocol."""

    crop: bool = Field(True, description="random resized crop, bicubic")
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="probability of a horizontal flip")
    randaugment_ops: Annotated[int, Field(ge=0)] = Field(2, description="operations drawn per image; 0 turns it off")
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = Field(5, description="on a scale of 10")
    randaugment_probability: Annotated[float, Field(ge=0, le=1)] = 0.5

    @property
    def active(self) -> bool:
        return self.crop or self.flip > 0 or self.randaugment_ops > 0


NO_AUGMENT = Augment(crop=False, flip=0.0, randaugment_ops=0)


class Scenes(Section):
    """The built-in source: seeded pictures of coloured shapes with five captions each."""

    train: PositiveInt = 1000
    val: PositiveInt = 200
    test: PositiveInt = 200
    size: Annotated[int, Field(ge=16)] = Field(48, description="side of the square picture in pixels")
    seed: int = 0


class Table(Section):
    """A folder of images plus one CSV, TSV, JSONL or Parquet table."""

    file: str = Field("captions.csv", description="relative to data.root")
    image: str = Field("image", description="column with the path of the image")
    caption: str = Field("caption", description="column with a caption or a list of captions")
    split: str | None = Field("split", description="column with train/val/test; absent or null: cut by hash")


class Data(Section):
    source: Literal["scenes", "karpathy", "lists", "table", "dataset"] = Field(
        "scenes", description="lists: BLIP/LoRS train/val/test files; dataset: a folder that `rmdd ingest` wrote"
    )
    root: str | None = Field(None, description="folder that image paths are relative to; not part of the hash")
    layout: Literal["flickr30k", "flickr8k", "coco", "cc3m"] | None = Field(
        None, description="known file names for `lists` and `karpathy`"
    )
    annotations: str | dict[Literal["train", "val", "test"], str] | None = Field(
        None, description="karpathy: one file; lists: a file per split; relative to root; null: by layout"
    )
    scenes: Scenes = Scenes()
    table: Table = Table()
    split_fractions: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="train, val, test; used where the source has no splits; cut by a hash of the path"
    )
    eval_limit: PositiveInt | None = Field(None, description="first n pairs of val and test (CC3M: 10000)")
    reencode: PositiveInt | None = Field(
        None, description="store images as PNG squashed to this side; null: as they came"
    )
    shard_mb: Annotated[float, Field(gt=0)] = 128
    max_pixels: PositiveInt = Field(89_478_485, description="larger images are quarantined as decompression bombs")
    background: tuple[int, int, int] = Field((255, 255, 255), description="under transparent pixels")
    exif_orientation: bool = Field(False, description="the published loaders ignore it")
    image_size: Annotated[int, Field(ge=8)] = Field(224, description="square side in pixels; aspect ratio is squashed")
    normalise: Literal["clip", "imagenet", "half", "tower"] = Field(
        "clip", description="the papers use CLIP's constants for every tower; `tower` asks the timm model"
    )
    captions: Captions = Captions()

    @model_validator(mode="after")
    def _paths(self) -> Data:
        if self.source in ("karpathy", "lists", "table", "dataset") and self.root is None:
            raise ValueError(f"source '{self.source}' reads files; give data.root (--set data.root=FOLDER)")
        if self.source in ("karpathy", "lists") and self.layout is None and self.annotations is None:
            raise ValueError(f"source '{self.source}' needs data.layout or data.annotations")
        if self.source == "karpathy" and isinstance(self.annotations, dict):
            raise ValueError("source 'karpathy' reads one annotation file; for a file per split use source: lists")
        if self.source == "lists" and isinstance(self.annotations, str):
            raise ValueError(
                "source 'lists' reads a file per split; give annotations: {train: ..., val: ..., test: ...}"
            )
        if any(f < 0 for f in self.split_fractions) or abs(sum(self.split_fractions) - 1) > 1e-6:
            raise ValueError(f"split_fractions must be three shares that sum to 1, found {self.split_fractions}")
        return self


class ImageTower(Section):
    name: str = Field("nfnet_l0", description="a timm model, or `convnet` for the small built-in one")
    weights: str = Field("pretrained", description="pretrained (hub), random, or the path of a local weights file")
    trainable: bool = Field(True, description="false: only the projection on it is trained and matched")
    widths: tuple[PositiveInt, ...] = Field((64, 128, 128), description="convnet: channels of its blocks")
    groups: PositiveInt = Field(8, description="convnet: groups of GroupNorm")
    projection: Literal["none", "linear", "block"] = Field("none", description="trainable head on the image tower")


class TextTower(Section):
    name: str = Field(
        "bert-base-uncased",
        description="hub id or folder of a transformers encoder, `package:MODULE` for one shipped as a package, "
        "or `hashing`, the built-in one that needs no download",
    )
    pooling: Literal["cls", "mean"] = "cls"
    max_tokens: PositiveInt = 64
    normalise: bool = Field(
        False, description="scale embeddings to unit length, as sentence encoders do; BERT's are not"
    )
    width: PositiveInt = Field(512, description="hashing: length of the embedding")
    projection: Literal["linear", "block"] = "block"


class Model(Section):
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    width: PositiveInt | None = Field(None, description="joint width D; null: the image tower's own width")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="inside a `block` projection")
    temperature: PositiveFloat = 0.07

    @model_validator(mode="after")
    def _something_to_train(self) -> Model:
        if not self.image.trainable and self.image.projection == "none":
            raise ValueError(
                "model.image.trainable is false and it has no projection; set model.image.projection: block"
            )
        if self.width is not None and self.image.projection == "none":
            raise ValueError("model.width needs model.image.projection: linear or block, else the tower decides it")
        return self


class Experts(Section):
    """The teacher protocol. Defaults: 20 experts, 10 epochs over caption records, plain SGD, InfoNCE."""

    num: PositiveInt = 20
    epochs: PositiveInt = 10
    batch: Annotated[int, Field(ge=2)] = 128
    lr_image: PositiveFloat = 0.1
    lr_text: PositiveFloat = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.0
    augment: Augment = Augment()
    keep: Literal["all", "endpoints"] = Field("endpoints", description="which epochs stay on disk")
    dtype: Literal["float32", "bfloat16-delta"] = Field(
        "float32", description="bfloat16-delta stores the difference to epoch 0 at half the size"
    )
    seed: int | None = Field(None, description="null: the run's seed")


class Phase(Section):
    """One sub-problem: `pairs` synthetic pairs matched to starts in [start, stop) of a path that ends at `endpoint`."""

    pairs: PositiveInt
    start: Annotated[int, Field(ge=0)] = 0
    stop: PositiveInt = Field(2, description="exclusive upper bound of the start epoch")
    endpoint: PositiveInt = Field(6, description="epoch t_p at which the path ends, inclusive")
    iterations: PositiveInt = 2000


class Similarity(Section):
    kind: Literal["full", "low_rank", "identity"] = "full"
    rank: PositiveInt = Field(10, description="low_rank: columns R of each factor")
    alpha: PositiveFloat = Field(1.0, description="low_rank: S = diag(omega) + alpha/R L R^T")


class Distill(Section):
    method: Literal["ptm_st"] = "ptm_st"
    budget: PositiveInt = Field(100, description="pairs, counted memory-fair: the similarity is paid for in pairs")
    phases: tuple[Phase, ...] = (Phase(pairs=99),)
    budget_check: Literal["error", "warn"] = "error"
    trajectory: Literal["original", "shortcut", "convexified"] = "shortcut"
    endpoint_rule: Literal["inclusive", "exclusive"] = Field(
        "inclusive", description="exclusive reproduces the released buffers, which end one epoch early"
    )
    start_rule: Literal["exclusive", "inclusive"] = Field("exclusive", description="whether `stop` itself may be drawn")
    estimator: Literal["exact", "first_order"] = "exact"
    loss: Literal["wbce", "infonce"] = "wbce"
    similarity: Similarity = Similarity()
    steps: PositiveInt = Field(8, description="inner student steps K")
    match_epochs: PositiveInt = Field(1, description="expert epochs dT between start and target")
    batch: Annotated[int, Field(ge=2)] = Field(20, description="inner mini-batch B")
    branches: Literal["separate", "merged"] = Field(
        "separate", description="separate: one ratio per tower, summed; merged: one ratio over all parameters"
    )
    inner_dropout: Literal["same_mask", "fresh_mask", "off"] = Field(
        "same_mask", description="fresh_mask is what the released code does"
    )
    optimiser: Literal["sgd", "rms"] = Field(
        "sgd",
        description="outer steps; rms divides each gradient by its running size, so that a rate is a step per entry",
    )
    lr_image: NonNegativeFloat = 1000.0
    lr_text: NonNegativeFloat = 1000.0
    lr_similarity: NonNegativeFloat = 10.0
    lr_lr: NonNegativeFloat = Field(1e-2, description="rate of the learnable inner rates")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    inner_lr: PositiveFloat = Field(0.1, description="both inner rates at the start")
    min_inner_lr: NonNegativeFloat | None = Field(None, description="lower clamp of the inner rates; null: none")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="decay of the exported average; 0 exports the raw set"
    )
    init: Literal["real", "noise"] = Field("real", description="what the synthetic set starts from")
    init_augment: bool = Field(False, description="start from augmented pictures, as LoRS does")
    checkpoint_every: PositiveInt = Field(50, description="iterations between checkpoints")
    snapshots: Annotated[int, Field(ge=1)] = Field(
        1, description="how many sets to keep, evenly spaced over the iterations; the last is always one of them"
    )
    seed: int | None = Field(None, description="null: the run's seed")

    @model_validator(mode="after")
    def _possible(self) -> Distill:
        mistakes = []
        if not self.phases:
            mistakes.append("phases is empty; give at least one")
        for p, phase in enumerate(self.phases):
            last = phase.stop - 1 + (self.start_rule == "inclusive")
            limit = phase.endpoint - (self.endpoint_rule == "exclusive")
            if phase.start > last:
                mistakes.append(f"phases.{p}: start range [{phase.start}, {phase.stop}) is empty; raise stop")
            if self.trajectory == "shortcut" and last + self.match_epochs > limit:
                mistakes.append(
                    f"phases.{p}: a start at epoch {last} matched {self.match_epochs} epoch(s) on ends past the "
                    f"endpoint {limit}; set phases.{p}.stop to {limit - self.match_epochs + phase.stop - last} or "
                    "raise its endpoint"
                )
            if phase.pairs < 2:
                mistakes.append(f"phases.{p}.pairs is {phase.pairs}: one pair has no negatives; give at least 2")
            elif self.batch > phase.pairs:
                mistakes.append(
                    f"batch {self.batch} is larger than phases.{p} with its {phase.pairs} pairs; set batch to at most "
                    f"{phase.pairs}"
                )
            if self.similarity.kind == "low_rank" and 2 * self.similarity.rank > phase.pairs:
                mistakes.append(
                    f"phases.{p}: rank {self.similarity.rank} costs more than the full {phase.pairs} x {phase.pairs} "
                    f"matrix; use at most {phase.pairs // 2} or similarity.kind: full"
                )
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


class Evaluate(Section):
    """How students are trained and scored. Choices are made on val; test is read once."""

    students: Annotated[int, Field(ge=1)] = 5
    epochs: PositiveInt = Field(50, description="passes per subset")
    batch: Annotated[int, Field(ge=2)] = 128
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    lr_drop: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="factor applied after half of a subset's passes"
    )
    schedule: Literal["per_subset", "shared"] = Field(
        "per_subset", description="shared: one optimiser for all subsets, one drop"
    )
    lr: Literal["own", "last"] = Field("own", description="each subset's learned rates, or the last subset's for all")
    eval_every: PositiveInt = Field(10, description="passes between scorings on val")
    reference: bool = Field(True, description="also score the papers' protocol, labelled test_best_reference")
    selection: Literal["last", "val_best"] = Field("last", description="which snapshot of the distillation is exported")
    selection_students: PositiveInt = 2
    baseline_lrs: tuple[PositiveFloat, ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), description="rates tried for the random pairs, chosen on val"
    )
    baseline_losses: tuple[Literal["wbce", "infonce"], ...] = Field(
        ("wbce", "infonce"), description="losses tried likewise"
    )
    baseline_draws: PositiveInt = Field(5, description="different random subsets, one per student")
    chunk: PositiveInt = Field(256, description="queries scored at once")
    seed: int | None = Field(None, description="null: the run's seed")


class Runtime(Section):
    """Where and how wide a run goes. Changes no number, so it is left out of every hash."""

    storage: str = Field("runs", description="folder of all runs, stores and caches")
    ray: Literal["on", "off"] = "on"
    address: str | None = Field(None, description="cluster to join; null: RAY_ADDRESS if set, else a local cluster")
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a local cluster; null: all")
    workers: PositiveInt | None = Field(
        None, description="experts, phases or students side by side; null: one per CPU or GPU"
    )
    threads: PositiveInt = Field(1, description="CPU threads per worker; the same bits need the same number")
    loader_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes per expert that decode and augment")
    gpus_per_worker: NonNegativeFloat = 0.0
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="times a dead worker is started again")
    track: Literal["tensorboard", "none"] = "tensorboard"


class Run(Section):
    """A whole run. `rmdd run FILE` turns it into a distilled set and a report."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under runtime.storage")
    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    experts: Experts = Experts()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _fits(self) -> Run:
        mistakes = []
        reach = max((self.endpoint_of(p) for p in range(len(self.distill.phases))), default=0)
        if reach > self.experts.epochs:
            mistakes.append(
                f"distill.phases ask for epoch {reach} but experts are trained for {self.experts.epochs}; "
                f"set experts.epochs to {reach} or lower the endpoints"
            )
        for p, phase in enumerate(self.distill.phases):
            last = phase.stop - 1 + (self.distill.start_rule == "inclusive") + self.distill.match_epochs
            if self.distill.trajectory == "convexified" and last > self.experts.epochs:
                mistakes.append(
                    f"distill.phases.{p} reaches epoch {last} of a path that ends with the experts at "
                    f"{self.experts.epochs}; set distill.phases.{p}.stop to "
                    f"{phase.stop - last + self.experts.epochs} or train longer"
                )
        if self.distill.trajectory == "original" and self.experts.keep == "endpoints":
            mistakes.append("distill.trajectory 'original' reads every epoch; set experts.keep: all")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def endpoint_of(self, phase: int) -> int:
        """The last expert epoch that a phase reads."""
        d, p = self.distill, self.distill.phases[phase]
        if d.trajectory == "convexified":
            return self.experts.epochs
        if d.trajectory == "shortcut":
            return p.endpoint - (d.endpoint_rule == "exclusive")
        return p.stop - 1 + (d.start_rule == "inclusive") + d.match_epochs

    @property
    def endpoints(self) -> tuple[int, ...]:
        """Epochs a store must keep for this run, beside epoch 0; the last one gives the full-data bound."""
        return tuple(sorted({self.endpoint_of(p) for p in range(len(self.distill.phases))} | {self.experts.epochs}))

    def seed_of(self, section: Literal["experts", "distill", "evaluate"]) -> int:
        own = getattr(self, section).seed
        return self.seed if own is None else own

    def hash_of(self, *sections: str) -> str:
        """Hash of the named sections (all that matter when none is named), seeds resolved, places left out."""
        sections = sections or ("data", "model", "experts", "distill", "evaluate")
        value: dict[str, Any] = {}
        for s in sections:
            value[s] = getattr(self, s).model_dump(mode="json")
            if "seed" in value[s]:
                value[s]["seed"] = self.seed_of(s)  # type: ignore[arg-type]
        value.get("data", {}).pop("root", None)
        return hash_value(value)


def hash_value(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def preset_names() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in PRESETS.iterdir() if p.name.endswith(".yaml"))


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Run:
    """Read a run from a preset's name, a YAML file or a mapping, apply `a.b=c` overrides, check all of it.

    >>> load("demo", ["distill.budget=20"])  # doctest: +SKIP

    Raises `ConfigError` with every mistake found.
    """
    where = "run" if isinstance(source, Mapping) else str(source)
    raw = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read(source)
    mistakes: list[str] = []
    for override in overrides:
        _apply(raw, override, mistakes)
    try:
        run = Run.model_validate(raw)
    except ValidationError as error:
        mistakes += [_mistake(e) for e in error.errors()]
    if mistakes:
        raise ConfigError(mistakes, where)
    return run


class _Loader(yaml.SafeLoader):
    """YAML without the words on, off, yes and no for booleans: `ray: off` means the word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _parse(text: str) -> Any:
    return _Loader(text).get_single_data()


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.suffix and not path.exists():
        if str(source) not in preset_names():
            raise ConfigError(
                [f"no preset '{source}'; there are: {', '.join(preset_names())}; or give a YAML file"], str(source)
            )
        text = (PRESETS / f"{source}.yaml").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise ConfigError(
            [f"no such file; give a YAML file or one of the presets: {', '.join(preset_names())}"], str(source)
        )
    try:
        raw = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {' '.join(str(error).split())}"], str(source)) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError([f"expected sections such as `data:` at the top, found a {type(raw).__name__}"], str(source))
    return raw


def _apply(raw: dict[str, Any], override: str, mistakes: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        mistakes.append(f"--set {override}: write it as section.field=value")
        return
    try:
        value = _parse(text)
    except yaml.YAMLError:
        mistakes.append(f"--set {override}: '{text}' is not a YAML value")
        return
    node: Any = raw
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                mistakes.append(f"--set {override}: no entry '{part}' (there are {len(node)})")
                return
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            mistakes.append(f"--set {override}: '{part}' is a value, not a section")
            return
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            mistakes.append(f"--set {override}: no entry '{last}' (there are {len(node)})")
            return
        node[int(last)] = value
    else:
        node[last] = value


def _mistake(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; `rmdd init` writes every key with its meaning"
    message = error["msg"].removeprefix("Value error, ")
    shown = (
        ""
        if isinstance(error.get("input"), dict | BaseModel) or error["type"] == "missing"
        else f", found {error.get('input')!r}"
    )
    return f"{where}: {message}{shown}" if where else message


def dump(run: Run) -> str:
    """The resolved run as YAML; `load` of it gives the same run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True)
