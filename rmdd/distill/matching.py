"""The trajectory-matching loop of one phase: draw, unroll, step, average, checkpoint.

All state lives in one safetensors file written whole, and every draw depends on its iteration alone, so a loop
that was killed goes on with the same bits.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rmdd import config, methods
from rmdd.data.material import Material
from rmdd.distill.frozen import features_of, to_pixels
from rmdd.distill.guard import Derailed, vitals, what_is_wrong
from rmdd.distill.phases import Draw, Ranges, Window
from rmdd.distill.synthetic import Synthetic, enlarged, from_tensors
from rmdd.distill.unroll import Engine, MetaGradient, forward_suits, meta_gradient, squared_distance
from rmdd.experts import shortcut
from rmdd.experts.store import Store
from rmdd.files import append_jsonl, atomic_path, write_json
from rmdd.models.dual import TOWERS, DualEncoder, Params, tower_of
from rmdd.models.image import matching_context
from rmdd.tensors import Damaged, facts_of, load_checked, save_checked

_logger = logging.getLogger(__name__)

INNER_RATES = ("lr_image", "lr_text")

PATH_BYTES = 4 * 2**30
"""Checkpoints of experts held in memory at most; beyond it the one opened first is read again when its turn comes."""


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
            self.halvings,
            self.window,
        )

    def save(self, path: Path, key: str) -> None:
        groups = {
            "raw": self.raw.tensors(),
            "average": self.average.tensors(),
            "momentum": self.momentum,
        }
        named = {f"{g}/{n}": t for g, ts in groups.items() for n, t in ts.items()}
        facts = {"iteration": self.iteration, "alpha": self.raw.alpha, "key": key, "halvings": self.halvings}
        facts |= {"window": self.window} if self.window else {}
        save_checked(path, named, "state", facts)

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
        part = {
            g: {n.removeprefix(f"{g}/"): t for n, t in named.items() if n.startswith(f"{g}/")}
            for g in ("raw", "average", "momentum")
        }
        return cls(
            facts["iteration"],
            from_tensors(part["raw"], facts["alpha"]),
            from_tensors(part["average"], facts["alpha"]),
            part["momentum"],
            facts["halvings"],
            Window(*facts["window"]) if "window" in facts else None,
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
    return State(state.iteration + 1, *stepped, momentum, state.halvings, state.window)


class Matcher:
    """One phase's meta-gradients: the model, built once, and the experts' paths, opened once each."""

    def __init__(self, run: config.Run, phase: int, store: Store, model: DualEncoder, device: torch.device):
        if run.distill.plan.kind == "adaptive":
            continuous = run.distill.model_copy(update={"start_points": "continuous"})
            run = run.model_copy(update={"distill": continuous})
        self.run, self.phase, self.store, self.device = run, phase, store, device
        self.method = methods.find(run.distill.method)(run)
        self.experts = [e for e in store.complete() if e < run.experts.num]
        if len(self.experts) < run.experts.num:
            raise ValueError(
                f"the run asks for {run.experts.num} experts but the store at {store.path} holds {len(self.experts)} "
                "finished ones; train the rest with `rmdd experts`"
            )
        self.model = model.to(device).train()  # a frozen tower stays in eval mode
        self.frozen_tower = None if run.model.image.trainable else self._features
        self.student = self.model if self.frozen_tower is None else self.model.on_features()
        self._engine: Engine | None = None
        self.ranges: Ranges = dict(self.method.ranges(store, self.experts, phase))
        self._paths: dict[int, shortcut.Path] = {}
        self._endpoint: int | None = None

    def _seen(self, synthetic: Synthetic, drawn: Draw) -> Synthetic:
        assert self.frozen_tower is not None
        return features_of(self.frozen_tower, synthetic, drawn.batches)

    def _features(self, images: Tensor) -> Tensor:
        return self.model.image_tower(enlarged(images, self.run.data.image_size))

    def engine(self, synthetic: Synthetic) -> Engine:
        """How to differentiate, settled once by the first draw of the phase and the set that it begins with.

        So a phase that goes on after a kill settles it as it did before. Fresh masks need reverse mode, for forward
        mode is tried by asking for the same loss again.
        """
        if self._engine is None:
            rule = self.run.distill
            engine = Engine(
                precision=rule.precision, trajectory=self.run.runtime.keep_parameters, reuse=rule.reuse_graphs
            )
            drawn = self.draw(0)
            start, _ = self.segment(drawn)
            with matching_context(self.model):
                seen = synthetic if self.frozen_tower is None else self._seen(synthetic, drawn)
                suits = rule.inner_dropout != "fresh_mask" and forward_suits(
                    self.method.student_loss(self.student, drawn),
                    start,
                    seen,
                    drawn.batches[0].to(self.device),
                    estimator=rule.estimator,
                    precision=rule.precision,
                )
            self._engine = replace(engine, second_pass="forward" if suits else "reverse")
        return self._engine

    def draw(self, iteration: int) -> Draw:
        return self.method.draw(self.phase, iteration, len(self.experts), self.ranges)

    def path(self, expert: int) -> shortcut.Path:
        if expert not in self._paths:
            if self._endpoint is None:
                self._paths[expert] = self.method.path(self.store, expert, self.phase)
            else:
                self._paths[expert] = shortcut.open_path(self.store, expert, self.run.distill, self._endpoint)
            one = 4 * sum(math.prod(shape) for shape in self.store.shapes.values())
            while len(self._paths) > 1 and one * sum(p.vectors for p in self._paths.values()) > PATH_BYTES:
                self._paths.pop(next(iter(self._paths)))
        return self._paths[expert]

    def look_through(self, window: Window) -> None:
        """Draw from the range of `window`, and match along paths to its endpoint."""
        self.ranges = {tower: (window.low, window.stop) for tower in TOWERS}
        if window.endpoint != self._endpoint:
            self._endpoint = window.endpoint
            self._paths.clear()

    def use_path(self, expert: int, path: shortcut.Path) -> None:
        """Match `expert` along another path than the method's."""
        self._paths[expert] = path

    def segment(self, drawn: Draw) -> tuple[Params, Params]:
        """Where the student starts and what it should reach; each tower at its own epoch."""
        path, ahead = self.path(self.experts[drawn.expert]), self.run.distill.match_epochs
        ends = []
        for image, text in ((drawn.start, drawn.start_text), (drawn.start + ahead, drawn.start_text + ahead)):
            point = path.at(image)
            if text != image:
                point = point | {n: p for n, p in path.at(text).items() if tower_of(n) == "text"}
            ends.append({n: p.to(self.device, non_blocking=True) for n, p in point.items()})
        return ends[0], ends[1]

    def gradient(
        self, synthetic: Synthetic, drawn: Draw, estimator: Literal["exact", "first_order"] | None = None
    ) -> MetaGradient:
        """The meta-gradient of one draw, by the run's estimator or another."""
        rule, engine = self.run.distill, self.engine(synthetic)
        start, target = self.segment(drawn)
        batches = drawn.batches.to(self.device, non_blocking=True)
        with matching_context(self.model):
            seen = synthetic if self.frozen_tower is None else self._seen(synthetic, drawn)
            found = meta_gradient(
                self.method.student_loss(self.student, drawn),
                start,
                target,
                seen,
                batches,
                estimator=estimator or rule.estimator,
                branches=rule.branches,
                engine=engine,
            )
            if self.frozen_tower is not None:
                found = to_pixels(self.frozen_tower, synthetic, drawn.batches, found)
        if rule.rate_branches == "separate":
            found = _separate_rates(found, start, target)
        return found


def _separate_rates(found: MetaGradient, start: Params, target: Params) -> MetaGradient:
    """Undo the shared denominator of merged branches for the inner rates, as the released code has it."""
    scale = {tower: squared_distance(start, target, tower) for tower in TOWERS}
    both = scale["image"] + scale["text"]
    old = found.gradient
    gradient = replace(old, lr_image=old.lr_image * both / scale["image"], lr_text=old.lr_text * both / scale["text"])
    return replace(found, gradient=gradient)


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
    every checkpoint, `good.safetensors` every `guard.every` iterations, `metrics.jsonl` a line per iteration,
    `rollbacks.jsonl` a line per rollback, and `set-<iteration>.safetensors` for every snapshot.
    Raises `Derailed` after too many rollbacks, with the last good state saved.
    """
    from rmdd.distill.adaptive import adapted  # which is written in terms of this module

    rule, total = run.distill, run.distill.phases[phase].iterations
    log, rollbacks = folder / "metrics.jsonl", folder / "rollbacks.jsonl"
    files = {name: folder / f"{name}.safetensors" for name in ("state", "good")}
    begun = State.begin(initial).to(device)
    good = State.load(files["good"], key).to(device) if files["good"].is_file() else begun
    state = _last_state(files["state"], files["good"], key).to(device) if files["state"].is_file() else begun
    if good.halvings > state.halvings:  # killed in the middle of a rollback
        state = good
    _cut_log(log, "iteration", state.iteration)
    _cut_log(rollbacks, "halvings", state.halvings)
    last_set = folder / f"set-{total:06d}.safetensors"
    if state.iteration >= total:
        if not last_set.is_file():
            save_set(state.average, last_set)
        return True
    matcher = Matcher(run, phase, store, model, device)
    matcher.engine(begun.raw)
    first_rates = float(begun.raw.lr_image), float(begun.raw.lr_text)
    lines: list[dict] = []

    def write_lines() -> None:
        for line in lines:
            append_jsonl(log, line)
        lines.clear()

    snapshots = snapshot_iterations(total, rule.snapshots)
    while state.iteration < total:
        began = time.perf_counter()
        state = adapted(matcher, state) if rule.plan.kind == "adaptive" else state
        drawn = matcher.draw(state.iteration)
        found = matcher.gradient(state.raw, drawn)
        after = outer_step(state, found.gradient, rule)
        towers = list(found.miss)
        numbers = [found.loss, found.student_loss, after.raw.lr_image, after.raw.lr_text, *found.miss.values()]
        told = torch.cat([vitals(after.raw, found.loss), torch.stack(numbers)]).tolist()
        alive, (loss, student, lr_image, lr_text, *misses) = told[:4], told[4:]
        skipped = rule.skip_above is not None and rule.skip_above < loss < math.inf
        wrong = None if skipped else what_is_wrong(alive, first_rates, rule)
        if wrong:
            where = (
                f"phase {phase}, iteration {state.iteration + 1} (expert {matcher.experts[drawn.expert]}, start epoch "
                f"{drawn.start}): {wrong}"
            )
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
            _cut_log(log, "iteration", state.iteration)
            write_lines()
            append_jsonl(rollbacks, {"to": state.iteration, "halvings": state.halvings, "why": where})
            good.save(files["good"], key)
            state.save(files["state"], key)
            continue
        if skipped:
            after = replace(state, iteration=state.iteration + 1)
            lr_image, lr_text = float(after.raw.lr_image), float(after.raw.lr_text)
        state = after
        metrics = {
            "phase": phase,
            "iteration": state.iteration,
            "loss": loss,
            **{f"miss_{tower}": m for tower, m in zip(towers, misses, strict=True)},
            "student_loss": student,
            "lr_image": lr_image,
            "lr_text": lr_text,
            "start": drawn.start,
            "start_text": drawn.start_text,
            "expert": matcher.experts[drawn.expert],
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
            save_set(state.average, folder / f"set-{state.iteration:06d}.safetensors")
        if state.iteration % rule.guard.every == 0:
            good = state
            good.save(files["good"], key)
        if stopping or state.iteration % rule.checkpoint_every == 0 or state.iteration == total:
            write_lines()
            state.save(files["state"], key)
        if stopping:
            break
    if rule.skip_above is not None and state.iteration == total:
        skips = sum(json.loads(line).get("skipped", False) for line in log.read_text(encoding="utf-8").splitlines())
        if skips:
            _logger.warning("phase %d: %d of %d updates skipped, loss above %g", phase, skips, total, rule.skip_above)
    return state.iteration == total


def snapshot_iterations(total: int, count: int) -> list[int]:
    """Iterations, evenly spaced and ending with the last, whose sets are kept."""
    return sorted({math.ceil(total * (i + 1) / count) for i in range(count)})


def begin_phase(method: methods.Method, phase: int, train: Material, folder: Path) -> None:
    """Choose and keep what a phase starts from."""
    records = method.records(phase, train)
    write_json(folder / "records.json", records)
    save_set(method.initial(phase, train, records), folder / "start.safetensors")


def save_set(synthetic: Synthetic, path: Path) -> None:
    save_checked(path, synthetic.tensors(), "set", {"alpha": synthetic.alpha})


def load_set(path: Path) -> Synthetic:
    """Raises `ValueError` when the file is damaged."""
    try:
        tensors, facts = load_checked(path, "set")
    except Damaged as error:
        raise ValueError(
            f"the set {path} is damaged ({error}); delete {path.parent} to distil that phase again"
        ) from error
    return from_tensors(tensors, float(facts["alpha"]))


def _cut_log(log: Path, count: str, reached: int) -> None:
    """Drop lines after the checkpoint, whose `count` is `reached`, and a half-written last one, so that a resumed log
    has each once."""
    if not log.is_file():
        return
    good = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)[count] <= reached:
                good.append(line)
        except json.JSONDecodeError:
            break
    with atomic_path(log) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in good), encoding="utf-8")
