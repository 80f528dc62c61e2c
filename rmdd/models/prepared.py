"""A split ready for training or evaluation: images, caption embeddings, and the mean and deviation of pixels."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from rmdd import config
from rmdd.data.images import normalisation, normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split, load_split
from rmdd.models.image import normalisation_of
from rmdd.models.text import embed

Constants = tuple[float, float, float]


@dataclass(frozen=True)
class PreparedSplit:
    split: Split
    texts: np.ndarray
    """Caption embeddings (T, F), float32, in the order of `split.captions`."""
    mean: Constants
    std: Constants

    def pictures(self, index: np.ndarray, device: torch.device | str = "cpu") -> Float[torch.Tensor, "n 3 S S"]:
        """Return the images at `index`, normalised, on `device`."""
        pixels = torch.from_numpy(np.array(self.split.some_images(index)))
        return normalise(pixels.to(device), self.mean, self.std)


@dataclass(frozen=True)
class SplitSource:
    """The settings from which any process can open the splits of a run; small enough to send to workers."""

    dataset: Path
    cache: Path
    data: config.Data
    model: config.Model
    device: torch.device
    """The device that embeds captions which are not cached."""

    def open(self, split: str) -> PreparedSplit:
        """Return a split; each process loads it once. Raises `ValueError` if it is empty."""
        return _open(self, split)


@functools.lru_cache(maxsize=4)
def _open(source: SplitSource, split: str) -> PreparedSplit:
    dataset = Dataset.open(source.dataset)
    return prepare_split(source.data, source.model, dataset, split, source.cache, str(source.device))


def prepare_split(
    data: config.Data, model: config.Model, dataset: Dataset, split: str, cache: Path, device: str = "cpu"
) -> PreparedSplit:
    """Load a split and its caption embeddings, from the cache if possible.

    Images of val and test are decoded now, and images of train at the first access. Raises `ValueError` if it is empty.
    """
    loaded = load_split(dataset, split, data, cache)
    if not loaded.captions:
        raise ValueError(
            f"split '{split}' of the dataset at {dataset.path} holds no pair with a caption; "
            f"see its manifest.json and quarantine.jsonl (counts: {dataset.counts})"
        )
    if split != "train":
        loaded.images  # noqa: B018  # decodes the images once, before workers open this split
    mean, std = normalisation_of(model.image) if data.normalise == "tower" else normalisation(data.normalise)
    return PreparedSplit(loaded, embed(loaded.captions, model.text, cache, device=device), mean, std)
