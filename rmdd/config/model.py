"""The sections `model` (the dual encoder) and `experts` (how experts are trained)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rmdd.config.hashing import Purpose, hash_only
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.runfile import Clash, Section


class ImageTower(Section):
    """The image encoder of a dual encoder."""

    name: str = Field("nfnet_l0", description="name of a timm model, or convnet (a small built-in network)")
    weights: str = Field(
        "pretrained",
        description="initial weights: pretrained (from the hub), the path of a local file, random (a new draw for "
        "every expert and student), or random:SEED (the same draw for all)",
    )
    trainable: bool = Field(True, description="false: freeze the tower, so that only its projection is trained")
    widths: tuple[PositiveInt, ...] = Field(
        (64, 128, 128), description="number of channels of each block; only for convnet"
    )
    groups: PositiveInt = Field(8, description="number of channel groups in GroupNorm; only for convnet")
    projection: Literal["none", "linear", "block"] = Field("none", description="trainable projection after the tower")

    @property
    def is_random(self) -> bool:
        """Whether the initial weights are random: `random` or `random:SEED`."""
        return self.weights == "random" or self.weights.startswith("random:")

    def clashes(self) -> list[Clash]:
        seed = self.weights.removeprefix("random:")
        if seed != self.weights and not seed.isdecimal():
            text = f"model.image.weights is {self.weights}; the seed must be a whole number, such as random:0"
            return [Clash(text, "model.image.weights")]
        return []


class TextTower(Section):
    """The text encoder of a dual encoder; it is always frozen."""

    name: str = Field(
        "bert-base-uncased",
        description="hub id or folder of a transformers encoder, package:MODULE for one in a Python package, or "
        "hashing (built in, needs no download)",
    )
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="embedding of a caption: cls (hidden state of the first token) or mean (over all tokens)"
    )
    max_tokens: PositiveInt = Field(64, description="number of tokens after which a caption is cut")
    normalise: bool = Field(
        False, description="scale embeddings to unit length, as sentence encoders do (BERT does not)"
    )
    width: PositiveInt = Field(512, description="width of the embedding; only for the encoder `hashing`")
    projection: Literal["linear", "block"] = Field(
        "block", description="trainable projection of the embeddings; block: two linear layers with a skip connection"
    )


class Model(Section):
    """The dual encoder of experts and students."""

    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    width: PositiveInt | None = Field(
        None, description="width D of the joint embedding; null: the width of the image tower"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="dropout rate in a block projection")
    temperature: PositiveFloat = Field(0.07, description="temperature by which cosines are divided in the loss")

    def clashes(self) -> list[Clash]:
        mistakes = []
        if not self.image.trainable and self.image.projection == "none":
            text = (
                "model.image.trainable is false and model.image.projection is none, so nothing is trained on the image "
                "side; set model.image.projection: block"
            )
            mistakes.append(Clash(text, "model.image.trainable", "model.image.projection"))
        if self.width is not None and self.image.projection == "none":
            text = (
                "model.width is set, but without a projection the width is that of the image tower; set "
                "model.image.projection: linear or block, or model.width: null"
            )
            mistakes.append(Clash(text, "model.width", "model.image.projection"))
        return mistakes


class Augment(Section):
    """Augmentations of the experts' training images, applied in the order of the fields; defaults are the papers'."""

    crop: bool = Field(True, description="apply a random resized crop (bicubic)")
    crop_scale: tuple[float, float] = Field(
        (0.5, 1.0), description="smallest and largest area of a crop, as a share of the area of the image"
    )
    crop_ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), description="smallest and largest aspect ratio (width / height) of a crop"
    )
    flip: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="probability of a horizontal flip")
    randaugment_ops: Annotated[int, Field(ge=0)] = Field(
        2, description="number of RandAugment operations drawn per image; 0: none"
    )
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = Field(
        5, description="strength of the RandAugment operations, from 0 to 10"
    )
    randaugment_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="probability that a drawn RandAugment operation is applied"
    )

    @property
    def active(self) -> bool:
        return self.crop or self.flip > 0 or self.randaugment_ops > 0


NO_AUGMENT = Augment(crop=False, flip=0.0, randaugment_ops=0)


class Shuffle(Section):
    """Order of the caption records in training, drawn anew for every expert and epoch; cached and streamed images have
    the same order. Streamed images are read once per epoch with `windowed`, once per window with `global`."""

    kind: Literal["global", "windowed"] = Field(
        "global",
        description="global: one permutation of all caption records; windowed: blocks of pairs in random order, and "
        "the records of each `window` consecutive blocks shuffled together",
    )
    block: PositiveInt = Field(256, description="number of consecutive pairs that are read together")
    window: PositiveInt = Field(
        8, description="number of blocks that are shuffled together; streaming keeps their images in memory"
    )

    @property
    def pairs(self) -> int:
        """Number of pairs in one window (`window` blocks of `block` pairs)."""
        return self.block * self.window


class WorkerGroup(Section):
    """Several workers that train one expert together: they share each batch; the loss is that of the whole batch."""

    workers: PositiveInt = Field(
        1, description="workers per expert, each with runtime.gpus_per_worker GPUs and runtime.threads threads"
    )
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        "ddp",
        description="ddp: every worker keeps the whole model; zero1, zero2 and zero3: DeepSpeed splits the momentum "
        "over the workers (zero1), also the gradients (zero2), also the weights (zero3)",
    )


class Experts(Section):
    """Training of the experts by InfoNCE and SGD. A caption record is an image with one of its captions."""

    num: PositiveInt = Field(
        20, description="number of experts, each trained with its own seed", json_schema_extra=hash_only("run")
    )
    epochs: PositiveInt = Field(10, description="number of epochs over all caption records (trajectory length)")
    batch: Annotated[int, Field(ge=2)] = Field(128, description="number of caption records per training step")
    lr_image: PositiveFloat = Field(0.1, description="constant learning rate of the image tower")
    lr_text: PositiveFloat = Field(0.1, description="constant learning rate of the text projection")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="momentum of SGD")
    weight_decay: NonNegativeFloat = Field(0.0, description="weight decay of SGD, on every parameter")
    augment: Augment = Augment()
    shuffle: Shuffle = Shuffle()
    worker_group: WorkerGroup = WorkerGroup()
    keep: Literal["all", "endpoints"] | tuple[PositiveInt, ...] = Field(
        "endpoints",
        description="epochs that stay on disk: all; endpoints (those that this run needs); or a list, such as [6, 8], "
        "so that runs with different endpoints can share the experts",
    )
    dtype: Literal["float32", "bfloat16-delta"] = Field(
        "float32", description="format of stored epochs; bfloat16-delta: their difference to epoch 0, at half the size"
    )
    forgetting: Annotated[int, Field(ge=0)] = Field(
        0,
        description="for the coreset method forgetting: number of caption records (1000 to 4000) in a fixed pool with "
        "which all records are scored after every epoch to count forgetting events; 0: no count; experts stay the same",
    )
    seed: int | None = Field(None, description="random seed of the experts; null: the run's seed")

    def clashes(self) -> list[Clash]:
        mistakes = []
        group = self.worker_group
        if self.batch < group.workers:
            text = (
                f"experts.batch {self.batch} cannot be split over experts.worker_group.workers {group.workers}; raise "
                "experts.batch"
            )
            mistakes.append(Clash(text, "experts.batch", "experts.worker_group.workers"))
        if group.workers > 1 and group.strategy != "ddp" and self.momentum:
            text = (
                f"experts.worker_group.strategy {group.strategy} splits the momentum over the workers, and such an "
                f"expert cannot be resumed; set experts.momentum {self.momentum} to 0, or the strategy to ddp"
            )
            mistakes.append(Clash(text, "experts.momentum", "experts.worker_group.strategy", "workers"))
        return mistakes

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Leave the fields of unused options out of the hash, so that older stores without these fields stay valid."""
        idle = {"shuffle": self.shuffle.kind == "global", "worker_group": self.worker_group.workers == 1}
        idle["forgetting"] = not self.forgetting
        return tuple(name for name, is_idle in idle.items() if is_idle)
