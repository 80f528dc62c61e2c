"""What the loops of all families share: the state of a phase on disk, its outer step, its guard, snapshots and log.

All state lives in one safetensors file written whole, and every draw depends on its iteration alone, so a loop
that was killed goes on with the same bits.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rmdd import config
from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import append_jsonl, cut_jsonl
from rmdd.core.tensors import Damaged, facts_of, flatten_groups, load_checked, save_checked, split_groups
from rmdd.distill.guard import Derailed, vitals, what_is_wrong
from rmdd.distill.phases import Window
from rmdd.distill.sets import save_set
from rmdd.distill.synthetic import Synthetic, from_tensors

_logger = logging.getLogger(__name__)

INNER_RATES = ("lr_image", "lr_text")


@dataclass
class State:
    """A phase after `iteration` updates: the raw set, its momentum and its average."""

    iteration: int
    raw: Synthetic
    average: Synthetic
    momentum: dict[str, Tensor]
    halvings: int = 0
    """How often the phase derailed, and its outer rates were halved."""
    window: Window | None = None
    """What the last update was drawn from, where that moves."""
    learned: dict[str, Tensor] = field(default_factory=dict)
    """What was learned beside the set: an online model, a frequency network."""

    @classmethod
    def begin(cls, initial: Synthetic) -> "State":
        return cls(0, initial.map(torch.clone), initial.map(torch.clone), {})

    def to(self, device: torch.device) -> "State":
        move: Callable[[Tensor], Tensor] = lambda t: t.to(device)  # noqa: E731
        return replace(
            self,
            raw=self.raw.map(move),
            average=self.average.map(move),
            momentum={n: move(t) for n, t in self.momentum.items()},
            learned={n: move(t) for n, t in self.learned.items()},
        )

    def save(self, path: Path, key: str) -> None:
        groups = {
            "raw": self.raw.tensors(),
            "average": self.average.tensors(),
            "momentum": self.momentum,
            "learned": self.learned,
        }
        facts = {"iteration": self.iteration, "alpha": self.raw.alpha, "key": key, "halvings": self.halvings}
        facts |= {"window": self.window} if self.window else {}
        save_checked(path, flatten_groups(groups), "state", facts)

    @classmethod
    def load(cls, path: Path, key: str) -> "State":
        try:
            named, facts = load_checked(path, "state")
        except Damaged as error:
            raise Damaged(
                f"the checkpoint {path} is damaged ({error}); delete it and good.safetensors beside it to begin this "
                "phase anew"
            ) from error
        if facts["key"] != key:
            raise ValueError(f"the checkpoint {path} belongs to another configuration; use another run folder")
        part = split_groups(named)
        if not {"raw", "average"} <= part.keys():
            raise Damaged(f"the checkpoint {path} was written by another version of rmdd; delete {path.parent}")
        return cls(
            facts["iteration"],
            from_tensors(part["raw"], facts["alpha"]),
            from_tensors(part["average"], facts["alpha"]),
            part.get("momentum", {}),
            facts["halvings"],
            Window(*facts["window"]) if "window" in facts else None,
            part.get("learned", {}),
        )


def outer_step(state: State, gradient: Synthetic, rule: config.Distill) -> State:
    """One update of every learnable tensor, then the exponential average (PTM-ST, equation 7).

    `sgd` is the papers' SGD with momentum. `normalised` (ours) first divides each tensor's gradient by its own
    root mean square: a rate is then the size of one step per entry, and the rare huge gradients of an unstable
    unroll weigh no more than others. The inner rates move by that share of themselves and stay positive. The clamp
    of the inner rates comes after the average, as in the released code, which also averages the factors of a low-rank
    similarity and not their product.
    """
    rates = {"images": rule.lr_image, "texts": rule.lr_text, "lr_image": rule.lr_lr, "lr_text": rule.lr_lr}
    rates = {name: rates.get(name, rule.lr_similarity) / 2**state.halvings for name in gradient.tensors()}
    now = state.raw.tensors()
    momentum, raw = {}, {}
    for name, g in gradient.tensors().items():
        lr, past = rates[name], state.momentum.get(name)
        if rule.optimiser == "sgd":
            momentum[name] = g if past is None else rule.momentum * past + g
            # as torch.optim.SGD rounds it: one fused multiply-add
            raw[name] = torch.add(now[name], momentum[name], alpha=-lr)
            continue
        step = g / g.abs().amax().clamp(min=torch.finfo(g.dtype).tiny)  # first, lest the squares over- or underflow
        step = step / step.square().mean().sqrt().clamp(min=torch.finfo(g.dtype).tiny)
        momentum[name] = (1 - rule.momentum) * step + (0 if past is None else rule.momentum * past)
        raw[name] = now[name] * (-lr * momentum[name]).exp() if name in INNER_RATES else now[name] - lr * momentum[name]
    if rule.similarity.clamp is not None:
        raw["similarity.matrix"] = raw["similarity.matrix"].clamp(*rule.similarity.clamp)
    average = {n: rule.ema * a + (1 - rule.ema) * raw[n] for n, a in state.average.tensors().items()}
    if rule.min_inner_lr is not None:
        for name in INNER_RATES:
            raw[name] = raw[name].clamp(min=rule.min_inner_lr)
            average[name] = average[name].clamp(min=rule.min_inner_lr)
    stepped = state.raw.with_tensors(raw), state.average.with_tensors(average)
    return State(state.iteration + 1, *stepped, momentum, state.halvings, state.window, state.learned)


def finished(folder: Path, total: int) -> bool:
    """Whether a phase has made all of its `total` updates and kept its last set."""
    checkpoint = folder / "state.safetensors"
    if not checkpoint.is_file() or not (folder / f"set-{total:06d}.safetensors").is_file():
        return False
    try:
        return facts_of(checkpoint, "state")["iteration"] == total
    except Damaged:  # told, or mended, by who goes on
        return False


def _last_state(path: Path, good: Path, key: str) -> State:
    """The last checkpoint, or, where it is damaged, the good one before it: the same updates follow from both."""
    try:
        return State.load(path, key)
    except Damaged as error:
        if not good.is_file():
            raise
        state = State.load(good, key)
        _logger.warning("%s; going on from iteration %d, which %s holds", error, state.iteration, good)
        return state


@dataclass(frozen=True)
class Step:
    """One update that is not yet taken."""

    before: State
    after: State
    loss: Tensor
    numbers: dict[str, Tensor]
    """Scalars for the log, still on their device."""
    facts: dict[str, Any]
    """What else the log tells."""
    drawn: str = ""
    """What the update was drawn from, for a message."""


@runtime_checkable
class Stepper(Protocol):
    """Makes the updates of a phase; each follows from the state before it alone."""

    def step(self, state: State) -> Step: ...

    def taken(self, state: State) -> None:
        """`state` is what the last step led to."""
        ...

    def learned(self) -> dict[str, Tensor]:
        """What was learned beside the set."""
        ...

    def relearn(self, learned: dict[str, Tensor]) -> None:
        """Go back to what was `learned`."""
        ...


def run_phase(
    rule: config.Distill,
    phase: int,
    initial: Synthetic,
    folder: Path,
    device: torch.device,
    key: str,
    open_stepper: Callable[[Synthetic], Stepper],
    on_step: Callable[[dict], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    exported: Callable[[Synthetic], Synthetic] = lambda synthetic: synthetic,
) -> bool:
    """Distil one phase into `folder`, from its last checkpoint if it has one. Returns whether it finished.

    `key` names the value of the run; a checkpoint of another value is refused. `open_stepper` is given the set that
    the phase begins with. Writes `state.safetensors` at every checkpoint, `good.safetensors` every `guard.every`
    iterations, `metrics.jsonl` a line per iteration, `rollbacks.jsonl` a line per rollback, and
    `set-<iteration>.safetensors`, as `exported`, for every snapshot.
    Raises `Derailed` after too many rollbacks, with the last good state saved.
    """
    total = rule.phases[phase].iterations
    log, rollbacks = folder / "metrics.jsonl", folder / "rollbacks.jsonl"
    files = {name: folder / f"{name}.safetensors" for name in ("state", "good")}
    begun = State.begin(initial).to(device)
    good = State.load(files["good"], key).to(device) if files["good"].is_file() else None
    state = _last_state(files["state"], files["good"], key).to(device) if files["state"].is_file() else None
    if good and good.halvings > (state.halvings if state else 0):  # killed in the middle of a rollback
        state = good
    cut_jsonl(log, "iteration", state.iteration if state else 0)
    cut_jsonl(rollbacks, "halvings", state.halvings if state else 0)
    last_set = folder / f"set-{total:06d}.safetensors"
    if state and state.iteration >= total:
        if not last_set.is_file():
            save_set(exported(state.average), last_set)
        return True
    stepper = open_stepper(begun.raw)
    begun = _with_learned(begun, stepper)
    good = good or begun
    if state:
        stepper.relearn(state.learned)
    state = state or begun
    first_rates = float(begun.raw.lr_image), float(begun.raw.lr_text)
    lines: list[dict] = []

    def write_lines() -> None:
        for line in lines:
            append_jsonl(log, line)
        lines.clear()

    snapshots = snapshot_iterations(total, rule.snapshots)
    while state.iteration < total:
        began = time.perf_counter()
        made = stepper.step(state)
        state, after, names = made.before, made.after, list(made.numbers)
        numbers = [made.loss, after.raw.lr_image, after.raw.lr_text, *made.numbers.values()]
        told = torch.cat([vitals(after.raw, made.loss), torch.stack(numbers)]).tolist()
        alive, (loss, lr_image, lr_text, *rest) = told[:4], told[4:]
        skipped = rule.skip_above is not None and rule.skip_above < loss < math.inf
        wrong = None if skipped else what_is_wrong(alive, first_rates, rule)
        if wrong:
            drawn = f" ({made.drawn})" if made.drawn else ""
            where = f"phase {phase}, iteration {state.iteration + 1}{drawn}: {wrong}"
            state = good = replace(good, halvings=good.halvings + 1)
            if state.halvings > rule.guard.retries:
                if not files["good"].is_file():
                    begun.save(files["good"], key)
                raise Derailed(
                    f"{where}; {rule.guard.retries} rollbacks with halved rates did not help. {files['good']} holds "
                    f"iteration {good.iteration}. Begin anew with lower rates (distill.lr_image, lr_text, "
                    "lr_similarity, lr_lr), or go on from there with rates halved again: "
                    f"rmdd run RUN.yaml --set distill.guard.retries={2 * rule.guard.retries + 1}"
                )
            _logger.warning("%s; back to iteration %d, outer rates halved", where, state.iteration)
            lines[:] = [line for line in lines if line["iteration"] <= state.iteration]
            cut_jsonl(log, "iteration", state.iteration)
            write_lines()
            append_jsonl(rollbacks, {"to": state.iteration, "halvings": state.halvings, "why": where})
            good.save(files["good"], key)
            state.save(files["state"], key)
            stepper.relearn(state.learned)
            continue
        if skipped:
            after = replace(state, iteration=state.iteration + 1)
            lr_image, lr_text = float(after.raw.lr_image), float(after.raw.lr_text)
        state = after
        stepper.taken(state)
        metrics = {
            "phase": phase,
            "iteration": state.iteration,
            "loss": loss,
            **dict(zip(names, rest, strict=True)),
            "lr_image": lr_image,
            "lr_text": lr_text,
            **made.facts,
            "rollbacks": state.halvings,
            "seconds": round(time.perf_counter() - began, 4),
        }
        if rule.skip_above is not None:
            metrics["skipped"] = skipped
        if state.window is not None:
            metrics |= state.window._asdict()
        lines.append(metrics)
        on_step(metrics)
        stopping = should_stop()
        if state.iteration in snapshots:
            save_set(exported(state.average), folder / f"set-{state.iteration:06d}.safetensors")
        saving = stopping or state.iteration % rule.checkpoint_every == 0 or state.iteration == total
        if saving or state.iteration % rule.guard.every == 0:
            state = _with_learned(state, stepper)
        if state.iteration % rule.guard.every == 0:
            good = state
            good.save(files["good"], key)
        if saving:
            write_lines()
            state.save(files["state"], key)
        if stopping:
            break
    if rule.skip_above is not None and state.iteration == total:
        skips = sum(json.loads(line).get("skipped", False) for line in log.read_text(encoding="utf-8").splitlines())
        if skips:
            _logger.warning("phase %d: %d of %d updates skipped, loss above %g", phase, skips, total, rule.skip_above)
    return state.iteration == total


def _with_learned(state: State, stepper: Stepper) -> State:
    return replace(state, learned={n: t.detach().clone() for n, t in stepper.learned().items()})


def snapshot_iterations(total: int, count: int) -> list[int]:
    """Iterations, evenly spaced and ending with the last, whose sets are kept."""
    return sorted({math.ceil(total * (i + 1) / count) for i in range(count)})


def verify(folder: Path, check: DiskCheck, snapshots: Iterable[int] = ()) -> None:
    """Checkpoints, sets and logs of a phase; a finished one has a set for each of its `snapshots`."""
    if not check.begin(folder):
        return
    again = f"delete {check.storage.address(folder)} to distil that phase again"
    for file in sorted(folder.glob("*.safetensors")):
        is_state = file.name in ("state.safetensors", "good.safetensors")
        todo = f"delete it and run again, or {again}" if is_state else again
        check.tensors(file, "state" if is_state else "set", todo)
    if (folder / "records.json").is_file():
        check.json(folder / "records.json", again)
    for log in sorted(folder.glob("*.jsonl")):
        check.lines(log)
    for iteration in snapshots:
        file = folder / f"set-{iteration:06d}.safetensors"
        if not file.is_file():
            check.fault(file, "is missing", again)


FORMAT = Format(("start.safetensors", "state.safetensors", "records.json"), "phases/*/phase-*", verify)
