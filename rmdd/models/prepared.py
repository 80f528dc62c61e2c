"""The train, val or test split, ready for use: images, caption embeddings, and the pixel normalisation."""

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
        """Return the images with the numbers `index` on `device`, with pixels normalised by `mean` and `std`."""
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
    """Device that computes caption embeddings which are not in `cache`."""

    def open(self, split: str) -> PreparedSplit:
        """Return the split named `split`, loaded once per process. Raises `ValueError` if the split has no captions."""
        return _open(self, split)


@functools.lru_cache(maxsize=4)
def _open(source: SplitSource, split: str) -> PreparedSplit:
    dataset = Dataset.open(source.dataset)
    return prepare_split(source.data, source.model, dataset, split, source.cache, str(source.device))


def prepare_split(
    data: config.Data, model: config.Model, dataset: Dataset, split: str, cache: Path, device: str = "cpu"
) -> PreparedSplit:
    """Load the split named `split` and its caption embeddings, which are kept in the folder `cache`.

    Images of val and test are decoded now, images of train at the first access. Raises `ValueError` if the split has no
    captions.
    """
    loaded = load_split(dataset, split, data, cache)
    if not loaded.captions:
        raise ValueError(
            f"split '{split}' of the dataset at {dataset.path} holds no pair with a caption; "
            f"see manifest.json and quarantine.jsonl in that folder (counts: {dataset.counts})"
        )
    if split != "train":
        loaded.images  # noqa: B018  # decodes the images once, before workers open this split
    mean, std = normalisation_of(model.image) if data.normalise == "tower" else normalisation(data.normalise)
    return PreparedSplit(loaded, embed(loaded.captions, model.text, cache, device=device), mean, std)
