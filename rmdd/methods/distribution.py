"""Methods that match distributions of features: real batches against the synthetic one, with a single-level update.

M pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rmdd.config.numbers import PositiveFloat, PositiveInt
from rmdd.config.recipes import Family
from rmdd.distill.distribution.matching import Objective, Rank, distill_phase
from rmdd.distill.synthetic import Synthetic
from rmdd.experts.store import Store
from rmdd.methods.base import BaseMethod, Curves
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit

if TYPE_CHECKING:
    import torch

    from rmdd.execution.parts import WorkerParts


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


class DistributionMethod(BaseMethod, ABC):
    """A recipe on the distribution-matching loop (`rmdd.distill.distribution.matching`)."""

    family: ClassVar[Family] = "distribution"

    class Options(BaseMethod.Options):
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

    def distil(
        self,
        phase: int,
        store: Store,
        model: DualEncoder,
        train: Callable[[], PreparedSplit],
        folder: Path,
        device: torch.device,
        key: str,
        on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
        should_stop: Callable[[], bool] = lambda: False,
        ranks: WorkerParts | None = None,
    ) -> bool:
        return distill_phase(self, phase, store, model, train(), folder, device, key, on_step, should_stop, ranks)

    @property
    def draws(self) -> int:
        return self.options.draws

    def part_of_step(
        self,
        phase: int,
        store: Store,
        model: DualEncoder,
        train: PreparedSplit,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
    ) -> Rank:
        return Rank(self, phase, store, model, train, device, rank, size)

    def curves(self, logged: Iterable[str]) -> list[Curves]:
        parts = {name: name.removeprefix("loss_").replace("_", " ") for name in logged if name.startswith("loss_")}
        return [("loss", {"loss": ""}, None), ("its parts", parts, None), ("gradient norm", {"grad_norm": ""}, None)]

    def pairs_of_step(self, phase: int, train: Callable[[], PreparedSplit]) -> int:
        return self.effort(phase, len(train().split.captions)).pairs

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
