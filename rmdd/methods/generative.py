"""Methods that cluster, pick and decode: no loop over the set, and pairs that carry real strings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from rmdd import config
from rmdd.config.recipes import Family
from rmdd.config.runfile import Clash
from rmdd.generate.studio import Studio
from rmdd.methods.base import OF_PATHS, BaseMethod, Need
from rmdd.models import pretrained

OF_STEPS = (
    *("precision", "optimiser", "lr_image", "lr_text", "momentum", "min_inner_lr", "ema", "init_augment"),
    *("checkpoint_every", "snapshots"),
)
"""Fields of `distill` that only methods with outer updates read."""


class GenerativeMethod(BaseMethod, ABC):
    """A recipe on features, prototypes and decoders (`rmdd.generate`)."""

    family: ClassVar[Family] = "generative"
    needs: ClassVar[tuple[Need, ...]] = ("features", "diffusion")
    iterates: ClassVar[bool] = False

    @classmethod
    def clashes_of_family(cls, rule: config.Distill, experts: config.Experts, runtime: config.Runtime) -> list[Clash]:
        mistakes = super().clashes_of_family(rule, experts, runtime)
        asked = {"init": rule.init != "real", "stored_size": rule.stored_size, "skip_above": rule.skip_above}
        mistakes += [
            Clash(f"distill.{name} is not for {rule.method}; leave it out", f"distill.{name}")
            for name, set_ in asked.items()
            if set_
        ]
        return mistakes + [
            Clash(
                f"distill.phases.{p}.iterations: {rule.method} makes its pairs once; set it to 1",
                "distill.phases.iterations",
            )
            for p, phase in enumerate(rule.phases)
            if phase.iterations != 1
        ]

    @classmethod
    def idle_fields(cls) -> tuple[str, ...]:
        return OF_PATHS + OF_STEPS

    def faults(self) -> list[str]:
        """What can be known to keep its parts from working, a line each; asks a hub, downloads nothing."""
        return pretrained.faults(self.parts())

    def uncounted(self) -> list[str]:
        return ["features, training and drawing by pretrained parts are not counted"]

    def is_finished(self, phase: int, folder: Path) -> bool:
        """Its set comes last."""
        return (folder / f"set-{self.rule.phases[phase].iterations:06d}.safetensors").is_file()

    @abstractmethod
    def make(self, studio: Studio, phase: int) -> None:
        """Make the pairs of a phase, those that are not there, and leave them by `studio.finish`."""
