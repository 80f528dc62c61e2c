"""Student steps and their meta-gradient: the engine of every trajectory-matching method.

Symbols: M synthetic pairs, B of them in a mini-batch, K inner steps, F text width, H W image size, P parameters.

A student takes K plain SGD steps on synthetic mini-batches. The miss is the distance from its parameters after these
steps to the expert's target. The gradient of the miss with respect to all learnable tensors is computed backwards, step
by step, with the graph of one step in memory. The first value of lambda is d miss / d theta_K. For every step i, with
gradient g_i and learning rate eta, q = -<eta lambda, grad_theta loss(theta_i)> and

    d eta -= <lambda, g_i>        d batch, d similarity += dq        exact only: lambda += dq / d theta_i

TESLA, LoRS, RepBlend and PTM-ST leave lambda unchanged (`first_order`). All theta_i are stored. A theta_i recomputed
from theta_i+1 would be rounded differently. This can flip a ReLU whose input is exactly zero, for example after a
normalisation layer that starts at zero.
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
"""Loss of one inner step: (parameters, images (B,3,H,W), texts (B,F), target similarity (B,B), step) -> scalar loss."""


@dataclass(frozen=True)
class Engine:
    """Speed and memory options of the meta-gradient; only `bfloat16` changes the gradient by more than rounding."""

    second_pass: Literal["forward", "reverse"] = "reverse"
    """How the second pass differentiates twice: in reverse mode, or in reverse over forward mode, which skips weight
    gradients that are not needed. Some torch operations have a forward mode that cannot be differentiated again; check
    with `forward_suits` first."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of the student's matrix products only; everything else has the number type of the parameters."""
    trajectory: Literal["device", "cpu", "recompute"] = "device"
    """Where the K parameter vectors are stored until the second pass. `recompute` stores only about 2 sqrt(K) vectors
    and computes most steps of the first pass twice."""
    reuse: int = 0
    """Number of last steps whose autograd graphs are kept for the second pass. With `recompute`, only steps after the
    last stored vector keep a graph. A step with a kept graph uses reverse mode and needs about 2/9 less arithmetic; its
    graph occupies memory."""


@dataclass(frozen=True)
class MetaGradient:
    """The miss (distance to the target after K steps), and its gradient with respect to every learnable tensor."""

    loss: Float[Tensor, ""]
    miss: dict[str, Float[Tensor, ""]]
    """For each tower, the squared distance to the target after K steps, divided by the one before the first step."""
    gradient: Synthetic
    student_loss: Float[Tensor, ""]
    """Loss of the student in its first inner step."""


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
    """Train a student from `start` on `synthetic` for K steps, and differentiate its distance to `target` (the miss).

    The memory holds a few more than K copies of the parameters, and the graph of one step. `student_loss` must return
    the same value for a step in both passes, so dropout has to be seeded by step. Raises `ValueError` when start and
    target are equal in a tower.
    """
    layout = _Layout.of(start)
    begin, goal = layout.listed(start), layout.listed(target)
    reach, rates = _reach(begin, goal, layout, branches, {"image": synthetic.lr_image, "text": synthetic.lr_text})
    passes = _Passes(student_loss, synthetic, batches, layout, engine)
    tiny = min(map(abs, rates.values())) < SMALLEST_RATE  # then theta_i+1 - theta_i is mostly rounding error
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
    if stays:  # lambda is constant, so compute its product with the sum of all g once; then scale lambda to -eta lambda
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
"""All parameters as a list, those of the image tower first; concatenating them would cost as much as an SGD step."""


@dataclass(frozen=True)
class _Layout:
    """The names of the parameters in the order of a `Vector`, and the slice of the `Vector` that each tower has."""

    names: tuple[str, ...]
    towers: dict[str, slice]

    @classmethod
    def of(cls, params: Params) -> "_Layout":
        names = {tower: [n for n in params if tower_of(n) == tower] for tower in TOWERS}
        split, total = len(names["image"]), len(params)
        slices = {"image": slice(0, split), "text": slice(split, total)}
        return cls((*names["image"], *names["text"]), {t: slices[t] for t in TOWERS if names[t]})

    def parts(self) -> Iterable[tuple[str, slice]]:
        return self.towers.items()

    def listed(self, params: Params) -> Vector:
        return [params[n].detach() for n in self.names]

    def scaled(self, vector: Vector, rates: dict[str, float]) -> Vector:
        """Multiply the part of each tower in `vector` by minus the learning rate of this tower."""
        return [p for tower, part in self.parts() for p in torch._foreach_mul(vector[part], -rates[tower])]


@dataclass(frozen=True)
class _Graph:
    """The loss gradient of one step, with its autograd graph, so that the gradient can be differentiated again."""

    pairs: dict[str, Tensor]
    leaves: Vector
    grads: tuple[Tensor, ...]


_Second = tuple[dict[str, Tensor], tuple[Tensor, ...], Vector]


class _Passes:
    """Computes first and second derivatives of single student steps."""

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
        """Return the loss of a step and its gradient; `keep` retains the graph, so the gradient is differentiable."""
        leaves = [p.detach().requires_grad_() for p in theta]
        pairs = {n: t.requires_grad_(keep) for n, t in _pairs_at(self.synthetic, self.batches[step]).items()}
        loss = self.loss(leaves, pairs, step)
        grads = torch.autograd.grad(loss, leaves, create_graph=keep, allow_unused=True, materialize_grads=True)
        return loss.detach(), _Graph(pairs, leaves, grads)

    def second(self, theta: Vector, along: Vector, step: int, exact: bool, graph: _Graph | None = None) -> _Second:
        """Differentiate <along, grad_theta loss> with respect to the pairs and, if `exact`, to theta.

        Also returns the gradient g of the step in reverse mode, or an empty list in forward mode. `graph` is the step's
        graph from the first pass, or None if that graph was not kept."""
        if self.mode == "forward" and graph is None:
            return self.by_forward(theta, along, step, exact)
        return self.by_reverse(theta, along, step, exact, graph)

    def by_reverse(self, theta: Vector, along: Vector, step: int, exact: bool, graph: _Graph | None = None) -> _Second:
        graph = graph or self.first(theta, step, keep=True)[1]
        outputs = [g for g in graph.grads if g.requires_grad]
        weights = [v for g, v in zip(graph.grads, along, strict=True) if g.requires_grad]
        derivatives = self._differentiate(outputs, weights, graph.pairs, graph.leaves if exact else [])
        return *derivatives, [g.detach() for g in graph.grads]

    def by_forward(self, theta: Vector, along: Vector, step: int, exact: bool) -> _Second:
        _load_forward_mode()
        leaves = [p.detach().requires_grad_(exact) for p in theta]
        pairs = {n: t.requires_grad_() for n, t in _pairs_at(self.synthetic, self.batches[step]).items()}
        with forward_ad.dual_level():
            moving = [forward_ad.make_dual(p, v) for p, v in zip(leaves, along, strict=True)]
            slope = forward_ad.unpack_dual(self.loss(moving, pairs, step)).tangent
        return *self._differentiate([slope], None, pairs, leaves if exact else []), []

    @staticmethod
    def _differentiate(
        outputs: list[Tensor], weights: list[Tensor] | None, pairs: dict[str, Tensor], leaves: list[Tensor]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        grads = torch.autograd.grad(
            outputs, [*pairs.values(), *leaves], weights, allow_unused=True, materialize_grads=True
        )
        return dict(zip(pairs, grads, strict=False)), grads[len(pairs) :]


@functools.cache
def _load_forward_mode() -> None:
    """Import torch's forward-mode formulas once, and silence a deprecation warning about torch's own code."""
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
    """Return whether forward mode gives the same second derivatives as reverse mode for this student; warn if not.

    Both modes are compared on one batch, along a direction computed from `start`. In float32, only gross errors are
    detected.
    """
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
        smallest = 1e-6 * max(e.norm() for e in expected)  # smaller gradients are mostly rounding errors
        actual = [*parts.values(), *([_flat(on_theta)] if on_theta else [])]
        gaps = [(a - e).norm() / torch.maximum(e.norm(), smallest) for e, a in zip(expected, actual, strict=True)]
        gap = torch.stack(gaps).max().item()
        tolerance = 0.1 if passes.half else 1e-8 if size.dtype == torch.float64 else 1e-2
        reason = "" if gap < tolerance else f"its derivatives differ from those of reverse mode by {gap:.1e}"
    if reason:
        logger.warning("forward mode does not suit this student (%s); the second pass uses reverse mode", reason)
    return not reason


class _Path:
    """The path of a student in K steps: the last parameters and, in reverse order, the parameters before each step."""

    def __init__(self, passes: _Passes, rates: dict[str, float], begin: Vector, engine: Engine):
        self.passes, self.rates, self.engine = passes, rates, engine
        self.steps = len(passes.batches)
        self.stride = math.isqrt(self.steps - 1) + 1 if engine.trajectory == "recompute" else self.steps
        self.starts: list[Vector] = []
        self.first_loss, self.end = begin[0].new_zeros(()), begin
        for first in range(0, self.steps, self.stride):
            self.starts.append(self.end)
            self.segment = self._walk(first, min(first + self.stride, self.steps))

    def back(self) -> Iterator[tuple[int, Vector, _Graph | None]]:
        step, device = self.steps, self.first_loss.device
        self.end = self.starts[-1]  # drop our reference to the last parameters, so the caller can free them
        while self.starts:
            while self.segment:
                step -= 1
                theta, graph = self.segment.pop()
                yield step, [p.to(device) for p in theta], graph
                del theta, graph
            self.starts.pop()
            if self.starts:
                self.end = self.starts[-1]
                self.segment = self._walk(step - self.stride, step)

    def _walk(self, first: int, last: int) -> list[tuple[Vector, _Graph | None]]:
        """Take steps `first` to `last` - 1 from `end`; return the parameters before each step, and graphs to reuse."""
        segment: list[tuple[Vector, _Graph | None]] = []
        for step in range(first, last):
            theta = self.end
            keep = last == self.steps and step >= last - self.engine.reuse
            loss, graph = self.passes.first(theta, step, keep=keep)
            if step == 0:
                self.first_loss = loss
            stored = [p.cpu() for p in theta] if self.engine.trajectory == "cpu" else theta
            segment.append((stored, graph if keep else None))
            self.end = []
            for tower, part in self.passes.layout.parts():
                grads = [g.detach() for g in graph.grads[part]]
                self.end += torch._foreach_add(theta[part], grads, alpha=-self.rates[tower])
            del graph, grads
        return segment


def _pairs_at(synthetic: Synthetic, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
    parts = similarity.gather(synthetic.similarity, index)
    named = {"images": synthetic.images[index], "texts": synthetic.texts[index]}
    named |= {f"similarity.{n}": t for n, t in parts.items()}
    return {n: t.detach() for n, t in named.items()}  # `gather` does not copy a scalar diagonal


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
    """Return each tower's squared distance from start to target (`merged`: the sum of both), and its learning rate.

    This is the only place in a meta-gradient where the CPU waits for the device.
    """
    reach = {
        tower: _squared(b - g for b, g in zip(begin[part], goal[part], strict=True)) for tower, part in layout.parts()
    }
    numbers = torch.stack([*reach.values(), *(rates[tower] for tower in reach)]).tolist()
    for tower, distance in zip(reach, numbers, strict=False):
        if distance == 0:
            raise ValueError(
                f"start and target have the same {tower} parameters, so there is nothing to match; "
                "choose a start before the endpoint, and experts that train this tower"
            )
    if branches == "merged":
        both = torch.stack(list(reach.values())).sum()
        reach = dict.fromkeys(reach, both)
    return reach, dict(zip(reach, numbers[len(reach) :], strict=True))


def _squared(vector: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Return the squared length of `vector`; squaring `norm()` instead would lose digits in float32."""
    return torch.stack([part.square().sum() for part in vector]).sum()


def _along(vector: Vector, to: Vector, origin: Vector | None = None) -> Float[Tensor, ""]:
    """Return the scalar product <vector, to - origin>; `origin` defaults to zero."""
    differences = to if origin is None else (t - o for t, o in zip(to, origin, strict=True))
    dots = [torch.dot(v.reshape(-1), d.reshape(-1)) for v, d in zip(vector, differences, strict=True)]
    return torch.stack(dots).sum()


def _flat(vector: Sequence[Tensor]) -> Float[Tensor, " P"]:
    return torch.cat([p.reshape(-1) for p in vector])


def squared_distance(a: Params, b: Params, tower: str) -> Float[Tensor, ""]:
    """Return the squared Euclidean distance between the parameters of one tower."""
    total = next(iter(a.values())).new_zeros(())
    for name in a:
        if tower_of(name) == tower:
            total = total + (a[name] - b[name]).square().sum()
    return total
