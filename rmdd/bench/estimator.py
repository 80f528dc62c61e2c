"""`rmdd bench estimator`: compare the first-order meta-gradient with the exact one during a distillation. The outer
loop uses the estimator of the run. At regular intervals, both estimators compute a gradient for the same set and the
same draw; the two gradients are compared tensor by tensor. Nothing is saved.
"""

import math
import statistics
from typing import Any, Literal

import torch
from torch import Tensor

from rmdd import config, methods
from rmdd.core.device import device_of
from rmdd.distill.chain import is_chained
from rmdd.distill.loop import State, outer_step
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory.matching import Matcher
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.models.dual import DualEncoder
from rmdd.pipeline import Pipeline


def compare_estimators(
    run: config.Run,
    phase: int,
    store: Store,
    model: DualEncoder,
    initial: Synthetic,
    device: torch.device,
    *,
    iterations: int,
    every: int,
) -> list[dict[str, Any]]:
    """Run the outer loop and compare both estimators every `every` iterations; return one row per comparison.

    A row has `iteration`, `start` (epoch) and `loss`. For each tensor of the set, it has the cosine of both gradients
    and the ratio of their norms (first-order over exact). The cosine of a learning rate, a scalar, is 1 or -1. If the
    loss is not finite, the loop ends, and the field `stopped` of the last row says why.
    """
    matcher = Matcher(methods.matching_method(run), phase, store, model, device)
    state = State.begin(initial).to(device)
    used = run.distill.estimator
    other: Literal["exact", "first_order"] = "first_order" if used == "exact" else "exact"
    rows: list[dict[str, Any]] = []
    while state.iteration < iterations:
        drawn = matcher.draw(state.iteration)
        result = matcher.gradient(state.raw, drawn)
        if not math.isfinite(float(result.loss)):
            rows.append({"iteration": state.iteration, "stopped": "the loss is not finite"})
            break
        if state.iteration % every == 0:
            both = {used: result.gradient, other: matcher.gradient(state.raw, drawn, estimator=other).gradient}
            exact, first = both["exact"].tensors(), both["first_order"].tensors()
            rows.append(
                {
                    "iteration": state.iteration,
                    "start": drawn.start,
                    "loss": float(result.loss),
                    "cosine": {n: cosine(first[n], exact[n]) for n in exact},
                    "norm_ratio": {n: norm_ratio(first[n], exact[n]) for n in exact},
                }
            )
        state = outer_step(state, result.gradient, run.distill)
    return rows


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two flattened tensors; NaN if one of them is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    size = a.norm() * b.norm()
    return float(a @ b / size) if size > 0 else math.nan


def norm_ratio(a: Tensor, b: Tensor) -> float:
    """Return |a| / |b|; NaN if b is zero."""
    size = b.double().norm()
    return float(a.double().norm() / size) if size > 0 else math.nan


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the median cosine and the median norm ratio of each tensor, over the rows with nonzero gradients."""
    compared = [row for row in rows if "cosine" in row]
    medians: dict[str, dict[str, float]] = {}
    for name in compared[0]["cosine"] if compared else ():
        values = {key: [row[key][name] for row in compared] for key in ("cosine", "norm_ratio")}
        finite = {key: [v for v in vs if not math.isnan(v)] for key, vs in values.items()}
        medians[name] = {key: statistics.median(vs) if vs else math.nan for key, vs in finite.items()}
    return medians


def of_run(pipeline: Pipeline, phase: int, iterations: int, every: int) -> list[dict[str, Any]]:
    """Train the missing experts of a run, then compare both estimators for `iterations` iterations of phase `phase`."""
    run = pipeline.plan()
    if not 0 <= phase < len(run.distill.phases):
        raise ValueError(f"unknown phase {phase}; give a phase from 0 to {len(run.distill.phases) - 1}")
    if phase and is_chained(run.distill):
        raise ValueError(
            f"the paths of phase {phase} start at students of earlier phases, which are not trained here; give phase "
            "0, or set distill.path_start: theta_0"
        )
    if every < 1 or iterations < 1:
        raise ValueError(f"iterations is {iterations} and every is {every}; both must be at least 1")
    store = pipeline.experts()
    train = pipeline.prepared_split("train")
    method = methods.matching_method(run)
    initial = method.initial(phase, train, method.records(phase, train))
    model = expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, train.texts.shape[1])
    device = device_of(run.runtime)
    return compare_estimators(run, phase, store, model, initial, device, iterations=iterations, every=every)
