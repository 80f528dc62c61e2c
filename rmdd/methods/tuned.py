"""Base class of generative methods that train a model before they generate images.

The training is one task with checkpoints. Runs that differ only in budget or sampling share the trained model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rmdd import config
from rmdd.config.hashing import NUMBERS_VERSION
from rmdd.core.device import device_of
from rmdd.core.storage import open_storage
from rmdd.data.splits import squashed
from rmdd.execution.tasks import Interrupted
from rmdd.generate.stable_diffusion import latent_shape
from rmdd.generate.studio import Studio
from rmdd.generate.tuning import Trainer, is_tuned
from rmdd.methods.base import Need
from rmdd.methods.generative import GenerativeMethod
from rmdd.models.prepared import PreparedSplit


class TunedMethod(GenerativeMethod):
    """A generative method that trains a model. The model's folder is named by a hash of all inputs of the training."""

    needs: ClassVar[tuple[Need, ...]] = ("diffusion",)

    class Options(GenerativeMethod.Options):
        generator: str = Field(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            description="Stable Diffusion pipeline: hub id, id@revision, or a folder written by save_pretrained",
        )

    @property
    @abstractmethod
    def checkpoint_every(self) -> int:
        """Number of training updates between two checkpoints."""

    @abstractmethod
    def shapes(self) -> dict[str, Any]:
        """Return the options that determine the trained weights; they are hashed with data, models and seed."""

    @abstractmethod
    def updates(self, captions: int) -> int:
        """Return the number of training updates for a dataset of `captions` captions; 0 means no training."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the image sizes, in pixels, that the diffusion model must support, by the option that sets each."""

    def faults(self) -> list[str]:
        faults, generator = super().faults(), self.parts()[0]
        for option, size in () if generator.missing_files() else self.sizes().items():
            try:
                latent_shape(generator.folder(), size)
            except ValueError as error:
                faults.append(f"distill.options.{option}: {error}")
        return faults

    @abstractmethod
    def trainer(self, train: PreparedSplit, device: torch.device) -> Trainer:
        """Return the trainer that runs the training updates (a class of `rmdd.generate.tuning`)."""

    def tuned_folder(self, root: Path, data: str) -> Path:
        """Return the folder of the trained model below the storage folder `root`; `data` is the hash of the dataset."""
        view = self.run.hashed("data", "features")
        facts = {
            "version": [NUMBERS_VERSION, type(self).version],
            "method": type(self).__name__,
            "device": device_of(self.run.runtime).type,
            "data": data,
            "view": {n: view[n] for n in ("captions", "background", "exif_orientation")},
            "parts": [part.identity() for part in self.parts() if part.role != "captioner"],
            "seed": self.seed,
            **self.shapes(),
        }
        return root / "tuned" / config.hash_value(facts)

    def folder_of(self, studio: Studio) -> Path:
        return self.tuned_folder(studio.root, studio.train.split.dataset.hash)

    def tuned(self, studio: Studio) -> Path | None:
        """Train the model unless the storage holds it already; return its folder, or None if `updates` is 0."""
        total = self.updates(len(studio.train.split.captions))
        if not total:
            return None
        folder, storage = self.folder_of(studio), open_storage(self.run.runtime)
        storage.fetch(folder)
        if not is_tuned(folder):
            if not studio.tune(total):
                raise Interrupted
            storage.fetch(folder)
        return folder

    def pictures(self, train: PreparedSplit) -> Callable[[list[int], int], Tensor]:
        """Return a function of caption records and a side S; it returns their images squashed to uint8 (B, 3, S, S)."""
        split, data = train.split, self.run.data

        def images_of(records: list[int], size: int) -> Tensor:
            images = split.image_of[records]
            if size == data.image_size:
                return torch.from_numpy(np.array(split.some_images(images)))
            sized = data.model_copy(update={"image_size": size})
            return torch.from_numpy(np.stack([squashed(split.encoded(int(i)), sized) for i in images]))

        return images_of

    def before(self, phase: int, count: Callable[[int], int]) -> int:
        """Return the number of captions that the phases before `phase` draw; `count` maps pairs to captions.

        All phases share one sequence of drawn captions; the captions of `phase` begin at the returned index.
        """
        return sum(count(p.pairs) for p in self.rule.phases[:phase])
