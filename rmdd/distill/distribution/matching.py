"""The distribution-matching loop of one phase: draw, compare features, average the draws, clip, step, checkpoint.

A step is single-level: the gradient of a loss between features of real and synthetic pairs under a teacher, with no
student between. One rank makes draws k, k + size, ...; they are averaged in the order of draws, so that any number of
ranks gives the same bits.
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

Told = dict[str, float]
"""A loss and its parts by name."""


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


@runtime_checkable
class Averaged(Protocol):
    """What matching asks of a method; `rmdd.methods.distribution.DistributionMethod` has it."""

    run: config.Run
    options: Any
    """Has `draws` and `clip`."""

    def records(self, phase: int, train: PreparedSplit, store: Store | None = None) -> list[int]: ...

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic: ...

    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> Objective: ...

    def exported(self, synthetic: Synthetic) -> Synthetic: ...


class Rank:
    """One of those who share the draws of every step."""

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
        self.device, self.own = device, range(rank, method.options.draws, size)

    def gradient(self, synthetic: Synthetic, iteration: int) -> list[tuple[Synthetic, Told]]:
        """Of its own draws, in order."""
        here = synthetic.map(lambda t: t.to(self.device))
        made = (self.objective.gradient(here, iteration, draw) for draw in self.own)
        return [(gradient.map(lambda t: t.to(synthetic.images.device)), told) for gradient, told in made]

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        self.objective.after(synthetic.map(lambda t: t.to(self.device)), iteration)

    def tensors(self) -> dict[str, Tensor]:
        return {n: t.detach().cpu() for n, t in self.objective.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.objective.load({n: t.to(self.device) for n, t in tensors.items()})


class Averaging:
    """The updates of a phase, as `rmdd.distill.loop` takes them: mean gradients of ranks, clipped together."""

    def __init__(self, method: Averaged, ranks: WorkerParts, device: torch.device):
        self.rule, self.options = method.run.distill, method.options
        self.ranks, self.device = ranks, device
        self.near = isinstance(ranks, LocalParts)
        self.learns = bool(self.learned())

    def step(self, state: State) -> Step:
        found = self.ranks.call("gradient", self._sent(state.raw), state.iteration)
        inorder = [found[draw % len(found)][draw // len(found)] for draw in range(self.options.draws)]
        gradient, told = mean([(g.map(lambda t: t.to(self.device)), parts) for g, parts in inorder])
        gradient, norm = clipped(gradient, self.options.clip)
        pace = told.get("pace", 1.0)
        paced = {"lr_image": pace * self.rule.lr_image, "lr_text": pace * self.rule.lr_text}
        return Step(
            before=state,
            after=outer_step(state, gradient, self.rule.model_copy(update=paced)),
            loss=norm.new_tensor(told.pop("loss")),
            numbers={"grad_norm": norm},
            facts=told,
        )

    def accept(self, state: State) -> None:
        if self.learns:
            self.ranks.call("after", self._sent(state.raw), state.iteration - 1)

    def learned(self) -> dict[str, Tensor]:
        return self.ranks.call("tensors")[0]

    def restore(self, learned: dict[str, Tensor]) -> None:
        if self.learns:
            self.ranks.call("load", {n: t.cpu() for n, t in learned.items()})

    def _sent(self, synthetic: Synthetic) -> Synthetic:
        return synthetic if self.near else synthetic.map(Tensor.cpu)


def mean(found: list[tuple[Synthetic, Told]]) -> tuple[Synthetic, Told]:
    """Gradients and losses added in order and divided by their number."""
    if len(found) == 1:
        return found[0][0], dict(found[0][1])
    total = {n: t.clone() for n, t in found[0][0].tensors().items()}
    for gradient, _ in found[1:]:
        for name, t in gradient.tensors().items():
            total[name] += t
    told = {name: sum(parts[name] for _, parts in found) / len(found) for name in found[0][1]}
    return found[0][0].with_tensors({n: t / len(found) for n, t in total.items()}), told


def clipped(gradient: Synthetic, limit: float | None) -> tuple[Synthetic, Tensor]:
    """`gradient`, shortened so that all its tensors together are no longer than `limit`, and how long it was."""
    norm = torch.stack([torch.linalg.vector_norm(t) for t in gradient.tensors().values()]).norm()
    if limit is None:
        return gradient, norm
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
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
    on_step: Callable[[dict], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: WorkerParts | None = None,
) -> bool:
    """Distil one phase by matching distributions; see `rmdd.distill.loop.run_phase`.

    Writes `records.json` and `start.safetensors`, as students would get it, where they are not there. `ranks` hold a
    `Rank` each; None: this process makes all draws. Several are averaged on the CPU, wherever they were made.
    """
    place = device if method.options.draws == 1 else torch.device("cpu")
    chosen, start = folder / "records.json", folder / "start.safetensors"
    if not chosen.is_file():
        write_json(chosen, method.records(phase, train, store))
    initial = method.initial(phase, train, read_json(chosen))
    if not start.is_file():
        save_set(method.exported(initial), start)

    def stepper(begun: Synthetic) -> Averaging:
        return Averaging(method, ranks or LocalParts([Rank(method, phase, store, model, train, device)]), place)

    return run_phase(
        method.run.distill, phase, initial, folder, place, key, stepper, on_step, should_stop, method.exported
    )
