"""Student steps and their meta-gradient: the engine of every trajectory-matching method.

M synthetic pairs, B of them in a mini-batch, K inner steps, F text width, H W image size, P parameters.

A student takes K plain SGD steps on synthetic mini-batches. How far it ends from the expert's target is the
miss, and its gradient with respect to everything learnable comes from one sweep backwards over the steps, one
step's graph at a time. With lambda = d miss / d theta_K and, per step, q = -<eta lambda, grad_theta loss(theta_i)>:

    d eta -= <lambda, g_i>        d batch, d similarity += dq        exact only: lambda += dq / d theta_i

Leaving out the last update gives the estimator of TESLA, LoRS, RepBlend and PTM-ST (`first_order`).
theta_i is kept, not stepped back to from theta_i+1: a ulp flips a ReLU whose input is exactly zero, as behind a norm
that starts at zero.
"""

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, zeros_like
from rmdd.models.dual import TOWERS, Params, tower_of
from rmdd.models.group_norm import TwiceDifferentiable

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
    reuse: int = 0
    """The last so many steps (with `recompute`, of its last stretch) keep the graph of the first pass for the second,
    which is then in reverse mode: about two ninths less arithmetic for each, and one graph more to hold for each beyond
    the first."""


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

    Memory: the K sets of parameters, a few more, and the graph of one step. `student_loss` must give the same value for
    the same step in both passes (dropout draws by step). Raises `ValueError` when start equals target in a tower.
    """
    layout = _Layout.of(start)
    begin, goal = layout.listed(start), layout.listed(target)
    reach, rates = _reach(begin, goal, layout, branches, {"image": synthetic.lr_image, "text": synthetic.lr_text})
    passes = _Passes(student_loss, synthetic, batches, layout, engine)
    tiny = min(map(abs, rates.values())) < SMALLEST_RATE  # then g cannot be had from the way from theta_i to theta_i+1
    if tiny:
        passes.mode = "reverse"

    path = _Path(passes, rates, begin, engine)
    adjoint = list(torch._foreach_sub(path.end, goal))
    miss = {t: _squared(adjoint[part]) / reach[t] for t, part in layout.parts()}
    for tower, part in layout.parts():
        torch._foreach_mul_(adjoint[part], 2 / reach[tower])

    gradient = zeros_like(synthetic)
    rate_gradient = {"image": gradient.lr_image, "text": gradient.lr_text}
    stays = estimator == "first_order" and not tiny
    if stays:  # lambda meets the sum of all g, and is needed as -eta lambda from then on
        for tower, part in layout.parts():
            rate_gradient[tower] += _along(adjoint[part], path.end[part], begin[part]) / rates[tower]
            torch._foreach_mul_(adjoint[part], -rates[tower])
    after = None if stays else path.end
    for step, theta, graph in path.back():
        direction = adjoint if after is None else layout.scaled(adjoint, rates)
        pairs, on_theta, g = passes.second(theta, direction, step, estimator == "exact", graph)
        _add(gradient, batches[step], pairs)
        if after is not None:
            for tower, part in layout.parts():
                if tiny:
                    rate_gradient[tower] -= _along(adjoint[part], g[part])
                else:
                    rate_gradient[tower] += _along(adjoint[part], after[part], theta[part]) / rates[tower]
            after = theta
        if on_theta:
            torch._foreach_add_(adjoint, on_theta)
    return MetaGradient(
        loss=sum(miss.values(), torch.zeros_like(gradient.lr_image)),
        miss=miss,
        gradient=gradient,
        student_loss=path.first_loss,
    )


Vector = list[Tensor]
"""All parameters, the image tower's first: a list, for to lay them end to end costs as much as to step."""


@dataclass(frozen=True)
class _Layout:
    """Where each parameter lies in the list of all of them."""

    names: tuple[str, ...]
    towers: dict[str, slice]

    @classmethod
    def of(cls, params: Params) -> "_Layout":
        each = {tower: [n for n in params if tower_of(n) == tower] for tower in TOWERS}
        split, total = len(each["image"]), len(params)
        places = {"image": slice(0, split), "text": slice(split, total)}
        return cls((*each["image"], *each["text"]), {t: places[t] for t in TOWERS if each[t]})

    def parts(self) -> Iterable[tuple[str, slice]]:
        return self.towers.items()

    def listed(self, params: Params) -> Vector:
        return [params[n].detach() for n in self.names]

    def scaled(self, vector: Vector, rates: dict[str, float]) -> Vector:
        """Times minus the rate of each tower."""
        return [p for tower, part in self.parts() for p in torch._foreach_mul(vector[part], -rates[tower])]


@dataclass(frozen=True)
class _Graph:
    """The gradient of one step's loss, to be differentiated once more."""

    pairs: dict[str, Tensor]
    leaves: Vector
    grads: tuple[Tensor, ...]


_Second = tuple[dict[str, Tensor], tuple[Tensor, ...], Vector]


class _Passes:
    """One student step, differentiated once or twice."""

    def __init__(self, loss: StudentLoss, synthetic: Synthetic, batches: Tensor, layout: _Layout, engine: Engine):
        self.student_loss, self.synthetic, self.batches, self.layout = loss, synthetic, batches, layout
        self.half = engine.precision == "bfloat16"
        self.mode = engine.second_pass

    def loss(self, theta: Vector, pairs: dict[str, Tensor], step: int) -> Float[Tensor, ""]:
        params = dict(zip(self.layout.names, theta, strict=True))
        target = _target(self.synthetic, pairs)
        with TwiceDifferentiable(), torch.autocast(target.device.type, torch.bfloat16, enabled=self.half):
            return self.student_loss(params, pairs["images"], pairs["texts"], target, step)

    def first(self, theta: Vector, step: int, *, keep: bool = False) -> tuple[Tensor, _Graph]:
        """The loss and its gradient; `keep`: so that it can be differentiated."""
        leaves = [p.detach().requires_grad_() for p in theta]
        pairs = {n: t.requires_grad_(keep) for n, t in _pairs_at(self.synthetic, self.batches[step]).items()}
        loss = self.loss(leaves, pairs, step)
        grads = torch.autograd.grad(loss, leaves, create_graph=keep, allow_unused=True, materialize_grads=True)
        return loss.detach(), _Graph(pairs, leaves, grads)

    def second(self, theta: Vector, along: Vector, step: int, exact: bool, graph: _Graph | None = None) -> _Second:
        """Gradient of <along, grad_theta loss> in the pairs and, if `exact`, in theta; reverse mode has g as well.

        `graph` is that of the first pass, where it was kept."""
        if self.mode == "forward" and graph is None:
            return self.by_forward(theta, along, step, exact)
        return self.by_reverse(theta, along, step, exact, graph)

    def by_reverse(self, theta: Vector, along: Vector, step: int, exact: bool, graph: _Graph | None = None) -> _Second:
        graph = graph or self.first(theta, step, keep=True)[1]
        reached = [(g, v) for g, v in zip(graph.grads, along, strict=True) if g.requires_grad]
        outputs, weights = [g for g, _ in reached], [v for _, v in reached]
        back = self._divide(outputs, weights, graph.pairs, graph.leaves if exact else [])
        return *back, [g.detach() for g in graph.grads]

    def by_forward(self, theta: Vector, along: Vector, step: int, exact: bool) -> _Second:
        _load_forward_mode()
        leaves = [p.detach().requires_grad_(exact) for p in theta]
        pairs = {n: t.requires_grad_() for n, t in _pairs_at(self.synthetic, self.batches[step]).items()}
        with forward_ad.dual_level():
            moving = [forward_ad.make_dual(p, v) for p, v in zip(leaves, along, strict=True)]
            slope = forward_ad.unpack_dual(self.loss(moving, pairs, step)).tangent
        return *self._divide([slope], None, pairs, leaves if exact else []), []

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
    layout, exact = _Layout.of(start), estimator == "exact"
    passes = _Passes(student_loss, synthetic, batch[None], layout, Engine(precision=precision))
    theta = layout.listed(start)
    size = _flat(theta).abs().mean()
    along = [torch.sin(torch.arange(1, p.numel() + 1, device=p.device)).to(p).view_as(p) * size for p in theta]
    parts, on_theta, _ = passes.by_reverse(theta, along, 0, exact)
    expected = [*parts.values(), *([_flat(on_theta)] if on_theta else [])]
    try:
        parts, on_theta, _ = passes.by_forward(theta, along, 0, exact)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
    else:
        least = 1e-6 * max(e.norm() for e in expected)  # a gradient of nothing but rounding is not compared
        found = [*parts.values(), *([_flat(on_theta)] if on_theta else [])]
        gaps = [(f - e).norm() / torch.maximum(e.norm(), least) for e, f in zip(expected, found, strict=True)]
        gap = torch.stack(gaps).max().item()
        tolerance = 0.1 if passes.half else 1e-8 if size.dtype == torch.float64 else 1e-2
        reason = "" if gap < tolerance else f"they differ by {gap:.1e}"
    if reason:
        logger.warning("forward mode does not suit this student (%s); the second pass uses reverse mode", reason)
    return not reason


class _Path:
    """The student's K steps: its end, and backwards the parameters before each."""

    def __init__(self, passes: _Passes, rates: dict[str, float], begin: Vector, engine: Engine):
        self.passes, self.rates, self.engine = passes, rates, engine
        self.steps = len(passes.batches)
        self.stride = math.isqrt(self.steps - 1) + 1 if engine.trajectory == "recompute" else self.steps
        self.starts: list[Vector] = []
        self.first_loss, self.end = begin[0].new_zeros(()), begin
        for first in range(0, self.steps, self.stride):
            self.starts.append(self.end)
            self.kept = self._walk(first, min(first + self.stride, self.steps))

    def back(self) -> Iterator[tuple[int, Vector, _Graph | None]]:
        step, device = self.steps, self.first_loss.device
        self.end = self.starts[-1]  # the caller has the last parameters, and lets go of them
        while self.starts:
            while self.kept:
                step -= 1
                theta, graph = self.kept.pop()
                yield step, [p.to(device) for p in theta], graph
                del theta, graph
            self.starts.pop()
            if self.starts:
                self.end = self.starts[-1]
                self.kept = self._walk(step - self.stride, step)

    def _walk(self, first: int, last: int) -> list[tuple[Vector, _Graph | None]]:
        """From `end` through steps first .. last - 1; the parameters before each, and the graphs that are reused."""
        kept: list[tuple[Vector, _Graph | None]] = []
        for step in range(first, last):
            theta = self.end
            keep = last == self.steps and step >= last - self.engine.reuse
            loss, graph = self.passes.first(theta, step, keep=keep)
            if step == 0:
                self.first_loss = loss
            waiting = [p.cpu() for p in theta] if self.engine.trajectory == "cpu" else theta
            kept.append((waiting, graph if keep else None))
            self.end = []
            for tower, part in self.passes.layout.parts():
                grads = [g.detach() for g in graph.grads[part]]
                self.end += torch._foreach_add(theta[part], grads, alpha=-self.rates[tower])
            del graph, grads
        return kept


def _pairs_at(synthetic: Synthetic, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
    parts = similarity.gather(synthetic.similarity, index)
    named = {"images": synthetic.images[index], "texts": synthetic.texts[index]}
    named |= {f"similarity.{n}": t for n, t in parts.items()}
    return {n: t.detach() for n, t in named.items()}  # a scalar diagonal is the set's own tensor


def _target(synthetic: Synthetic, pairs: dict[str, Tensor]) -> Float[Tensor, "B B"]:
    parts = {n: pairs[f"similarity.{n}"] for n in synthetic.similarity}
    return similarity.dense(parts, synthetic.alpha, pairs["texts"])


def _add(total: Synthetic, index: Int[Tensor, " B"], parts: dict[str, Tensor]) -> None:
    total.images.index_add_(0, index, parts["images"])
    total.texts.index_add_(0, index, parts["texts"])
    similarity.scatter_add(total.similarity, index, {n: parts[f"similarity.{n}"] for n in total.similarity})


def _reach(
    begin: Vector, goal: Vector, layout: _Layout, branches: str, rates: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Squared distance from start to target per tower (merged: of both together), and the rates as numbers.

    The only place of a step that waits for the device.
    """
    reach = {
        tower: _squared(b - g for b, g in zip(begin[part], goal[part], strict=True)) for tower, part in layout.parts()
    }
    numbers = torch.stack([*reach.values(), *(rates[tower] for tower in reach)]).tolist()
    for tower, distance in zip(reach, numbers, strict=False):
        if distance == 0:
            raise ValueError(
                f"start and target have the same {tower} parameters, so there is nothing to match; "
                "start before the endpoint and train that tower"
            )
    if branches == "merged":
        both = torch.stack(list(reach.values())).sum()
        reach = dict.fromkeys(reach, both)
    return reach, dict(zip(reach, numbers[len(reach) :], strict=True))


def _squared(vector: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Its squared length. (Norms that are squared afterwards lose digits in float32.)"""
    return torch.stack([part.square().sum() for part in vector]).sum()


def _along(vector: Vector, to: Vector, origin: Vector | None = None) -> Float[Tensor, ""]:
    """<vector, to - origin>."""
    ways = to if origin is None else (t - o for t, o in zip(to, origin, strict=True))
    return torch.stack([torch.dot(v.reshape(-1), w.reshape(-1)) for v, w in zip(vector, ways, strict=True)]).sum()


def _flat(vector: Sequence[Tensor]) -> Float[Tensor, " P"]:
    return torch.cat([p.reshape(-1) for p in vector])


def squared_distance(a: Params, b: Params, tower: str) -> Float[Tensor, ""]:
    """Squared Euclidean distance over the parameters of one tower."""
    total = next(iter(a.values())).new_zeros(())
    for name in a:
        if tower_of(name) == tower:
            total = total + (a[name] - b[name]).square().sum()
    return total
