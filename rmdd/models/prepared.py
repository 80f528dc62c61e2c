"""A split that is ready to train or score on: its pictures, the embeddings of its captions, and the pixel constants."""

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
        """Some pictures, normalised."""
        pixels = torch.from_numpy(np.array(self.split.some_images(index)))
        return normalise(pixels.to(device), self.mean, self.std)


@dataclass(frozen=True)
class SplitSource:
    """Where the splits of a run are read from, and how models see them. It is small enough to be sent to a worker."""

    dataset: Path
    cache: Path
    data: config.Data
    model: config.Model
    device: torch.device
    """Where captions are embedded that are not in the cache."""

    def open(self, split: str) -> PreparedSplit:
        """A split, which a process loads once. Raises `ValueError` when it is empty."""
        return _open(self, split)


@functools.lru_cache(maxsize=4)
def _open(source: SplitSource, split: str) -> PreparedSplit:
    dataset = Dataset.open(source.dataset)
    return prepare_split(source.data, source.model, dataset, split, source.cache, str(source.device))


def prepare_split(
    data: config.Data, model: config.Model, dataset: Dataset, split: str, cache: Path, device: str = "cpu"
) -> PreparedSplit:
    """Embed one split, or read it from the cache. Pictures of `train` are decoded when they are asked for."""
    loaded = load_split(dataset, split, data, cache)
    if not loaded.captions:
        raise ValueError(
            f"split '{split}' of the dataset at {dataset.path} holds no pair with a caption; "
            f"see its manifest.json and quarantine.jsonl (counts: {dataset.counts})"
        )
    if split != "train":
        loaded.images  # noqa: B018  # decoded once here, before every worker would
    mean, std = normalisation_of(model.image) if data.normalise == "tower" else normalisation(data.normalise)
    return PreparedSplit(loaded, embed(loaded.captions, model.text, cache, device=device), mean, std)
