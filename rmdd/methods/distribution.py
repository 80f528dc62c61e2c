"""Methods that match distributions of features: real batches against the synthetic one, with a single-level update.

M pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from rmdd.config.numbers import PositiveFloat, PositiveInt
from rmdd.methods.base import Family, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rmdd.distill.synthetic import Synthetic
    from rmdd.experts.store import Store
    from rmdd.models.dual import DualEncoder
    from rmdd.models.prepared import PreparedSplit


@runtime_checkable
class Objective(Protocol):
    """What a step goes down. All that is drawn depends on iteration and draw alone."""

    def gradient(self, synthetic: Synthetic, iteration: int, draw: int) -> tuple[Synthetic, dict[str, float]]:
        """The gradient of one draw's loss in every tensor of the set, and the loss and its parts by name.

        A part `pace`, the same for all draws of a step, is a factor on the rates of pictures and texts.
        """
        ...

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        """What follows a step, alike on every rank: a move of an online model or of a frequency network."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What it has learned itself, for the checkpoint."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        ...


@dataclass(frozen=True)
class Effort:
    """What a step of a phase takes, all draws together."""

    forward: int
    """Pairs that go through the towers without a graph."""
    back: int
    """Pairs that go through them and whose gradient comes back."""
    at_once: int
    """Pairs with one graph, at most."""
    trained: int = 0
    """Pairs that an online model learns from."""
    models: int = 1
    """Sets of trained parameters that are held."""
    numbers: int = 0
    """What else is held beside the set."""

    @property
    def pairs(self) -> int:
        return self.forward + self.back + self.trained


class DistributionMethod(Method, ABC):
    """A recipe on the distribution-matching loop (`rmdd.distill.distribution.matching`)."""

    family: ClassVar[Family] = "distribution"

    class Options(Method.Options):
        """What all methods of the family have; they add their own."""

        draws: PositiveInt = Field(
            1,
            description="draws whose gradients a step averages; workers share them, with the same bits",
        )
        clip: PositiveFloat | None = Field(None, description="joint norm that the gradient is cut to; null: none")

    options: Options

    def records(self, phase: int, train: PreparedSplit, store: Store | None = None) -> list[int]:
        """The caption records that a phase starts from; the experts of `store` are there."""
        return super().records(phase, train)

    @abstractmethod
    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> Objective:
        """What the steps of a phase go down."""

    def effort(self, phase: int, records: int) -> Effort:
        """What a step takes of so many caption records; for estimates and for the pace that is told."""
        pairs = self.rule.phases[phase].pairs
        return Effort(0, self.options.draws * pairs, pairs)

    def exported(self, synthetic: Synthetic) -> Synthetic:
        """What students get of the set that was learned: its texts as (M, F) embeddings."""
        return synthetic
