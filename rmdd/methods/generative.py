"""Base class of generative methods: images come from a decoder, captions are strings, and no loop updates the set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from rmdd import config
from rmdd.config.recipes import Family
from rmdd.config.runfile import Clash
from rmdd.generate.studio import Studio
from rmdd.methods.base import TRAJECTORY_FIELDS, BaseMethod, Need
from rmdd.models import pretrained

UPDATE_FIELDS = (
    *("precision", "optimiser", "lr_image", "lr_text", "momentum", "min_inner_lr", "ema", "init_augment"),
    *("checkpoint_every", "snapshots"),
)
"""Fields of `distill` that are read only by methods with an update loop."""


class GenerativeMethod(BaseMethod, ABC):
    """A method that builds pairs from features, prototypes and decoders (`rmdd.generate`)."""

    family: ClassVar[Family] = "generative"
    needs: ClassVar[tuple[Need, ...]] = ("features", "diffusion")
    iterates: ClassVar[bool] = False

    @classmethod
    def clashes_of_family(cls, rule: config.Distill, experts: config.Experts, runtime: config.Runtime) -> list[Clash]:
        mistakes = super().clashes_of_family(rule, experts, runtime)
        changed = {"init": rule.init != "real", "stored_size": rule.stored_size, "skip_above": rule.skip_above}
        mistakes += [
            Clash(f"distill.{name} has no effect with method {rule.method}; remove it", f"distill.{name}")
            for name, is_set in changed.items()
            if is_set
        ]
        return mistakes + [
            Clash(
                f"distill.phases.{p}.iterations: {rule.method} makes its pairs in one pass; set it to 1",
                "distill.phases.iterations",
            )
            for p, phase in enumerate(rule.phases)
            if phase.iterations != 1
        ]

    @classmethod
    def idle_fields(cls) -> tuple[str, ...]:
        return TRAJECTORY_FIELDS + UPDATE_FIELDS

    def faults(self) -> list[str]:
        """Check the pretrained models by queries to the hub, without a download; return one message per problem."""
        return pretrained.faults(self.parts())

    def uncounted(self) -> list[str]:
        return ["computing features, fine-tuning and image generation with pretrained models are not counted"]

    def is_finished(self, phase: int, folder: Path) -> bool:
        """Return whether the phase's set exists; it is the last file that a phase writes."""
        return (folder / f"set-{self.rule.phases[phase].iterations:06d}.safetensors").is_file()

    @abstractmethod
    def make(self, studio: Studio, phase: int) -> None:
        """Make the pairs of a phase, except those that an earlier try saved. Save the full set with `studio.finish`."""
