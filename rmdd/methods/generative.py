"""Methods that cluster, pick and decode: no loop over the set, and pairs that carry real strings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from rmdd.methods.base import Family, Method, Need

if TYPE_CHECKING:
    from rmdd.generate.studio import Studio
    from rmdd.models.pretrained import PretrainedModel


class GenerativeMethod(Method, ABC):
    """A recipe on features, prototypes and decoders (`rmdd.generate`)."""

    family: ClassVar[Family] = "generative"
    needs: ClassVar[tuple[Need, ...]] = ("features", "diffusion")

    def parts(self) -> list[PretrainedModel]:
        """The pretrained parts that it asks for."""
        return []

    def faults(self) -> list[str]:
        """What can be known to keep its parts from working, a line each; asks a hub, downloads nothing."""
        from rmdd.models import pretrained as parts

        return parts.faults(self.parts())

    @abstractmethod
    def make(self, studio: Studio, phase: int) -> None:
        """Make the pairs of a phase, those that are not there, and leave them by `studio.finish`."""
