"""The distribution-matching loop of one phase: draw, compare features, average gradients, clip, update, checkpoint.

A step trains no student. A teacher computes features of real and of synthetic pairs, and the step follows the gradient
of a loss that compares both. The gradient is averaged over several random draws. With `size` workers, worker (rank) k
computes the draws k, k + size, ... The average is taken in the order of the draws, so results are bit-identical for any
number of workers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rmdd import config
from rmdd.core.files import read_json, write_json
from rmdd.distill.loop import State, Step, outer_step, run_phase
from rmdd.distill.sets import save_set
from rmdd.distill.synthetic import Synthetic
from rmdd.execution.parts import LocalParts, WorkerParts
from rmdd.experts.store import Store
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit

LossParts = dict[str, float]
"""Loss values of one random draw by name: its loss under the key `loss`, and the terms of this loss."""


@runtime_checkable
class Objective(Protocol):
    """The loss that a step minimises. The random choices of the loss depend only on the iteration and the draw."""

    def gradient(self, synthetic: Synthetic, iteration: int, draw: int) -> tuple[Synthetic, dict[str, float]]:
        """Compute the loss of one draw; return its gradient for every tensor of the set, and the loss terms by name.

        One term may be called `pace`: the step multiplies the learning rates of images and texts by this number, which
        must be the same in all draws of a step.
        """
        ...

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        """Update the online model or frequency network after a step; every worker makes the same update."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the objective has learned, to save them in the checkpoint."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors that `tensors` returned earlier."""
        ...


@runtime_checkable
class Averaged(Protocol):
    """Interface that a distribution-matching method implements; see `rmdd.methods.distribution.DistributionMethod`."""

    run: config.Run
    options: Any
    """Options of the distillation method; they must have the fields `draws` and `clip`."""

    def records(self, phase: int, train: PreparedSplit, store: Store | None = None) -> list[int]: ...

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic: ...

    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> Objective: ...

    def exported(self, synthetic: Synthetic) -> Synthetic: ...


class Rank:
    """A worker that computes its share of the draws of every step."""

    def __init__(
        self,
        method: Averaged,
        phase: int,
        store: Store,
        model: DualEncoder,
        train: PreparedSplit,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
    ):
        self.objective = method.objective(phase, store, train, model, device)
        self.device, self.draws = device, range(rank, method.options.draws, size)

    def gradient(self, synthetic: Synthetic, iteration: int) -> list[tuple[Synthetic, LossParts]]:
        """Compute this worker's random draws of a step; return the gradient and loss terms of each draw, in order."""
        local = synthetic.map(lambda t: t.to(self.device))
        results = (self.objective.gradient(local, iteration, draw) for draw in self.draws)
        return [(gradient.map(lambda t: t.to(synthetic.images.device)), parts) for gradient, parts in results]

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        self.objective.after(synthetic.map(lambda t: t.to(self.device)), iteration)

    def tensors(self) -> dict[str, Tensor]:
        return {n: t.detach().cpu() for n, t in self.objective.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.objective.load({n: t.to(self.device) for n, t in tensors.items()})


class Averaging:
    """Computes the updates of a phase (a `Stepper` of `rmdd.distill.loop`): the clipped mean gradient of all draws."""

    def __init__(self, method: Averaged, ranks: WorkerParts, device: torch.device):
        self.rule, self.options = method.run.distill, method.options
        self.ranks, self.device = ranks, device
        self.in_process = isinstance(ranks, LocalParts)
        self.learns = bool(self.learned())

    def step(self, state: State) -> Step:
        by_rank = self.ranks.call("gradient", self._sent(state.raw), state.iteration)
        by_draw = [by_rank[draw % len(by_rank)][draw // len(by_rank)] for draw in range(self.options.draws)]
        gradient, parts = mean([(g.map(lambda t: t.to(self.device)), p) for g, p in by_draw])
        gradient, norm = clipped(gradient, self.options.clip)
        pace = parts.get("pace", 1.0)
        paced = {"lr_image": pace * self.rule.lr_image, "lr_text": pace * self.rule.lr_text}
        return Step(
            before=state,
            after=outer_step(state, gradient, self.rule.model_copy(update=paced)),
            loss=norm.new_tensor(parts.pop("loss")),
            numbers={"grad_norm": norm},
            facts=parts,
        )

    def accept(self, state: State) -> None:
        if self.learns:
            self.ranks.call("after", self._sent(state.raw), state.iteration - 1)

    def learned(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = self.ranks.call("tensors")[0]
        return tensors

    def restore(self, learned: dict[str, Tensor]) -> None:
        if self.learns:
            self.ranks.call("load", {n: t.cpu() for n, t in learned.items()})

    def _sent(self, synthetic: Synthetic) -> Synthetic:
        return synthetic if self.in_process else synthetic.map(Tensor.cpu)


def mean(results: list[tuple[Synthetic, LossParts]]) -> tuple[Synthetic, LossParts]:
    """Return the gradient and the loss terms as means over all random draws, summed in the order of `results`."""
    first, count = results[0][0], len(results)
    if count == 1:
        return first, dict(results[0][1])
    total = {n: t.clone() for n, t in first.tensors().items()}
    for gradient, _ in results[1:]:
        for name, t in gradient.tensors().items():
            total[name] += t
    mean_parts = {name: sum(parts[name] for _, parts in results) / count for name in results[0][1]}
    return first.with_tensors({n: t / count for n, t in total.items()}), mean_parts


def clipped(gradient: Synthetic, limit: float | None) -> tuple[Synthetic, Tensor]:
    """Clip the joint norm of all gradient tensors to `limit`; return the clipped gradient and the unclipped norm."""
    norm = torch.stack([torch.linalg.vector_norm(t) for t in gradient.tensors().values()]).norm()
    if limit is None:
        return gradient, norm
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_ uses the same formula
    return gradient.map(lambda t: t * factor), norm


def distill_phase(
    method: Averaged,
    phase: int,
    store: Store,
    model: DualEncoder,
    train: PreparedSplit,
    folder: Path,
    device: torch.device,
    key: str,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: WorkerParts | None = None,
) -> bool:
    """Distil one phase by matching distributions; see `rmdd.distill.loop.run_phase`.

    Two files are written if they are missing: `records.json` (the initial caption records) and `start.safetensors` (the
    initial set, as exported for students). `ranks` are workers that hold one `Rank` each; if it is None, this process
    computes all draws. Several draws are always averaged on the CPU, so the result does not depend on the devices.
    """
    place = device if method.options.draws == 1 else torch.device("cpu")
    record_file, start = folder / "records.json", folder / "start.safetensors"
    if not record_file.is_file():
        write_json(record_file, method.records(phase, train, store))
    initial = method.initial(phase, train, read_json(record_file))
    if not start.is_file():
        save_set(method.exported(initial), start)

    def stepper(initial: Synthetic) -> Averaging:
        return Averaging(method, ranks or LocalParts([Rank(method, phase, store, model, train, device)]), place)

    return run_phase(
        method.run.distill, phase, initial, folder, place, key, stepper, on_step, should_stop, method.exported
    )
