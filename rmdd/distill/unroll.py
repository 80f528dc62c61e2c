"""Student steps and their meta-gradient: the engine of every trajectory-matching method.

M synthetic pairs, B of them in a mini-batch, K inner steps, F text width, H W image size.

A student takes K plain SGD steps on synthetic mini-batches. How far it ends from the expert's target is the
miss, and its gradient with respect to everything learnable comes from one sweep backwards over the stored
parameters, one step's graph at a time. With lambda = d miss / d theta_K and, per step,
q = -<eta lambda, grad_theta loss(theta_i)>:

    d eta -= <lambda, g_i>        d batch, d similarity += dq        exact only: lambda += dq / d theta_i

Leaving out the last update gives the estimator of TESLA, LoRS, RepBlend and PTM-ST (`first_order`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, zeros_like
from rmdd.models.dual import TOWERS, Params, tower_of

StudentLoss = Callable[[Params, Tensor, Tensor, Tensor, int], Tensor]
"""(parameters, images (B,3,H,W), texts (B,F), target similarity (B,B), step) -> scalar loss."""


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
) -> MetaGradient:
    """Train from `start` on `synthetic` for K steps and differentiate the miss to `target`.

    Memory: K+1 sets of parameters and the graph of one step. `student_loss` must give the same value for the
    same step in both passes (dropout draws by step). Raises `ValueError` when start equals target in a tower.
    """
    rates = {"image": synthetic.lr_image, "text": synthetic.lr_text}
    visited = [start]
    first_loss = None
    for step, index in enumerate(batches):
        theta = _leaves(visited[-1])
        pairs = _pairs_at(synthetic, index)
        loss = student_loss(theta, pairs["images"], pairs["texts"], _target(synthetic, pairs), step)
        grads = torch.autograd.grad(loss, list(theta.values()), allow_unused=True, materialize_grads=True)
        first_loss = loss.detach() if first_loss is None else first_loss
        visited.append({n: p.detach() - rates[tower_of(n)] * g for (n, p), g in zip(theta.items(), grads, strict=True)})

    miss, adjoint = _miss(visited[-1], start, target, branches)
    gradient = zeros_like(synthetic)
    rate_gradient = {"image": gradient.lr_image, "text": gradient.lr_text}
    for step in reversed(range(len(batches))):
        theta = _leaves(visited.pop(-2))
        pairs = {n: t.requires_grad_() for n, t in _pairs_at(synthetic, batches[step]).items()}
        loss = student_loss(theta, pairs["images"], pairs["texts"], _target(synthetic, pairs), step)
        grads = torch.autograd.grad(
            loss, list(theta.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        along = {tower: loss.new_zeros(()) for tower in TOWERS}
        for name, g in zip(theta, grads, strict=True):
            along[tower_of(name)] = along[tower_of(name)] + (adjoint[name] * g).sum()
        q = -(rates["image"] * along["image"] + rates["text"] * along["text"])
        for tower in TOWERS:
            rate_gradient[tower] -= along[tower].detach()
        wanted = list(pairs.values()) + (list(theta.values()) if estimator == "exact" else [])
        back = torch.autograd.grad(q, wanted, allow_unused=True, materialize_grads=True)
        _add(gradient, batches[step], dict(zip(pairs, back, strict=False)))
        if estimator == "exact":
            adjoint = {n: a + d for (n, a), d in zip(adjoint.items(), back[len(pairs) :], strict=True)}
    assert first_loss is not None
    return MetaGradient(
        loss=sum(miss.values(), first_loss.new_zeros(())), miss=miss, gradient=gradient, student_loss=first_loss
    )


def _leaves(params: Params) -> Params:
    return {n: p.detach().requires_grad_() for n, p in params.items()}


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


def _miss(end: Params, start: Params, target: Params, branches: str) -> tuple[dict[str, Tensor], Params]:
    """The miss per tower and d miss / d end. Merged: both towers share one denominator."""
    scale = {tower: squared_distance(start, target, tower) for tower in TOWERS}
    for tower, d in scale.items():
        if d == 0 and any(tower_of(n) == tower for n in start):
            raise ValueError(
                f"start and target have the same {tower} parameters, so there is nothing to match; "
                "start before the endpoint and train that tower"
            )
    if branches == "merged":
        both = scale["image"] + scale["text"]
        scale = {tower: both for tower in TOWERS}
    present = [t for t in TOWERS if any(tower_of(n) == t for n in start)]
    miss = {tower: squared_distance(end, target, tower) / scale[tower] for tower in present}
    adjoint = {n: 2 * (end[n] - target[n]) / scale[tower_of(n)] for n in end}
    return miss, adjoint


def squared_distance(a: Params, b: Params, tower: str) -> Float[Tensor, ""]:
    """Squared Euclidean distance over the parameters of one tower."""
    total = next(iter(a.values())).new_zeros(())
    for name in a:
        if tower_of(name) == tower:
            total = total + (a[name] - b[name]).square().sum()
    return total
