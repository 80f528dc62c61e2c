"""The trajectory-matching loop of one phase: draw, unroll, step, average, checkpoint.

All state lives in one safetensors file written whole, and every draw depends on its iteration alone, so a loop
that was killed goes on with the same bits.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

from rmdd import config
from rmdd.distill.phases import Draw, draw
from rmdd.distill.synthetic import Synthetic, from_tensors
from rmdd.distill.unroll import MetaGradient, StudentLoss, meta_gradient
from rmdd.experts import shortcut
from rmdd.experts.store import Store
from rmdd.files import append_jsonl, atomic_path
from rmdd.models.dual import DualEncoder, Params
from rmdd.models.image import matching_context
from rmdd.models.losses import LOSSES

INNER_RATES = ("lr_image", "lr_text")

PATH_BYTES = 4 * 2**30
"""Experts' endpoints held in memory at most; beyond it the one opened first is read again when its turn comes."""


class NotFinite(FloatingPointError):
    """A loss or gradient stopped being a number; the last checkpoint is whole."""


def student_loss(model: DualEncoder, rule: config.Distill, dropout_seeds: tuple[int, ...]) -> StudentLoss:
    """The inner loss as a function of the parameters.

    With `same_mask` dropout (and any other noise of a tower, such as timm's stochastic depth) draws by step, so both
    passes of the engine see one mask; `fresh_mask` draws another in the second pass, as the released code does.
    """
    model.train(rule.inner_dropout != "off")
    loss = LOSSES[rule.loss]
    calls = [0] * len(dropout_seeds)

    def compute(params: Params, images: Tensor, texts: Tensor, target: Tensor, step: int) -> Tensor:
        if rule.inner_dropout == "off":
            return loss(functional_call(model, params, (images, texts)), target)
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(dropout_seeds[step] + (calls[step] if rule.inner_dropout == "fresh_mask" else 0))
            calls[step] += 1
            return loss(functional_call(model, params, (images, texts)), target)

    return compute


@dataclass
class State:
    """A phase after `iteration` updates: the raw set, its momentum and its average."""

    iteration: int
    raw: Synthetic
    average: Synthetic
    momentum: dict[str, Tensor]

    @classmethod
    def begin(cls, initial: Synthetic) -> "State":
        return cls(0, initial.map(torch.clone), initial.map(torch.clone), {})

    def to(self, device: torch.device) -> "State":
        move: Callable[[Tensor], Tensor] = lambda t: t.to(device)  # noqa: E731
        return State(
            self.iteration,
            self.raw.map(move),
            self.average.map(move),
            {n: move(t) for n, t in self.momentum.items()},
        )

    def save(self, path: Path, key: str) -> None:
        groups = {
            "raw": self.raw.tensors(),
            "average": self.average.tensors(),
            "momentum": self.momentum,
        }
        named = {f"{g}/{n}": t.detach().cpu().contiguous() for g, ts in groups.items() for n, t in ts.items()}
        facts = {"iteration": self.iteration, "alpha": self.raw.alpha, "key": key}
        with atomic_path(path) as temporary:
            save_file(named, temporary, metadata={"state": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, key: str) -> "State":
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["state"])
                named = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(
                f"the checkpoint {path} is damaged ({error}); delete it to begin this phase anew"
            ) from error
        if facts["key"] != key:
            raise ValueError(f"the checkpoint {path} belongs to another configuration; use another run folder")
        part = {
            g: {n.removeprefix(f"{g}/"): t for n, t in named.items() if n.startswith(f"{g}/")}
            for g in ("raw", "average", "momentum")
        }
        return cls(
            facts["iteration"],
            from_tensors(part["raw"], facts["alpha"]),
            from_tensors(part["average"], facts["alpha"]),
            part["momentum"],
        )


def outer_step(state: State, gradient: Synthetic, rule: config.Distill) -> State:
    """One update of every learnable tensor, then the exponential average (PTM-ST, equation 7).

    `sgd` is the papers' SGD with momentum. `normalised` (ours) first divides each tensor's gradient by its own
    root mean square: a rate is then the size of one step per entry, and the rare huge gradients of an unstable
    unroll weigh no more than others. The inner rates move by that share of themselves and stay positive. The clamp
    of the inner rates comes after the average, as in the released code.
    """
    rates = {"images": rule.lr_image, "texts": rule.lr_text, "lr_image": rule.lr_lr, "lr_text": rule.lr_lr}
    now = state.raw.tensors()
    momentum, raw = {}, {}
    for name, g in gradient.tensors().items():
        lr, past = rates.get(name, rule.lr_similarity), state.momentum.get(name)
        if rule.optimiser == "sgd":
            momentum[name] = g if past is None else rule.momentum * past + g
            # as torch.optim.SGD rounds it: one fused multiply-add
            raw[name] = torch.add(now[name], momentum[name], alpha=-lr)
            continue
        step = g / g.abs().amax().clamp(min=torch.finfo(g.dtype).tiny)  # first, lest the squares over- or underflow
        step = step / step.square().mean().sqrt().clamp(min=torch.finfo(g.dtype).tiny)
        momentum[name] = (1 - rule.momentum) * step + (0 if past is None else rule.momentum * past)
        raw[name] = now[name] * (-lr * momentum[name]).exp() if name in INNER_RATES else now[name] - lr * momentum[name]
    average = {n: rule.ema * a + (1 - rule.ema) * raw[n] for n, a in state.average.tensors().items()}
    if rule.min_inner_lr is not None:
        for name in INNER_RATES:
            raw[name] = raw[name].clamp(min=rule.min_inner_lr)
            average[name] = average[name].clamp(min=rule.min_inner_lr)
    return State(state.iteration + 1, state.raw.with_tensors(raw), state.average.with_tensors(average), momentum)


class Matcher:
    """One phase's meta-gradients: the model, built once, and the experts' paths, opened once each."""

    def __init__(self, run: config.Run, phase: int, store: Store, model: DualEncoder, device: torch.device):
        self.run, self.phase, self.store, self.device = run, phase, store, device
        self.experts = [e for e in store.complete() if e < run.experts.num]
        if len(self.experts) < run.experts.num:
            raise ValueError(
                f"the run asks for {run.experts.num} experts but the store at {store.path} holds {len(self.experts)} "
                "finished ones; train the rest with `rmdd experts`"
            )
        self.model = model.to(device)
        self._paths: dict[int, shortcut.Path] = {}

    def draw(self, iteration: int) -> Draw:
        return draw(self.run.distill, self.phase, iteration, len(self.experts), self.run.seed_of("distill"))

    def path(self, expert: int) -> shortcut.Path:
        if expert not in self._paths:
            held = sum(4 * math.prod(shape) for shape in self.store.shapes.values()) * 2 * (len(self._paths) + 1)
            if held > PATH_BYTES and self._paths:
                self._paths.pop(next(iter(self._paths)))
            kind = self.run.distill.trajectory
            self._paths[expert] = shortcut.open_path(self.store, expert, kind, self.run.endpoint_of(self.phase))
        return self._paths[expert]

    def gradient(self, synthetic: Synthetic, drawn: Draw) -> MetaGradient:
        rule = self.run.distill
        path = self.path(self.experts[drawn.expert])
        start, target = path.at(drawn.start), path.at(drawn.start + rule.match_epochs)
        with matching_context(self.model):
            return meta_gradient(
                student_loss(self.model, rule, drawn.dropout_seeds),
                {n: p.to(self.device) for n, p in start.items()},
                {n: p.to(self.device) for n, p in target.items()},
                synthetic,
                drawn.batches.to(self.device),
                estimator=rule.estimator,
                branches=rule.branches,
            )


def finished(folder: Path, total: int) -> bool:
    """Whether a phase has made all of its `total` updates and kept its last set."""
    checkpoint = folder / "state.safetensors"
    if not checkpoint.is_file() or not (folder / f"set-{total:06d}.safetensors").is_file():
        return False
    with safe_open(checkpoint, "pt") as file:
        return json.loads(file.metadata()["state"])["iteration"] == total


def distill_phase(
    run: config.Run,
    phase: int,
    store: Store,
    model: DualEncoder,
    initial: Synthetic,
    folder: Path,
    device: torch.device,
    key: str,
    on_step: Callable[[dict], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Distil one phase into `folder`, from its last checkpoint if it has one. Returns whether it finished.

    `key` names the value of the run; a checkpoint of another value is refused. Writes `state.safetensors` at
    every checkpoint, `metrics.jsonl` a line per iteration, and `set-<iteration>.safetensors` for every snapshot.
    Raises `NotFinite` with the last good state saved.
    """
    rule, total = run.distill, run.distill.phases[phase].iterations
    checkpoint, log = folder / "state.safetensors", folder / "metrics.jsonl"
    state = (State.load(checkpoint, key) if checkpoint.is_file() else State.begin(initial)).to(device)
    _cut_log(log, state.iteration)
    last_set = folder / f"set-{total:06d}.safetensors"
    if state.iteration >= total:
        if not last_set.is_file():
            save_set(state.average, last_set)
        return True
    matcher = Matcher(run, phase, store, model, device)
    lines: list[dict] = []

    def keep() -> None:
        for line in lines:
            append_jsonl(log, line)
        lines.clear()
        state.save(checkpoint, key)

    snapshots = snapshot_iterations(total, rule.snapshots)
    while state.iteration < total:
        began = time.perf_counter()
        drawn = matcher.draw(state.iteration)
        found = matcher.gradient(state.raw, drawn)
        after = outer_step(state, found.gradient, rule)
        numbers = torch.stack([found.loss, *(t.sum() for t in after.raw.tensors().values())])
        if not torch.isfinite(numbers).all():
            keep()
            raise NotFinite(
                f"phase {phase} stopped being finite in iteration {state.iteration + 1} (expert "
                f"{matcher.experts[drawn.expert]}, start epoch {drawn.start}, inner rates {state.raw.lr_image:.4g} and "
                f"{state.raw.lr_text:.4g}); {checkpoint} holds iteration {state.iteration}; lower the learning rates"
            )
        state = after
        metrics = {
            "phase": phase,
            "iteration": state.iteration,
            "loss": found.loss.item(),
            **{f"miss_{tower}": m.item() for tower, m in found.miss.items()},
            "student_loss": found.student_loss.item(),
            "lr_image": state.raw.lr_image.item(),
            "lr_text": state.raw.lr_text.item(),
            "start": drawn.start,
            "expert": matcher.experts[drawn.expert],
            "seconds": round(time.perf_counter() - began, 4),
        }
        lines.append(metrics)
        on_step(metrics)
        stopping = should_stop()
        if state.iteration in snapshots:
            save_set(state.average, folder / f"set-{state.iteration:06d}.safetensors")
        if stopping or state.iteration % rule.checkpoint_every == 0 or state.iteration == total:
            keep()
        if stopping:
            break
    return state.iteration == total


def snapshot_iterations(total: int, count: int) -> list[int]:
    """Iterations, evenly spaced and ending with the last, whose sets are kept."""
    return sorted({math.ceil(total * (i + 1) / count) for i in range(count)})


def save_set(synthetic: Synthetic, path: Path) -> None:
    with atomic_path(path) as temporary:
        named = {n: t.detach().cpu().contiguous() for n, t in synthetic.tensors().items()}
        save_file(named, temporary, metadata={"alpha": repr(synthetic.alpha)})


def load_set(path: Path) -> Synthetic:
    with safe_open(path, "pt") as file:
        return from_tensors({n: file.get_tensor(n) for n in file.keys()}, float(file.metadata()["alpha"]))  # noqa: SIM118


def _cut_log(log: Path, iteration: int) -> None:
    """Drop lines after the checkpoint, and a half-written last one, so that a resumed log has each iteration once."""
    if not log.is_file():
        return
    good = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                good.append(line)
        except json.JSONDecodeError:
            break
    with atomic_path(log) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in good), encoding="utf-8")
