"""Statistics of expert trajectories: straightness, matching gradients at several starts, and the teacher's gain.

Symbols: n epochs of a trajectory (m = n + 1 with epoch 0), T start epochs, R samples per start (one
per expert and draw), N entries of the image gradient, L entries of the text gradient.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.config import recipes
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory.matching import Matcher
from rmdd.experts.shortcut import ShortcutPath
from rmdd.experts.store import Store

PARTS = ("images", "texts")

COLUMNS = 2**20
"""Number of columns of a wide matrix that are converted to float64 at once."""


def val_curve(store: Store, experts: Sequence[int]) -> Float[np.ndarray, " m"]:
    """Return the val R@mean after every epoch, averaged over `experts`.

    Raises `ValueError` when the record of an expert lacks this score.
    """
    curves = [[epoch.get("val") for epoch in store.record(e)["metrics"]] for e in experts]
    if any(value is None for curve in curves for value in curve):
        raise ValueError(
            f"the experts in {store.path} have no val R@mean per epoch, which planning needs; write distill.phases by "
            "hand, or train the experts with `rmdd experts`"
        )
    mean: np.ndarray = np.mean(curves, axis=0)
    return mean


def arc_lengths(store: Store, experts: Sequence[int]) -> Float[np.ndarray, " n"]:
    """Return the length of the parameter change in each epoch over all layers, averaged over `experts`."""
    joint = [np.sqrt(np.sum(np.square(list(store.norms(e).values())), axis=0)) for e in experts]
    mean: np.ndarray = np.mean(joint, axis=0)
    return mean


def gain_per_arc(val: Float[np.ndarray, " m"], arc: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the points of val R@mean gained per unit of arc length in each epoch; 0 if no parameter moved."""
    gain: np.ndarray = np.divide(np.diff(val), arc, out=np.zeros_like(arc), where=arc > 0)
    return gain


def share_reached(val: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Return, for each epoch, the share of the total gain in val score reached so far; 1 if the total gain is 0."""
    best = np.maximum.accumulate(val)
    total = best[-1] - val[0]
    return (best - val[0]) / total if total > 0 else np.ones_like(best)


def layer_straightness(store: Store, expert: int, endpoint: int) -> dict[str, float]:
    """Return the straightness of each layer from epoch 0 to `endpoint`: chord length over path length, at most 1."""
    path = ShortcutPath(store.read(expert, 0), store.read(expert, endpoint), store.norms(expert), endpoint)
    return path.straightness()


def straightness(store: Store, experts: Sequence[int], endpoint: int) -> float:
    """Return chord length divided by path length, each summed over all layers and `experts`; at most 1."""
    chords = lengths = 0.0
    for expert in experts:
        travelled = {name: float(steps[:endpoint].sum()) for name, steps in store.norms(expert).items()}
        shares = layer_straightness(store, expert, endpoint)
        chords += sum(shares[name] * travelled[name] for name in shares)
        lengths += sum(travelled.values())
    return chords / lengths if lengths > 0 else 0.0


@dataclass(frozen=True)
class Probe:
    """Matching gradients of a set at several start epochs, all with the same mini-batches and dropout masks."""

    starts: tuple[int | float, ...]
    """Start epochs at which the gradients were computed."""
    images: Float[Tensor, "T R N"]
    """Gradients with respect to the images: R samples per start epoch, or their mean (R = 1)."""
    texts: Float[Tensor, "T R L"]
    """Gradients with respect to the texts: R samples per start epoch, or their mean (R = 1)."""
    miss: Float[Tensor, "T R"]
    """Matching loss of each start and sample, summed over the towers."""

    def mean(self, part: str) -> Float[Tensor, "T _"]:
        """Return the gradient at every start, averaged over samples."""
        gradients: Tensor = getattr(self, part)
        return gradients.mean(dim=1)

    def cosine(self, part: str) -> Float[Tensor, "T T"]:
        """Return the cosines between the mean gradients at any two starts."""
        return cosine_matrix(self.mean(part))

    def agreement(self) -> Float[Tensor, "T T"]:
        """Return the cosines between the gradients at any two starts, averaged over image and text gradients."""
        return (self.cosine("images") + self.cosine("texts")) / 2

    def norms(self, part: str) -> Float[Tensor, " T"]:
        norms: Tensor = self.mean(part).norm(dim=1)
        return norms


def probe(
    matcher: Matcher,
    synthetic: Synthetic,
    starts: Sequence[int | float],
    draws: int = 1,
    experts: int | None = None,
    *,
    averaged: bool = False,
) -> Probe:
    """Compute the matching gradients of `synthetic` at `starts`, for the first `experts` experts and `draws` batches.

    `experts` defaults to all experts of the matcher. `averaged` keeps only the mean over samples, to save memory.
    The gradients are always first-order. The exact gradient of an unstable student is mostly noise, so it would not
    show whether the gradients at two start epochs agree.
    """
    samples = list(itertools.product(range(len(matcher.experts))[:experts], range(draws)))
    results: tuple[list[Tensor], ...] = [], [], []
    for start in starts:
        at_start: tuple[list[Tensor], ...] = [], [], []
        for expert, draw in samples:
            drawn = replace(matcher.draw(draw), expert=expert, start=start, start_text=start)
            matched = matcher.gradient(synthetic, drawn, estimator="first_order")
            parts = (matched.gradient.images, matched.gradient.texts, matched.loss)
            for values, value in zip(at_start, parts, strict=True):
                flat = value.detach().cpu().flatten()
                if averaged and values:
                    values[0] += flat
                else:
                    values.append(flat.clone())
        for result, values in zip(results, at_start, strict=True):
            result.append(torch.stack(values) / (len(samples) if averaged else 1))
    images, texts, miss = map(torch.stack, results)
    return Probe(tuple(starts), images, texts, miss.squeeze(2))


def probing(run: config.Run, endpoint: int, trajectory: str, pairs: int, experts: int | None = None) -> config.Run:
    """Return a copy of `run` with a single phase of `pairs` pairs that ends at `endpoint` and uses all start epochs.

    `trajectory` is the kind of path, `shortcut` or `original`; `original` needs stores that keep every epoch. Only the
    first `experts` experts are used.
    """
    rule, num = run.distill, min(experts or run.experts.num, run.experts.num)
    phase = config.Phase(pairs=pairs, start=0, stop=max(1, endpoint - rule.match_epochs + 1), endpoint=endpoint)
    changes: dict[str, Any] = {
        "phases": (phase,),
        "trajectory": trajectory,
        "endpoint_rule": "inclusive",
        "start_rule": "exclusive",
        "options": {**rule.options, **recipes.find(rule.method).plain_options},
        "plan": config.Plan(),
    }
    return run.model_copy(
        update={
            "distill": rule.model_copy(update=changes),
            "experts": run.experts.model_copy(update={"num": num}),
        }
    )


def cosine_matrix(vectors: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Return the cosines between the rows of `vectors`; 0 for a row of zeros."""
    products = _products(vectors)
    lengths = products.diagonal().sqrt()
    return products / torch.outer(lengths, lengths).clamp(min=torch.finfo(torch.float64).tiny)


def _products(vectors: Float[Tensor, "T N"], *, centred: bool = False) -> Float[Tensor, "T T"]:
    """Return the scalar products of every row with every row, in float64; blocks of columns are used to save memory."""
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for block in vectors.split(COLUMNS, dim=1):
        wide = block.double()
        wide = wide - wide.mean(dim=0) if centred else wide
        products += wide @ wide.T
    return products


def principal(vectors: Float[Tensor, "R N"], components: int = 2) -> tuple[Float[Tensor, "R C"], Float[Tensor, " C"]]:
    """Return the rows' coordinates on the first principal components, and each component's share of the variance."""
    values, sides = torch.linalg.eigh(_products(vectors, centred=True))
    order = values.argsort(descending=True)[:components]
    largest = values[order].clamp(min=0)
    signs = sides[:, order].gather(0, sides[:, order].abs().argmax(dim=0, keepdim=True)).sign()
    shares = largest / values.clamp(min=0).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return sides[:, order] * signs * largest.sqrt(), shares


def off_diagonal(matrix: Float[Tensor, "T T"]) -> dict[str, float]:
    """Return the mean of `matrix` over neighbouring starts, and over all pairs of starts; nan for a single start."""
    size = len(matrix)
    others = matrix[~torch.eye(size, dtype=torch.bool)]
    return {"adjacent": float(matrix.diagonal(1).mean()), "all": float(others.mean())}
