"""Base class of distribution-matching methods: the set learns features that resemble those of real batches.

The update is single-level: no student is trained inside a step. M is the number of distilled pairs.
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
    """Work and memory of one step of a phase, summed over the draws of the step; used by cost estimates."""

    forward: int
    """Number of pairs that go through the towers without gradients."""
    back: int
    """Number of pairs that go through the towers forward and backward."""
    at_once: int
    """Largest number of pairs in one autograd graph."""
    trained: int = 0
    """Number of real pairs on which an online model is trained in the step."""
    models: int = 1
    """Number of copies of the trained parameters held in memory."""
    numbers: int = 0
    """Number of floats held in memory in addition to the distilled set."""

    @property
    def pairs(self) -> int:
        return self.forward + self.back + self.trained


class DistributionMethod(BaseMethod, ABC):
    """A method that runs in the distribution-matching loop (`rmdd.distill.distribution.matching`)."""

    family: ClassVar[Family] = "distribution"

    class Options(BaseMethod.Options):
        """Options of all distribution-matching methods; each method adds more."""

        draws: PositiveInt = Field(
            1,
            description="number of random draws per step, whose gradients are averaged; any number of workers gives "
            "the same bits",
        )
        clip: PositiveFloat | None = Field(
            None,
            description="largest norm of the joint gradient of images and texts; a larger gradient is scaled down to "
            "this norm; null: no clipping",
        )

    options: Options

    def records(self, phase: int, train: PreparedSplit, store: Store | None = None) -> list[int]:
        """Return the indices of the caption records whose pairs initialise a phase; `store` holds trained experts."""
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
        terms = {name: name.removeprefix("loss_").replace("_", " ") for name in logged if name.startswith("loss_")}
        return [("loss", {"loss": ""}, None), ("loss terms", terms, None), ("gradient norm", {"grad_norm": ""}, None)]

    def pairs_of_step(self, phase: int, train: Callable[[], PreparedSplit]) -> int:
        return self.effort(phase, len(train().split.captions)).pairs

    @abstractmethod
    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> Objective:
        """Return the objective of a phase; each update of the set uses the gradient of the objective's loss."""

    def effort(self, phase: int, records: int) -> Effort:
        """Return the work and memory of one step on a dataset of `records` captions, for the estimate of costs."""
        pairs = self.rule.phases[phase].pairs
        return Effort(0, self.options.draws * pairs, pairs)

    def exported(self, synthetic: Synthetic) -> Synthetic:
        """Return the distilled set as students are trained on it: texts are (M, F) embeddings."""
        return synthetic
