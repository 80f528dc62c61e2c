"""Generative methods that train something before they draw: one task with checkpoints, shared by runs that differ
in budget or sampling alone."""

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
    """What is trained lies in the storage under the hash of all that shapes it."""

    needs: ClassVar[tuple[Need, ...]] = ("diffusion",)

    class Options(GenerativeMethod.Options):
        generator: str = Field(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            description="Stable Diffusion pipeline: hub id, id@revision, or a folder written by save_pretrained",
        )

    @property
    @abstractmethod
    def checkpoint_every(self) -> int:
        """Updates between checkpoints."""

    @abstractmethod
    def shapes(self) -> dict[str, Any]:
        """What shapes the training beside data, parts and seed."""

    @abstractmethod
    def updates(self, captions: int) -> int:
        """Steps of the training over so many captions; 0 when nothing is trained."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Sides of the pictures that its first part, the generator, encodes and draws, by option."""

    def faults(self) -> list[str]:
        found, generator = super().faults(), self.parts()[0]
        for option, size in () if generator.missing_files() else self.sizes().items():
            try:
                latent_shape(generator.folder(), size)
            except ValueError as error:
                found.append(f"distill.options.{option}: {error}")
        return found

    @abstractmethod
    def trainer(self, train: PreparedSplit, device: torch.device) -> Trainer:
        """Who trains, see `rmdd.generate.tuning`."""

    def tuned_folder(self, root: Path, data: str) -> Path:
        """Where it lies in the storage `root`, for data of that hash."""
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
        """The folder of what was trained, after it was; None when nothing is."""
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
        """Gives the pictures of caption records as uint8 (B, 3, S, S), squashed to the side asked for."""
        split, data = train.split, self.run.data

        def some(records: list[int], size: int) -> Tensor:
            images = split.image_of[records]
            if size == data.image_size:
                return torch.from_numpy(np.array(split.some_images(images)))
            sized = data.model_copy(update={"image_size": size})
            return torch.from_numpy(np.stack([squashed(split.encoded(int(i)), sized) for i in images]))

        return some

    def before(self, phase: int, count: Callable[[int], int]) -> int:
        """`count` of the pairs of all earlier phases, added up: phases share one draw and take their parts of it."""
        return sum(count(p.pairs) for p in self.rule.phases[:phase])
