"""The dual encoder and how experts are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rmdd.config.hashing import Purpose, hash_only
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.runfile import Clash, Section


class ImageTower(Section):
    name: str = Field("nfnet_l0", description="a timm model, or `convnet` for the small built-in one")
    weights: str = Field(
        "pretrained",
        description="pretrained (hub), the path of a local weights file, random (drawn anew for every expert and "
        "student), or random:SEED (drawn once, the same start for all, as a pretrained tower is)",
    )
    trainable: bool = Field(True, description="false: only the projection on it is trained and matched")
    widths: tuple[PositiveInt, ...] = Field((64, 128, 128), description="convnet: channels of its blocks")
    groups: PositiveInt = Field(8, description="convnet: groups of GroupNorm")
    projection: Literal["none", "linear", "block"] = Field("none", description="trainable head on the image tower")

    @property
    def is_random(self) -> bool:
        """Whether it starts from random weights, drawn anew or once for all."""
        return self.weights == "random" or self.weights.startswith("random:")

    def clashes(self) -> list[Clash]:
        seed = self.weights.removeprefix("random:")
        if seed != self.weights and not seed.isdecimal():
            text = f"model.image.weights is {self.weights}; write random:SEED with a whole number, such as random:0"
            return [Clash(text, "model.image.weights")]
        return []


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

    def clashes(self) -> list[Clash]:
        found = []
        if not self.image.trainable and self.image.projection == "none":
            text = "model.image.trainable is false and it has no projection; set model.image.projection: block"
            found.append(Clash(text, "model.image.trainable", "model.image.projection"))
        if self.width is not None and self.image.projection == "none":
            text = "model.width needs model.image.projection: linear or block, else the tower decides it"
            found.append(Clash(text, "model.width", "model.image.projection"))
        return found


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


class Shuffle(Section):
    """The order of an epoch, drawn anew for every expert and epoch. Either order has the same bits from the cache and
    from a stream; a stream reads each picture once per epoch if windowed, and once per window if global."""

    kind: Literal["global", "windowed"] = Field(
        "global",
        description="global: all records in one permutation; windowed: blocks of pairs in random order, and the "
        "records of `window` blocks at a time shuffled",
    )
    block: PositiveInt = Field(256, description="consecutive pairs that stay together; a pair is read with its block")
    window: PositiveInt = Field(8, description="blocks that are mixed; a stream holds the pictures of one window")

    @property
    def pairs(self) -> int:
        """Pairs of one window."""
        return self.block * self.window


class WorkerGroup(Section):
    """Workers that train one expert together. The batch is split over them and the loss is that of the whole batch."""

    workers: PositiveInt = Field(1, description="workers per expert, each with `runtime.gpus_per_worker` and `threads`")
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        "ddp",
        description="ddp: every worker holds all of it; zero1, zero2, zero3 (DeepSpeed): momentum, gradients too, "
        "weights too lie in parts",
    )


class Experts(Section):
    """The teacher protocol. Defaults: 20 experts, 10 epochs over caption records, plain SGD, InfoNCE."""

    num: PositiveInt = Field(
        20, description="trajectories to train, each from its own seed", json_schema_extra=hash_only("run")
    )
    epochs: PositiveInt = Field(10, description="passes over all caption records; the length of a trajectory")
    batch: Annotated[int, Field(ge=2)] = Field(128, description="caption records per step")
    lr_image: PositiveFloat = Field(0.1, description="constant rate of the image tower")
    lr_text: PositiveFloat = Field(0.1, description="constant rate of the text projection")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of SGD; 0 is plain SGD")
    weight_decay: NonNegativeFloat = Field(0.0, description="of SGD, on every parameter")
    augment: Augment = Augment()
    shuffle: Shuffle = Shuffle()
    worker_group: WorkerGroup = WorkerGroup()
    keep: Literal["all", "endpoints"] | tuple[PositiveInt, ...] = Field(
        "endpoints",
        description="epochs that stay on disk; a list, such as [6, 8, 10], lets runs with other endpoints share them",
    )
    dtype: Literal["float32", "bfloat16-delta"] = Field(
        "float32", description="bfloat16-delta stores the difference to epoch 0 at half the size"
    )
    forgetting: Annotated[int, Field(ge=0)] = Field(
        0,
        description="records of a fixed pool that all are scored against after every epoch, to count forgetting events "
        "for a coreset (1000 to 4000); 0: not counted; changes no number of an expert",
    )
    seed: int | None = Field(None, description="null: the run's seed")

    def clashes(self) -> list[Clash]:
        mistakes = []
        group = self.worker_group
        if self.batch < group.workers:
            text = (
                f"experts.batch {self.batch} cannot be split over experts.worker_group.workers {group.workers}; "
                "raise it"
            )
            mistakes.append(Clash(text, "experts.batch", "experts.worker_group.workers"))
        if group.workers > 1 and group.strategy != "ddp" and self.momentum:
            text = (
                f"experts.momentum {self.momentum} lies in parts under experts.worker_group.strategy {group.strategy}, "
                "and cannot be resumed from; set it to 0, or the strategy to ddp"
            )
            mistakes.append(Clash(text, "experts.momentum", "experts.worker_group.strategy", "workers"))
        return mistakes

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """What changes nothing as it is set: stores that are older than it stay valid."""
        idle = {"shuffle": self.shuffle.kind == "global", "worker_group": self.worker_group.workers == 1}
        idle["forgetting"] = not self.forgetting
        return tuple(name for name, is_idle in idle.items() if is_idle)
