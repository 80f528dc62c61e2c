"""The distillation loop that all method families share: state on disk, outer step, rollbacks, snapshots and log.

The state of a phase is one safetensors file, written atomically. Every random draw depends on the number of the
iteration, not on earlier draws. A killed loop therefore resumes with bit-identical results.
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
from rmdd.distill.chain import segment_ends
from rmdd.distill.guard import PhaseDiverged, divergence_reason, health_numbers
from rmdd.distill.phases import Window
from rmdd.distill.sets import save_set
from rmdd.distill.synthetic import Synthetic, from_tensors

_logger = logging.getLogger(__name__)

INNER_RATES = ("lr_image", "lr_text")


@dataclass
class State:
    """State of a phase after `iteration` updates: the synthetic set, its momentum and its moving average."""

    iteration: int
    raw: Synthetic
    average: Synthetic
    momentum: dict[str, Tensor]
    halvings: int = 0
    """Number of rollbacks so far; each rollback halved the outer learning rates."""
    window: Window | None = None
    """Range of start epochs and endpoint that the last update used; None unless `phases: adaptive` moves them."""
    learned: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that a method learns in addition to the synthetic set, such as an online model or a frequency network."""

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
                f"the checkpoint {path} is damaged ({error}); delete it and good.safetensors in the same folder to "
                "restart this phase"
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
    """Update every learnable tensor once, then its exponential moving average (PTM-ST, equation 7).

    `sgd` is SGD with momentum, as in the published methods. `normalised` (ours) first divides the gradient of each
    tensor by the gradient's root mean square. An outer learning rate is then the step size per entry, and the rare huge
    gradients of an unstable student count no more than ordinary gradients. With `normalised`, a step multiplies the
    inner learning rates by a factor, so they stay positive. The moving averages of the inner learning rates are clamped
    too, as in the released code. For a low-rank similarity, the two factors are averaged, not their product.
    """
    rates = {"images": rule.lr_image, "texts": rule.lr_text, "lr_image": rule.lr_lr, "lr_text": rule.lr_lr}
    rates = {name: rates.get(name, rule.lr_similarity) / 2**state.halvings for name in gradient.tensors()}
    now = state.raw.tensors()
    momentum, raw = {}, {}
    for name, g in gradient.tensors().items():
        lr, past = rates[name], state.momentum.get(name)
        if rule.optimiser == "sgd":
            momentum[name] = g if past is None else rule.momentum * past + g
            # this fused multiply-add rounds in the same way as torch.optim.SGD
            raw[name] = torch.add(now[name], momentum[name], alpha=-lr)
            continue
        step = g / g.abs().amax().clamp(min=torch.finfo(g.dtype).tiny)  # scaled, so squares stay in range
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
    """Return whether the phase in `folder` is finished: all `total` updates are done and the final set is saved."""
    checkpoint = folder / "state.safetensors"
    if not checkpoint.is_file() or not (folder / f"set-{total:06d}.safetensors").is_file():
        return False
    try:
        return bool(facts_of(checkpoint, "state")["iteration"] == total)
    except Damaged:  # `run_phase` reports or repairs a damaged checkpoint
        return False


def _last_state(path: Path, good: Path, key: str) -> State:
    """Load the last checkpoint, or the file `good` if the checkpoint is damaged; both give the same final set."""
    try:
        return State.load(path, key)
    except Damaged as error:
        if not good.is_file():
            raise
        state = State.load(good, key)
        _logger.warning("%s; resuming from iteration %d, saved in %s", error, state.iteration, good)
        return state


@dataclass(frozen=True)
class Step:
    """A computed update of a phase, which the loop accepts, skips or rolls back."""

    before: State
    after: State
    loss: Tensor
    numbers: dict[str, Tensor]
    """Scalars for the metrics log, still on the device that computed them."""
    facts: dict[str, Any]
    """Values for the metrics log that are already on the CPU."""
    drawn: str = ""
    """Description of the random draw (for example its expert and start epoch), used in error messages."""


@runtime_checkable
class Stepper(Protocol):
    """An object that computes the updates of a phase; an update depends only on the state before it."""

    def step(self, state: State) -> Step: ...

    def accept(self, state: State) -> None:
        """Called after the loop has accepted an update; `state` is the new state."""
        ...

    def learned(self) -> dict[str, Tensor]:
        """Return the tensors that the method learns in addition to the synthetic set."""
        ...

    def restore(self, learned: dict[str, Tensor]) -> None:
        """Restore the tensors that `learned` returned earlier."""
        ...


def run_phase(
    rule: config.Distill,
    phase: int,
    initial: Synthetic,
    folder: Path,
    device: torch.device,
    key: str,
    open_stepper: Callable[[Synthetic], Stepper],
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    exported: Callable[[Synthetic], Synthetic] = lambda synthetic: synthetic,
    until: int | None = None,
) -> bool:
    """Distil one phase into `folder`, resuming from its last checkpoint if any. Returns whether the phase has made all
    its updates, or the first `until` of them if given.

    `key` is the hash of the run; a checkpoint with a different key raises a `ValueError`. `open_stepper` gets the
    initial set of the phase and returns a `Stepper`. The loop writes `state.safetensors` at every checkpoint,
    `good.safetensors` every `guard.every` iterations, a line of `metrics.jsonl` per iteration and a line of
    `rollbacks.jsonl` per rollback. For every snapshot, it writes the set, converted by `exported`, to
    `set-<iteration>.safetensors`, and also at the end of every segment of a chained phase (`rmdd.distill.chain`).
    Rollbacks never go back beyond the last end of a segment, as other phases use the set of that iteration. Raises
    `PhaseDiverged` after too many rollbacks; the last good state is on disk.
    """
    total, ends = rule.phases[phase].iterations, segment_ends(rule, phase)
    until = total if until is None else until
    log, rollbacks = folder / "metrics.jsonl", folder / "rollbacks.jsonl"
    files = {name: folder / f"{name}.safetensors" for name in ("state", "good")}
    first_state = State.begin(initial).to(device)
    good = State.load(files["good"], key).to(device) if files["good"].is_file() else None
    state = _last_state(files["state"], files["good"], key).to(device) if files["state"].is_file() else None
    if good and good.halvings > (state.halvings if state else 0):  # the process was killed in a rollback
        state = good
    cut_jsonl(log, "iteration", state.iteration if state else 0)
    cut_jsonl(rollbacks, "halvings", state.halvings if state else 0)
    last_set = folder / f"set-{until:06d}.safetensors"
    if state and state.iteration >= until:
        if state.iteration == until and not last_set.is_file():
            save_set(exported(state.average), last_set)
        return True
    stepper = open_stepper(first_state.raw)
    first_state = _with_learned(first_state, stepper)
    good = good or first_state
    if state:
        stepper.restore(state.learned)
    state = state or first_state
    first_rates = float(first_state.raw.lr_image), float(first_state.raw.lr_text)
    lines: list[dict[str, Any]] = []

    def write_lines() -> None:
        for line in lines:
            append_jsonl(log, line)
        lines.clear()

    snapshots = {*snapshot_iterations(total, rule.snapshots), *ends}
    while state.iteration < until:
        began = time.perf_counter()
        update = stepper.step(state)
        state, after, names = update.before, update.after, list(update.numbers)
        numbers = [update.loss, after.raw.lr_image, after.raw.lr_text, *update.numbers.values()]
        values = torch.cat([health_numbers(after.raw, update.loss), torch.stack(numbers)]).tolist()
        health, (loss, lr_image, lr_text, *rest) = values[:4], values[4:]
        skipped = rule.skip_above is not None and rule.skip_above < loss < math.inf
        reason = None if skipped else divergence_reason(health, first_rates, rule)
        if reason:
            drawn = f" ({update.drawn})" if update.drawn else ""
            problem = f"phase {phase}, iteration {state.iteration + 1}{drawn}: {reason}"
            state = good = replace(good, halvings=good.halvings + 1)
            if state.halvings > rule.guard.retries:
                if not files["good"].is_file():
                    first_state.save(files["good"], key)
                raise PhaseDiverged(
                    f"{problem}; {rule.guard.retries} rollbacks with halved learning rates did not help. "
                    f"{files['good']} holds iteration {good.iteration}. Start a new run with lower ones "
                    "(distill.lr_image, lr_text, lr_similarity, lr_lr), or continue from that file with learning rates "
                    "halved again: "
                    f"rmdd run RUN.yaml --set distill.guard.retries={2 * rule.guard.retries + 1}"
                )
            _logger.warning("%s; returning to iteration %d with halved outer learning rates", problem, state.iteration)
            lines[:] = [line for line in lines if line["iteration"] <= state.iteration]
            cut_jsonl(log, "iteration", state.iteration)
            write_lines()
            append_jsonl(rollbacks, {"to": state.iteration, "halvings": state.halvings, "why": problem})
            good.save(files["good"], key)
            state.save(files["state"], key)
            stepper.restore(state.learned)
            continue
        if skipped:
            after = replace(state, iteration=state.iteration + 1)
            lr_image, lr_text = float(after.raw.lr_image), float(after.raw.lr_text)
        state = after
        stepper.accept(state)
        metrics = {
            "phase": phase,
            "iteration": state.iteration,
            "loss": loss,
            **dict(zip(names, rest, strict=True)),
            "lr_image": lr_image,
            "lr_text": lr_text,
            **update.facts,
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
        segment_ended = state.iteration in ends
        is_good = state.iteration % rule.guard.every == 0 or (segment_ended and state.iteration < total)
        saving = stopping or segment_ended or state.iteration % rule.checkpoint_every == 0
        if saving or is_good:
            state = _with_learned(state, stepper)
        if is_good:
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
            _logger.warning(
                "phase %d: skipped %d of %d updates, because their loss was above %g",
                phase,
                skips,
                total,
                rule.skip_above,
            )
    return state.iteration >= until


def _with_learned(state: State, stepper: Stepper) -> State:
    return replace(state, learned={n: t.detach().clone() for n, t in stepper.learned().items()})


def snapshot_iterations(total: int, count: int) -> list[int]:
    """Return the `count` iterations after which the set is saved; they are evenly spaced and end with `total`."""
    return sorted({math.ceil(total * (i + 1) / count) for i in range(count)})


def verify(folder: Path, check: DiskCheck, snapshots: Iterable[int] = ()) -> None:
    """Check the checkpoints, sets and logs of a phase folder; each iteration in `snapshots` must have a set file."""
    if not check.begin(folder):
        return
    remedy = f"delete {check.storage.address(folder)} to distil that phase again"
    for file in sorted(folder.glob("*.safetensors")):
        is_state = file.name in ("state.safetensors", "good.safetensors")
        todo = f"delete this file and run again, or {remedy}" if is_state else remedy
        check.tensors(file, "state" if is_state else "set", todo)
    for file in sorted(folder.glob("path-starts/*/*.safetensors")):
        check.tensors(file, "path start", remedy)
    if (folder / "records.json").is_file():
        check.json(folder / "records.json", remedy)
    for log in sorted(folder.glob("*.jsonl")):
        check.lines(log)
    for iteration in snapshots:
        file = folder / f"set-{iteration:06d}.safetensors"
        if not file.is_file():
            check.fault(file, "is missing", remedy)


FORMAT = Format(("start.safetensors", "state.safetensors", "records.json"), "phases/*/phase-*", verify)
