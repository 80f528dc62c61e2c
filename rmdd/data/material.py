"""One split ready to train or score on: pictures, the embeddings of its captions, and the pixel constants."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rmdd import config
from rmdd.data.images import normalisation, normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split, load_split
from rmdd.models.image import normalisation_of
from rmdd.models.text import embed

Constants = tuple[float, float, float]


@dataclass(frozen=True)
class Material:
    split: Split
    texts: np.ndarray
    """Caption embeddings (T, F), float32, in the order of `split.captions`."""
    mean: Constants
    std: Constants

    def pictures(self, index: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Some pictures (n,3,S,S), normalised."""
        pixels = torch.from_numpy(np.array(self.split.some_images(index)))
        return normalise(pixels.to(device), self.mean, self.std)


def load_material(run: config.Run, dataset: Dataset, split: str, cache: Path, device: str = "cpu") -> Material:
    """Embed one split, or read it from the cache. Pictures of `train` are decoded when they are asked for."""
    loaded = load_split(dataset, split, run.data, cache)
    if not loaded.captions:
        raise ValueError(
            f"split '{split}' of the dataset at {dataset.path} holds no pair with a caption; "
            f"see its manifest.json and quarantine.jsonl (counts: {dataset.counts})"
        )
    if split != "train":
        loaded.images  # noqa: B018  # decoded once here, before every worker would
    mean, std = (
        normalisation_of(run.model.image) if run.data.normalise == "tower" else normalisation(run.data.normalise)
    )
    return Material(loaded, embed(loaded.captions, run.model.text, cache, device=device), mean, std)
