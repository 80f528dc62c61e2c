"""Features of the train split, computed in blocks by an encoder and cached.

The encoder is `tower` (the untrained towers of the run), `expert:N` (expert N), `clip:ID` (a pretrained CLIP model) or
`columns:NAME` (columns of the dataset). An image is encoded once, even if it has several captions. Shapes: n images or
captions of a block, D features of each.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32

from rmdd import config
from rmdd.config.hashing import hashed
from rmdd.core.arrays import in_chunks
from rmdd.core.device import device_of, local_device
from rmdd.core.locks import hold_folder
from rmdd.core.seeding import generator
from rmdd.core.storage import open_storage
from rmdd.core.threads import torch_threads
from rmdd.coresets.choice import Choice
from rmdd.coresets.rows import DESCRIPTION, RowBlock, Rows, write_rows
from rmdd.coresets.spaces import BLOCK, Items, Sides, column_rows, encode_blocks, in_space, save_block
from rmdd.data.decode import decode_as
from rmdd.data.images import normalise
from rmdd.data.splits import read_rows
from rmdd.execution.tasks import Stream, Values
from rmdd.experts.store import Store
from rmdd.models.clip import Clip, clip_part
from rmdd.models.dual import DualEncoder, build
from rmdd.models.image import build_image_tower, image_identity
from rmdd.models.prepared import PreparedSplit, SplitSource
from rmdd.models.text import encoder_identity

BATCH, CLIP_BATCH = 256, 64
"""Number of images or captions per forward pass: BATCH for image towers, CLIP_BATCH for CLIP models."""


@dataclass(frozen=True)
class FeatureSource:
    """The settings that a worker needs to embed the train split of a run; small enough to send to workers."""

    splits: SplitSource
    store: Path
    """Folder with the checkpoints of the experts (the expert store)."""
    epochs: int
    """Number of epochs for which each expert was trained."""
    seed: int
    """Seed with which the experts were trained."""
    runtime: config.Runtime


def features(
    source: FeatureSource, train: PreparedSplit, items: Items, choice: Choice, stream: Stream
) -> tuple[Rows, dict[str, Any], Sides, Path]:
    """Return four results: the features of `items` in the space `choice.space`, all settings that determine these
    features, the image and text features of the train split, and the folder that stores the features of `items`."""
    identity = identity_of(source, train, choice.encoder)
    sides = sides_of(source, train, choice.encoder, stream)
    about: dict[str, Any] = {"space": choice.space, "unit": choice.unit, "dtype": choice.dtype, **identity}
    if choice.unit == "image":
        about["caption"] = choice.caption
        about |= {"draw": config.hash_value(items.record_of.tolist())} if choice.caption == "seeded" else {}
    folder = source.splits.cache / f"features-{config.hash_value(about)}"
    with hold_folder(folder, wait=True):
        if not (folder / DESCRIPTION).is_file():
            blocks = in_space(sides, items, choice)
            first = next(blocks)
            write_rows(folder, itertools.chain([first], blocks), first[1].shape[1], choice.dtype, about)
    return Rows.open(folder), about, sides, folder


def identity_of(source: FeatureSource, train: PreparedSplit, encoder: str) -> dict[str, Any]:
    """Return all values that determine the features that `encoder` computes for the train split."""
    return {"data": train.split.dataset.hash, **encoder_facts(source, encoder)}


def encoder_facts(source: FeatureSource, encoder: str) -> dict[str, Any]:
    """Return all values, except the dataset, on which the features computed by the encoder `encoder` depend."""
    data, model, device = source.splits.data, source.splits.model, device_of(source.runtime).type
    view = hashed(data, "features")
    kind, _, name = encoder.partition(":")
    if kind == "clip":
        clip_view = {name: view[name] for name in ("captions", "background", "exif_orientation")}
        return {"encoder": "clip", "part": clip_part(name).identity(), "device": device, "view": clip_view}
    facts: dict[str, Any] = {
        "encoder": f"expert:{name or 0}" if kind == "expert" else encoder,
        "device": device,
        "view": view,
    }
    if kind == "expert":
        return facts | {"store": source.store.name, "epoch": source.epochs}
    if kind == "tower":
        image = model.image
        facts |= {"image": image_identity(image), "tower": image.model_dump(mode="json", exclude={"projection"})}
        facts |= {"text": encoder_identity(model.text), "texts": model.text.model_dump(mode="json")}
        return facts | ({"seed": source.seed} if image.weights == "random" else {})
    return facts


def sides_of(source: FeatureSource, train: PreparedSplit, encoder: str, stream: Stream) -> Sides:
    """Return the features of all images and captions of `train`. Features that are not in the cache are computed, by
    `stream` in blocks if the encoder is a model."""
    split, identity = train.split, identity_of(source, train, encoder)
    kind, _, name = encoder.partition(":")
    folder = source.splits.cache / f"sides-{config.hash_value(identity)}"
    images, texts = folder / "images", folder / "texts"
    with hold_folder(folder, wait=True):
        if kind == "columns":
            for path, column in ((images, f"image.{name}"), (texts, f"text.{name}")):
                if not (path / DESCRIPTION).is_file():
                    write_rows(path, *column_rows(split, source.splits.data, column), "float32", identity)
        elif kind == "clip":
            clip = clip_part(name).folder()
            of_images = functools.partial(ClipEncoder, source, clip, images, "image")
            of_texts = functools.partial(ClipEncoder, source, clip, texts, "text")
            encode_blocks(images, len(split), of_images, identity, stream)
            encode_blocks(texts, len(train.texts), of_texts, identity, stream)
        else:
            tower = functools.partial(TowerEncoder, source, encoder, images)
            encode_blocks(images, len(split), tower, identity, stream)
            if kind == "expert" and not (texts / DESCRIPTION).is_file():
                write_rows(texts, *_expert_texts(source, int(name or 0), train), "float32", identity)
    embedded = Rows.of(train.texts) if kind == "tower" else Rows.open(texts)
    return Sides(Rows.open(images), embedded, split)


class TowerEncoder:
    """A worker that loads an image tower once; each call encodes one block of images and saves the features."""

    def __init__(self, source: FeatureSource, encoder: str, folder: Path):
        self.train, self.folder, self.threads = source.splits.open("train"), folder, source.runtime.threads
        self.device = local_device(source.runtime)
        kind, _, name = encoder.partition(":")
        if kind == "expert":
            self.encode: Any = trained_expert(source, int(name or 0), self.train).to(self.device).embed_images
        else:
            draw = generator(source.seed, "coreset tower")
            image, size = source.splits.model.image, source.splits.data.image_size
            self.encode = build_image_tower(image, draw, size).eval().to(self.device)

    def __call__(self, values: Values) -> Values:
        split, first = self.train.split, values["block"] * BLOCK
        ids = np.arange(first, min(first + BLOCK, len(split)))
        with torch_threads(self.threads), torch.no_grad():
            rows = in_chunks(self._batch, ids, BATCH)
        save_block(self.folder, values["block"], ids, rows)
        return {"rows": len(ids)}

    def _batch(self, index: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.array(self.train.split.some_images(index))).to(self.device)
        return self.encode(normalise(pixels, self.train.mean, self.train.std)).float().cpu().numpy()


def trained_expert(source: FeatureSource, number: int, train: PreparedSplit) -> DualEncoder:
    """Load expert `number`, as trained after its last epoch, from the run's expert store; return it in eval mode."""
    store = Store.open(source.store)
    open_storage(source.runtime).fetch(store.folder(number))
    if not store.is_complete(number):
        raise ValueError(
            f"expert {number} is not in the expert store at {store.path}, which has the experts {store.complete()}; "
            "choose one of them or raise experts.num"
        )
    size = source.splits.data.image_size
    model = build(source.splits.model, train.texts.shape[1], size, source.seed, "expert", number)
    model.load_trained(store.read(number, store.epochs))
    return model.eval()


def _expert_texts(source: FeatureSource, number: int, train: PreparedSplit) -> tuple[Iterator[RowBlock], int]:
    model = trained_expert(source, number, train)

    def embedded(start: int) -> np.ndarray:
        with torch.no_grad():
            return model.embed_texts(torch.from_numpy(np.array(train.texts[start : start + BLOCK]))).numpy()

    count = len(train.texts)
    width = embedded(0).shape[1]
    return ((np.arange(s, min(s + BLOCK, count)), embedded(s)) for s in range(0, count, BLOCK)), width


class ClipEncoder:
    """A worker that loads a CLIP model once; each call encodes a block of images or captions and saves the features."""

    def __init__(self, source: FeatureSource, clip: Path, folder: Path, side: Literal["image", "text"]):
        self.split, self.folder, self.side = source.splits.open("train").split, folder, side
        self.data, self.threads = source.splits.data, source.runtime.threads
        self.clip = Clip(clip, device_of(source.runtime))

    def __call__(self, values: Values) -> Values:
        first = values["block"] * BLOCK
        ids = np.arange(first, min(first + BLOCK, len(self.split if self.side == "image" else self.split.captions)))
        with torch_threads(self.threads):
            rows = in_chunks(self._rows, ids, CLIP_BATCH)
        if not np.isfinite(rows).all():
            bad = int(ids[~np.isfinite(rows).all(axis=1)][0])
            raise ValueError(
                f"the CLIP model gives non-finite features for {self.side} {bad}; download the model again"
            )
        save_block(self.folder, values["block"], ids, rows)
        return {"rows": len(ids)}

    def _rows(self, ids: np.ndarray) -> Float32[np.ndarray, "n D"]:
        if self.side == "text":
            return self.clip.captions([self.split.captions[i] for i in ids]).cpu().numpy()
        encoded = dict(read_rows(self.split.dataset, "train", self.split.rows[ids]))
        return self.clip.images([decode_as(encoded[int(row)], self.data) for row in self.split.rows[ids]]).cpu().numpy()
