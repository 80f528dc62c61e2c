"""Student steps and their meta-gradient: the engine of every trajectory-matching method.

M synthetic pairs, B of them in a mini-batch, K inner steps, F text width, H W image size, P parameters.

A student takes K plain SGD steps on synthetic mini-batches. How far it ends from the expert's target is the
miss, and its gradient with respect to everything learnable comes from one sweep backwards over the steps, one
step's graph at a time. With lambda = d miss / d theta_K and, per step, q = -<eta lambda, grad_theta loss(theta_i)>:

    d eta -= <lambda, g_i>        d batch, d similarity += dq        exact only: lambda += dq / d theta_i

Leaving out the last update gives the estimator of TESLA, LoRS, RepBlend and PTM-ST (`first_order`).
All parameters lie in one vector, the image tower's first. theta_i is kept, not stepped back to from theta_i+1: a ulp
flips a ReLU whose input is exactly zero, as behind a norm that starts at zero.
"""

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, zeros_like
from rmdd.models.dual import TOWERS, Params, tower_of
from rmdd.models.fused import TwiceDifferentiable

logger = logging.getLogger(__name__)

SMALLEST_RATE = 1e-4

StudentLoss = Callable[[Params, Tensor, Tensor, Tensor, int], Tensor]
"""(parameters, images (B,3,H,W), texts (B,F), target similarity (B,B), step) -> scalar loss."""


@dataclass(frozen=True)
class Engine:
    """How the same numbers are computed, but for `bfloat16`."""

    second_pass: Literal["forward", "reverse"] = "reverse"
    """How q is differentiated: reverse twice, or reverse over forward mode, which never forms weight gradients whose
    value is not needed. torch's forward mode of some operations may not be differentiated again: ask
    `forward_suits` first."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: the student's matrix products; parameters, lambda and every sum over them stay as they are."""
    trajectory: Literal["device", "cpu", "recompute"] = "device"
    """Where the K vectors of parameters wait for the second pass; `recompute` keeps about 2 sqrt(K) of them and
    takes most steps of the first pass twice."""


@dataclass(frozen=True)
class MetaGradient:
    """The miss after K steps and its gradient with respect to every learnable tensor."""

    loss: Float[Tensor, ""]
    miss: dict[str, Float[Tensor, ""]]
    """Per tower: squared distance to the target over that of the start."""
    gradient: Synthetic
    student_loss: Float[Tensor, ""]
    """Inner loss of the first step."""


def meta_gradient(
    student_loss: StudentLoss,
    start: Params,
    target: Params,
    synthetic: Synthetic,
    batches: Int[Tensor, "K B"],
    *,
    estimator: Literal["exact", "first_order"] = "exact",
    branches: Literal["separate", "merged"] = "separate",
    engine: Engine = Engine(),
) -> MetaGradient:
    """Train from `start` on `synthetic` for K steps and differentiate the miss to `target`.

    Memory: K+4 sets of parameters and the graph of one step. `student_loss` must give the same value for the
    same step in both passes (dropout draws by step). Raises `ValueError` when start equals target in a tower.
    """
    layout = _Layout.of(start)
    rates = {"image": synthetic.lr_image, "text": synthetic.lr_text}
    passes = _Passes(student_loss, synthetic, batches, layout, engine)
    begin, goal = layout.flat(start), layout.flat(target)
    reach, numbers = _reach(begin, goal, layout, branches, rates)
    if min(map(abs, numbers)) < SMALLEST_RATE:  # then g cannot be had from the parameters before and after a step
        passes.mode = "reverse"

    path = _Path(passes, rates, begin, engine.trajectory)
    after = path.end
    miss = {t: (after[part] - goal[part]).square().sum() / reach[t] for t, part in layout.towers.items()}
    adjoint = goal.neg_().add_(after)
    for tower, part in layout.towers.items():
        adjoint[part] *= 2 / reach[tower]

    gradient = zeros_like(synthetic)
    rate_gradient = {"image": gradient.lr_image, "text": gradient.lr_text}
    for step, theta in path.back():
        direction = torch.empty_like(adjoint)
        for tower, part in layout.towers.items():
            torch.mul(adjoint[part], -rates[tower], out=direction[part])
        pairs, on_theta, g = passes.second(theta, direction, step, estimator == "exact")
        for tower, part in layout.towers.items():
            along = torch.dot(adjoint[part], after[part] - theta[part] if g is None else g[part])
            rate_gradient[tower] += along / rates[tower] if g is None else -along
        _add(gradient, batches[step], pairs)
        if on_theta:
            adjoint += layout.join(on_theta)
        after = theta
    return MetaGradient(
        loss=sum(miss.values(), begin.new_zeros(())), miss=miss, gradient=gradient, student_loss=path.first_loss
    )


@dataclass(frozen=True)
class _Layout:
    """Where each parameter lies in the vector of all of them."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    towers: dict[str, slice]

    @classmethod
    def of(cls, params: Params) -> "_Layout":
        names = tuple(n for tower in TOWERS for n in params if tower_of(n) == tower)
        towers, at = {}, 0
        for tower in TOWERS:
            size = sum(params[n].numel() for n in names if tower_of(n) == tower)
            if size:
                towers[tower] = slice(at, at + size)
            at += size
        return cls(names, tuple(params[n].shape for n in names), towers)

    def flat(self, params: Params) -> Float[Tensor, " P"]:
        return self.join([params[n].detach() for n in self.names])

    def join(self, parts: list[Tensor] | tuple[Tensor, ...]) -> Float[Tensor, " P"]:
        return torch.cat([p.reshape(-1) for p in parts])

    def split(self, vector: Float[Tensor, " P"]) -> list[Tensor]:
        parts = vector.split([s.numel() for s in self.shapes])
        return [p.view(s) for p, s in zip(parts, self.shapes, strict=True)]


_Second = tuple[dict[str, Tensor], tuple[Tensor, ...], Tensor | None]


class _Passes:
    """One student step, differentiated once or twice."""

    def __init__(self, loss: StudentLoss, synthetic: Synthetic, batches: Tensor, layout: _Layout, engine: Engine):
        self.student_loss, self.synthetic, self.batches, self.layout = loss, synthetic, batches, layout
        self.half = engine.precision == "bfloat16"
        self.mode = engine.second_pass

    def loss(self, theta: list[Tensor], pairs: dict[str, Tensor], step: int) -> Float[Tensor, ""]:
        params = dict(zip(self.layout.names, theta, strict=True))
        target = _target(self.synthetic, pairs)
        with TwiceDifferentiable(), torch.autocast(target.device.type, torch.bfloat16, enabled=self.half):
            return self.student_loss(params, pairs["images"], pairs["texts"], target, step)

    def first(self, theta: Float[Tensor, " P"], step: int) -> tuple[Tensor, Float[Tensor, " P"]]:
        """The loss and its gradient."""
        leaves = [p.detach().requires_grad_() for p in self.layout.split(theta)]
        loss = self.loss(leaves, _pairs_at(self.synthetic, self.batches[step]), step)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), self.layout.join(grads)

    def second(self, theta: Float[Tensor, " P"], along: Float[Tensor, " P"], step: int, exact: bool) -> _Second:
        """Gradient of <along, grad_theta loss> in the pairs and, if `exact`, in theta; reverse mode has g as well."""
        pairs = {n: t.requires_grad_() for n, t in _pairs_at(self.synthetic, self.batches[step]).items()}
        return (self.by_forward if self.mode == "forward" else self.by_reverse)(theta, along, pairs, step, exact)

    def by_reverse(self, theta: Tensor, along: Tensor, pairs: dict[str, Tensor], step: int, exact: bool) -> _Second:
        leaves = [p.detach().requires_grad_() for p in self.layout.split(theta)]
        grads = torch.autograd.grad(
            self.loss(leaves, pairs, step), leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        reached = [(g, v) for g, v in zip(grads, self.layout.split(along), strict=True) if g.requires_grad]
        back = self._divide([g for g, _ in reached], [v for _, v in reached], pairs, leaves if exact else [])
        return *back, self.layout.join([g.detach() for g in grads])

    def by_forward(self, theta: Tensor, along: Tensor, pairs: dict[str, Tensor], step: int, exact: bool) -> _Second:
        _load_forward_mode()
        leaves = [p.detach().requires_grad_(exact) for p in self.layout.split(theta)]
        with forward_ad.dual_level():
            moving = [forward_ad.make_dual(p, v) for p, v in zip(leaves, self.layout.split(along), strict=True)]
            slope = forward_ad.unpack_dual(self.loss(moving, pairs, step)).tangent
        return *self._divide([slope], None, pairs, leaves if exact else []), None

    @staticmethod
    def _divide(
        outputs: list[Tensor], weights: list[Tensor] | None, pairs: dict[str, Tensor], leaves: list[Tensor]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        back = torch.autograd.grad(
            outputs, [*pairs.values(), *leaves], weights, allow_unused=True, materialize_grads=True
        )
        return dict(zip(pairs, back, strict=False)), back[len(pairs) :]


@functools.cache
def _load_forward_mode() -> None:
    """torch scripts some formulas when it first makes a dual number, and warns of its own deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401


def forward_suits(
    student_loss: StudentLoss,
    start: Params,
    synthetic: Synthetic,
    batch: Int[Tensor, " B"],
    *,
    estimator: Literal["exact", "first_order"] = "exact",
    precision: Literal["float32", "bfloat16"] = "float32",
) -> bool:
    """Whether forward mode differentiates q of this student as reverse mode does, tried on one batch along a direction
    that `start` decides. In float32 it finds gross errors only. Says in a warning why it does not suit."""
    layout = _Layout.of(start)
    passes = _Passes(student_loss, synthetic, batch[None], layout, Engine(precision=precision))
    theta, exact = layout.flat(start), estimator == "exact"
    along = torch.sin(torch.arange(theta.numel(), device=theta.device)).to(theta) * theta.abs().mean()
    pairs = {n: t.requires_grad_() for n, t in _pairs_at(synthetic, batch).items()}
    parts, on_theta, _ = passes.by_reverse(theta, along, pairs, 0, exact)
    expected = [*parts.values(), *([layout.join(on_theta)] if on_theta else [])]
    try:
        parts, on_theta, _ = passes.by_forward(theta, along, pairs, 0, exact)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
    else:
        least = 1e-6 * max(e.norm() for e in expected)  # a gradient of nothing but rounding is not compared
        found = [*parts.values(), *([layout.join(on_theta)] if on_theta else [])]
        gaps = [(f - e).norm() / torch.maximum(e.norm(), least) for e, f in zip(expected, found, strict=True)]
        gap = torch.stack(gaps).max().item()
        tolerance = 0.1 if passes.half else 1e-8 if theta.dtype == torch.float64 else 1e-2
        reason = "" if gap < tolerance else f"they differ by {gap:.1e}"
    if reason:
        logger.warning("forward mode does not suit this student (%s); the second pass uses reverse mode", reason)
    return not reason


class _Path:
    """The student's K steps: its end, and backwards the parameters before each step."""

    def __init__(self, passes: _Passes, rates: dict[str, Tensor], begin: Float[Tensor, " P"], place: str):
        self.passes, self.rates, self.place, self.device = passes, rates, place, begin.device
        steps = len(passes.batches)
        self.stride = math.isqrt(steps - 1) + 1 if place == "recompute" else steps
        self.starts: list[Tensor] = []
        self.first_loss, self.end = begin.new_zeros(()), begin
        for first in range(0, steps, self.stride):
            self.starts.append(self.end)
            self.kept = self._walk(first, min(first + self.stride, steps))

    def back(self) -> Iterator[tuple[int, Float[Tensor, " P"]]]:
        step = len(self.passes.batches)
        self.end = self.starts[-1]  # the caller has the last parameters, and lets go of them
        while self.starts:
            while self.kept:
                step -= 1
                yield step, self.kept.pop().to(self.device)
            self.starts.pop()
            if self.starts:
                self.end = self.starts[-1]
                self.kept = self._walk(step - self.stride, step)

    def _walk(self, first: int, last: int) -> list[Tensor]:
        """From `end` through steps first .. last - 1; the parameters before each."""
        kept = []
        for step in range(first, last):
            theta = self.end
            loss, g = self.passes.first(theta, step)
            if step == 0:
                self.first_loss = loss
            kept.append(theta.cpu() if self.place == "cpu" else theta)
            for tower, part in self.passes.layout.towers.items():
                torch.addcmul(theta[part], g[part], self.rates[tower], value=-1, out=g[part])
            self.end = g
        return kept


def _pairs_at(synthetic: Synthetic, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
    parts = similarity.gather(synthetic.similarity, index)
    named = {"images": synthetic.images[index], "texts": synthetic.texts[index]}
    return named | {f"similarity.{n}": t for n, t in parts.items()}


def _target(synthetic: Synthetic, pairs: dict[str, Tensor]) -> Float[Tensor, "B B"]:
    parts = {n: pairs[f"similarity.{n}"] for n in synthetic.similarity}
    return similarity.dense(parts, synthetic.alpha, pairs["texts"])


def _add(total: Synthetic, index: Int[Tensor, " B"], parts: dict[str, Tensor]) -> None:
    total.images.index_add_(0, index, parts["images"])
    total.texts.index_add_(0, index, parts["texts"])
    similarity.scatter_add(total.similarity, index, {n: parts[f"similarity.{n}"] for n in total.similarity})


def _reach(
    begin: Tensor, goal: Tensor, layout: _Layout, branches: str, rates: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[float]]:
    """Squared distance from start to target per tower (merged: of both together), and the rates as numbers.

    The only place of a step that waits for the device.
    """
    reach = {tower: (begin[part] - goal[part]).square().sum() for tower, part in layout.towers.items()}
    numbers = torch.stack([*reach.values(), *(rates[tower] for tower in reach)]).tolist()
    for tower, distance in zip(reach, numbers, strict=False):
        if distance == 0:
            raise ValueError(
                f"start and target have the same {tower} parameters, so there is nothing to match; "
                "start before the endpoint and train that tower"
            )
    if branches == "merged":
        both = torch.stack(list(reach.values())).sum()
        return dict.fromkeys(reach, both), numbers[len(reach) :]
    return reach, numbers[len(reach) :]


def squared_distance(a: Params, b: Params, tower: str) -> Float[Tensor, ""]:
    """Squared Euclidean distance over the parameters of one tower."""
    total = next(iter(a.values())).new_zeros(())
    for name in a:
        if tower_of(name) == tower:
            total = total + (a[name] - b[name]).square().sum()
    return total
