"""The run file as typed, frozen models: every number of a run is decided here.

This module imports neither torch nor ray. Three kinds of fields never enter a hash, since they say where
things are and not what is computed: `name`, `data.root` and everything under `runtime`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from rmdd.runfile import PRESETS as PRESETS
from rmdd.runfile import ConfigError as ConfigError
from rmdd.runfile import Section, apply, hash_value, read, validate
from rmdd.runfile import preset_names as preset_names

NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Captions(Section):
    """The papers' caption rule. Turning a part off keeps the caption as it was written."""

    lowercase: bool = Field(True, description="turn captions to lower case")
    strip_punctuation: bool = Field(True, description='replace . ! " ( ) * # : ; ~ by a space')
    max_words: PositiveInt | None = Field(30, description="keep the first words; null keeps all")


class Augment(Section):
    """Training-time augmentation of the experts, in this order. The defaults are the published protocol."""

    crop: bool = Field(True, description="random resized crop, bicubic")
    crop_scale: tuple[float, float] = Field(
        (0.5, 1.0), description="least and largest share of the area that a crop keeps"
    )
    crop_ratio: tuple[float, float] = Field((0.75, 4 / 3), description="least and largest width over height of a crop")
    flip: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="probability of a horizontal flip")
    randaugment_ops: Annotated[int, Field(ge=0)] = Field(2, description="operations drawn per image; 0 turns it off")
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = Field(5, description="on a scale of 10")
    randaugment_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="chance that a drawn operation is applied"
    )

    @property
    def active(self) -> bool:
        return self.crop or self.flip > 0 or self.randaugment_ops > 0


NO_AUGMENT = Augment(crop=False, flip=0.0, randaugment_ops=0)


class Scenes(Section):
    """The built-in source: seeded pictures of coloured shapes with five captions each."""

    train: PositiveInt = Field(1000, description="pictures to train on")
    val: PositiveInt = Field(200, description="pictures for every choice")
    test: PositiveInt = Field(200, description="pictures for the final score")
    size: Annotated[int, Field(ge=16)] = Field(48, description="side of the square picture in pixels")
    seed: int = Field(0, description="another seed draws other pictures")


class Table(Section):
    """A folder of images plus one CSV, TSV, JSONL or Parquet table."""

    file: str = Field("captions.csv", description="relative to data.root")
    image: str = Field("image", description="column with the path of the image")
    caption: str = Field("caption", description="column with a caption or a list of captions")
    split: str | None = Field("split", description="column with train/val/test; absent or null: cut by hash")


class Annotations(Section):
    """A file per split, relative to data.root."""

    train: str | None = Field(None, description="the list to train on")
    val: str | None = Field(None, description="the list for every choice")
    test: str | None = Field(None, description="the list for the final score")

    def clashes(self) -> list[str]:
        return [] if self.files else ["data.annotations is empty; give {train: ..., val: ..., test: ...}"]

    @property
    def files(self) -> dict[str, str]:
        return {split: file for split, file in self if file is not None}


class Data(Section):
    source: Literal["scenes", "karpathy", "lists", "table", "dataset"] = Field(
        "scenes", description="lists: BLIP/LoRS train/val/test files; dataset: a folder that `rmdd ingest` wrote"
    )
    root: str | None = Field(None, description="folder that image paths are relative to; not part of the hash")
    layout: Literal["flickr30k", "flickr8k", "coco", "cc3m"] | None = Field(
        None, description="known file names for `lists` and `karpathy`"
    )
    annotations: str | Annotations | None = Field(
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
    shard_mb: Annotated[float, Field(gt=0)] = Field(128, description="size in MiB at which a shard is closed")
    max_pixels: PositiveInt = Field(89_478_485, description="larger images are quarantined as decompression bombs")
    background: tuple[int, int, int] = Field((255, 255, 255), description="under transparent pixels")
    exif_orientation: bool = Field(False, description="the published loaders ignore it")
    image_size: Annotated[int, Field(ge=8)] = Field(224, description="square side in pixels; aspect ratio is squashed")
    normalise: Literal["clip", "imagenet", "half", "tower"] = Field(
        "clip", description="the papers use CLIP's constants for every tower; `tower` asks the timm model"
    )
    captions: Captions = Captions()

    def clashes(self) -> list[str]:
        source, found = self.source, []
        if source in ("karpathy", "lists", "table", "dataset") and self.root is None:
            found.append(f"source '{source}' reads files; give data.root (--set data.root=FOLDER)")
        if source in ("karpathy", "lists") and self.layout is None and self.annotations is None:
            found.append(f"source '{source}' needs data.layout or data.annotations")
        if source == "karpathy" and isinstance(self.annotations, Annotations):
            found.append("source 'karpathy' reads one data.annotations file; for a file per split use source: lists")
        if source == "lists" and isinstance(self.annotations, str):
            found.append(
                "source 'lists' reads a file per split; give data.annotations: {train: ..., val: ..., test: ...}"
            )
        if any(f < 0 for f in self.split_fractions) or abs(sum(self.split_fractions) - 1) > 1e-6:
            found.append(f"data.split_fractions must be three shares that sum to 1, found {self.split_fractions}")
        return found


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
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="embedding of a caption: the first token's state, or the mean over its tokens"
    )
    max_tokens: PositiveInt = Field(64, description="longer captions are cut")
    normalise: bool = Field(
        False, description="scale embeddings to unit length, as sentence encoders do; BERT's are not"
    )
    width: PositiveInt = Field(512, description="hashing: length of the embedding")
    projection: Literal["linear", "block"] = Field(
        "block", description="trainable head on the embeddings; block: two linear layers with a skip"
    )


class Model(Section):
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    width: PositiveInt | None = Field(None, description="joint width D; null: the image tower's own width")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="inside a `block` projection")
    temperature: PositiveFloat = Field(0.07, description="cosines are divided by it before a loss")

    def clashes(self) -> list[str]:
        found: list[str] = []
        if not self.image.trainable and self.image.projection == "none":
            found.append("model.image.trainable is false and it has no projection; set model.image.projection: block")
        if self.width is not None and self.image.projection == "none":
            found.append("model.width needs model.image.projection: linear or block, else the tower decides it")
        return found


class Experts(Section):
    """The teacher protocol. Defaults: 20 experts, 10 epochs over caption records, plain SGD, InfoNCE."""

    num: PositiveInt = Field(20, description="trajectories to train, each from its own seed")
    epochs: PositiveInt = Field(10, description="passes over all caption records; the length of a trajectory")
    batch: Annotated[int, Field(ge=2)] = Field(128, description="caption records per step")
    lr_image: PositiveFloat = Field(0.1, description="constant rate of the image tower")
    lr_text: PositiveFloat = Field(0.1, description="constant rate of the text projection")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of SGD; 0 is plain SGD")
    weight_decay: NonNegativeFloat = Field(0.0, description="of SGD, on every parameter")
    augment: Augment = Augment()
    keep: Literal["all", "endpoints"] = Field("endpoints", description="which epochs stay on disk")
    dtype: Literal["float32", "bfloat16-delta"] = Field(
        "float32", description="bfloat16-delta stores the difference to epoch 0 at half the size"
    )
    seed: int | None = Field(None, description="null: the run's seed")


class Phase(Section):
    """One sub-problem: `pairs` synthetic pairs matched to starts in [start, stop) of a path that ends at `endpoint`."""

    pairs: PositiveInt = Field(description="synthetic pairs M of this phase")
    start: Annotated[int, Field(ge=0)] = Field(0, description="first epoch at which a student may start")
    stop: PositiveInt = Field(2, description="exclusive upper bound of the start epoch")
    endpoint: PositiveInt = Field(6, description="epoch t_p at which the path ends, inclusive")
    iterations: PositiveInt = Field(2000, description="outer updates")


class Similarity(Section):
    kind: Literal["full", "low_rank", "identity"] = Field(
        "full", description="target similarity of a subset: an M x M matrix, its factors, or fixed at the identity"
    )
    rank: PositiveInt = Field(10, description="low_rank: columns R of each factor")
    alpha: PositiveFloat = Field(1.0, description="low_rank: S = diag(omega) + alpha/R L R^T")


class Distill(Section):
    method: Literal["ptm_st"] = Field("ptm_st", description="the recipe; its switches are the fields below")
    budget: PositiveInt = Field(100, description="pairs, counted memory-fair: the similarity is paid for in pairs")
    phases: tuple[Phase, ...] = Field(
        (Phase(pairs=99),), description="sub-problems, in the order in which students learn from them"
    )
    budget_check: Literal["error", "warn"] = Field(
        "error", description="what happens when the phases cost more than the budget"
    )
    trajectory: Literal["original", "shortcut", "convexified"] = Field(
        "shortcut",
        description="path of targets: the epochs as trained, the shortcut to the endpoint, or to the last epoch",
    )
    endpoint_rule: Literal["inclusive", "exclusive"] = Field(
        "inclusive", description="exclusive reproduces the released buffers, which end one epoch early"
    )
    start_rule: Literal["exclusive", "inclusive"] = Field("exclusive", description="whether `stop` itself may be drawn")
    estimator: Literal["exact", "first_order"] = Field(
        "exact", description="meta-gradient; first_order, as published, leaves out how a step moves the next"
    )
    loss: Literal["wbce", "infonce"] = Field("wbce", description="loss of the student's steps, here and in evaluation")
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
    optimiser: Literal["sgd", "normalised"] = Field(
        "sgd",
        description="outer steps; normalised divides each gradient by its size, so that a rate is a step per entry",
    )
    lr_image: NonNegativeFloat = Field(1000.0, description="outer rate of the pictures; 0 keeps them as they start")
    lr_text: NonNegativeFloat = Field(1000.0, description="outer rate of the text embeddings")
    lr_similarity: NonNegativeFloat = Field(10.0, description="outer rate of the similarity")
    lr_lr: NonNegativeFloat = Field(1e-2, description="rate of the learnable inner rates")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="of the outer steps")
    inner_lr: PositiveFloat = Field(0.1, description="both inner rates at the start")
    inner_lr_text: PositiveFloat | None = Field(None, description="the text side's at the start; null: as inner_lr")
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

    def clashes(self) -> list[str]:
        mistakes = []
        if not self.phases:
            mistakes.append("distill.phases is empty; give at least one")
        for p, phase in enumerate(self.phases):
            this = f"distill.phases.{p}"
            last = phase.stop - 1 + (self.start_rule == "inclusive")
            limit = phase.endpoint - (self.endpoint_rule == "exclusive")
            if phase.start > last:
                mistakes.append(f"{this}: start range [{phase.start}, {phase.stop}) is empty; raise stop")
            if self.trajectory == "shortcut" and last + self.match_epochs > limit:
                stop = limit - self.match_epochs + phase.stop - last
                mistakes.append(
                    f"{this}: a start at epoch {last} matched {self.match_epochs} epoch(s) on ends past the endpoint "
                    f"{limit}; set {this}.stop to {stop} or raise its endpoint"
                )
            if phase.pairs < 2:
                mistakes.append(f"{this}.pairs is {phase.pairs}: one pair has no negatives; give at least 2")
            elif self.batch > phase.pairs:
                mistakes.append(
                    f"distill.batch {self.batch} is larger than {this} with its {phase.pairs} pairs; set batch to at "
                    f"most {phase.pairs}"
                )
            if self.similarity.kind == "low_rank" and 2 * self.similarity.rank > phase.pairs:
                mistakes.append(
                    f"{this}: rank {self.similarity.rank} costs more than the full {phase.pairs} x {phase.pairs} "
                    f"matrix; use at most {phase.pairs // 2} or distill.similarity.kind: full"
                )
        return mistakes


class Evaluate(Section):
    """How students are trained and scored. Choices are made on val; test is read once."""

    students: Annotated[int, Field(ge=1)] = Field(
        5, description="fresh models trained on the set; mean and spread are over them"
    )
    epochs: PositiveInt = Field(50, description="passes per subset")
    batch: Annotated[int, Field(ge=2)] = Field(128, description="pairs per step; a smaller subset is one batch")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    weight_decay: NonNegativeFloat = Field(5e-4, description="of SGD, on every parameter")
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
    selection_students: PositiveInt = Field(
        2, description="students per snapshot, and random draws per rate and loss, that a choice on val is made by"
    )
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
    """Where and how wide a run goes; in no hash. Only `threads` and a GPU change bits, by rounding alone."""

    storage: str = Field("runs", description="folder of all runs, stores and caches")
    ray: Literal["on", "off"] = Field("on", description="off: everything in turn in this process, with the same bits")
    address: str | None = Field(None, description="cluster to join; null: RAY_ADDRESS if set, else a local cluster")
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a local cluster; null: all")
    workers: PositiveInt | None = Field(
        None, description="experts, phases or students side by side; null: one per CPU or GPU"
    )
    threads: PositiveInt = Field(1, description="CPU threads per worker; the same bits need the same number")
    loader_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes per expert that decode and augment")
    gpus_per_worker: NonNegativeFloat = Field(0.0, description="share of a GPU that each worker gets; 0: CPUs")
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="times a dead worker is started again")
    track: Literal["tensorboard", "none"] = Field(
        "tensorboard", description="where the curves of a distillation go, beside metrics.jsonl"
    )


class Run(Section):
    """A whole run. `rmdd run FILE` turns it into a distilled set and a report."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under runtime.storage")
    seed: int = Field(0, description="seed of every section that has none of its own")
    data: Data = Data()
    model: Model = Model()
    experts: Experts = Experts()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    def clashes(self) -> list[str]:
        mistakes = []
        image = self.model.image
        if not image.trainable and image.weights == "random":
            mistakes.append(
                "model.image.trainable is false and its weights are random, so they would never be learned; set "
                "model.image.weights to pretrained (a timm model) or a weights file, or trainable: true"
            )
        if image.name == "convnet" and image.weights == "pretrained":
            mistakes.append("convnet has no pretrained weights; set model.image.weights to random or a weights file")
        if image.name == "convnet" and self.data.normalise == "tower":
            mistakes.append("convnet has no normalisation of its own; set data.normalise to clip, imagenet or half")
        reach = max((self.endpoint_of(p) for p in range(len(self.distill.phases))), default=0)
        if reach > self.experts.epochs:
            mistakes.append(
                f"distill.phases ask for epoch {reach} but experts are trained for {self.experts.epochs}; "
                f"set experts.epochs to {reach} or lower the endpoints"
            )
        for p, phase in enumerate(self.distill.phases):
            last = phase.stop - 1 + (self.distill.start_rule == "inclusive") + self.distill.match_epochs
            if self.distill.trajectory == "convexified" and last > self.experts.epochs:
                stop = phase.stop - last + self.experts.epochs
                mistakes.append(
                    f"distill.phases.{p} reaches epoch {last} of a path that ends with the experts at "
                    f"{self.experts.epochs}; set distill.phases.{p}.stop to {stop} or train longer"
                )
        if self.distill.trajectory == "original" and self.experts.keep == "endpoints":
            mistakes.append("distill.trajectory 'original' reads every epoch; set experts.keep: all")
        return mistakes

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


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Run:
    """Read a run from a preset's name, a YAML file or a mapping, apply `a.b=c` overrides, check all of it.

    >>> load("demo", ["distill.budget=20"])  # doctest: +SKIP

    Raises `ConfigError` with every mistake found.
    """
    where = "run" if isinstance(source, Mapping) else str(source)
    raw = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else read(source)
    mistakes: list[str] = []
    defaults = Run().model_dump(mode="json")
    for override in overrides:
        apply(raw, override, defaults, mistakes)
    run, wrong = validate(Run, raw)
    if run is None or mistakes or wrong:
        raise ConfigError(mistakes + wrong, where)
    return run


def dump(run: Run) -> str:
    """The resolved run as YAML; `load` of it gives the same run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True)
