"""What trajectories tell before anything is distilled: straightness, matching gradients, the teacher's gain.

n epochs of a trajectory (m = n + 1 with epoch 0), T probed starts, R samples (expert and draw) of each, N and L numbers
of a gradient by pictures and by texts.
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
"""Of wide rows that are held in float64 at once."""


def val_curve(store: Store, experts: Sequence[int]) -> Float[np.ndarray, " m"]:
    """The teacher's val R@mean after every epoch, the mean over `experts`.

    Raises `ValueError` when an expert was recorded without it.
    """
    curves = [[epoch.get("val") for epoch in store.record(e)["metrics"]] for e in experts]
    if any(value is None for curve in curves for value in curve):
        raise ValueError(
            f"the experts in {store.path} were recorded without val R@mean per epoch, which a plan is made from; give "
            "distill.phases by hand, or train the experts with `rmdd experts`"
        )
    return np.mean(curves, axis=0)


def arc_lengths(store: Store, experts: Sequence[int]) -> Float[np.ndarray, " n"]:
    """Length of the joint step of each epoch, from stored step norms, the mean over `experts`."""
    joint = [np.sqrt(np.sum(np.square(list(store.norms(e).values())), axis=0)) for e in experts]
    return np.mean(joint, axis=0)


def gain_per_arc(val: Float[np.ndarray, " m"], arc: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Points of val that the teacher gains per unit of length in each epoch; 0 where nothing moved."""
    return np.divide(np.diff(val), arc, out=np.zeros_like(arc), where=arc > 0)


def share_reached(val: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """By each epoch, the share of the whole gain on val that the best epoch so far has; 1 where nothing was gained."""
    best = np.maximum.accumulate(val)
    whole = best[-1] - val[0]
    return (best - val[0]) / whole if whole > 0 else np.ones_like(best)


def layer_straightness(store: Store, expert: int, endpoint: int) -> dict[str, float]:
    """Per layer, chord over path length from epoch 0 to `endpoint`, at most 1; needs that checkpoint and step norms."""
    path = ShortcutPath(store.read(expert, 0), store.read(expert, endpoint), store.norms(expert), endpoint)
    return path.straightness()


def straightness(store: Store, experts: Sequence[int], endpoint: int) -> float:
    """Chords over path lengths, each summed over all layers and `experts`: by how much a shortcut shortens its path."""
    chords = lengths = 0.0
    for expert in experts:
        travelled = {name: float(steps[:endpoint].sum()) for name, steps in store.norms(expert).items()}
        shares = layer_straightness(store, expert, endpoint)
        chords += sum(shares[name] * travelled[name] for name in shares)
        lengths += sum(travelled.values())
    return chords / lengths if lengths > 0 else 0.0


@dataclass(frozen=True)
class Probe:
    """Matching gradients with respect to a set at several starts, with the same batches and masks at all of them."""

    starts: tuple[int | float, ...]
    """R is 1 where gradients are means over samples."""
    images: Float[Tensor, "T R N"]
    texts: Float[Tensor, "T R L"]
    miss: Float[Tensor, "T R"]
    """Loss of matching, over all towers."""

    def mean(self, part: str) -> Float[Tensor, "T _"]:
        """The gradient at every start, the mean over samples."""
        return getattr(self, part).mean(dim=1)

    def cosine(self, part: str) -> Float[Tensor, "T T"]:
        """Cosines between the mean gradients of starts."""
        return cosine_matrix(self.mean(part))

    def agreement(self) -> Float[Tensor, "T T"]:
        """Cosines between starts, the mean of the pictures' and the texts'."""
        return (self.cosine("images") + self.cosine("texts")) / 2

    def norms(self, part: str) -> Float[Tensor, " T"]:
        return self.mean(part).norm(dim=1)


def probe(
    matcher: Matcher,
    synthetic: Synthetic,
    starts: Sequence[int | float],
    draws: int = 1,
    experts: int | None = None,
    *,
    averaged: bool = False,
) -> Probe:
    """First-order matching gradients of `synthetic` at `starts` of the matcher's paths, for every one of its experts
    (or the first `experts`) and `draws` of batches; `averaged` holds their mean alone, a gradient a start.

    First-order even where the run uses the exact one: the exact gradient of an unstable student is noise that hides
    whether starts agree.
    """
    samples = list(itertools.product(range(len(matcher.experts))[:experts], range(draws)))
    found: tuple[list[Tensor], ...] = [], [], []
    for start in starts:
        here: tuple[list[Tensor], ...] = [], [], []
        for expert, draw in samples:
            drawn = replace(matcher.draw(draw), expert=expert, start=start, start_text=start)
            seen = matcher.gradient(synthetic, drawn, estimator="first_order")
            for values, value in zip(here, (seen.gradient.images, seen.gradient.texts, seen.loss), strict=True):
                one = value.detach().cpu().flatten()
                if averaged and values:
                    values[0] += one
                else:
                    values.append(one.clone())
        for starts_of, values in zip(found, here, strict=True):
            starts_of.append(torch.stack(values) / (len(samples) if averaged else 1))
    images, texts, miss = map(torch.stack, found)
    return Probe(tuple(starts), images, texts, miss.squeeze(2))


def probing(run: config.Run, endpoint: int, trajectory: str, pairs: int, experts: int | None = None) -> config.Run:
    """`run` with one phase of `pairs` pairs on its experts' paths of a kind to `endpoint`, every start allowed.

    Only the first `experts` are used. `original` paths need stores that keep every epoch.
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
    """Cosines between rows; 0 with a row of zeros."""
    products = _products(vectors)
    lengths = products.diagonal().sqrt()
    return products / torch.outer(lengths, lengths).clamp(min=torch.finfo(torch.float64).tiny)


def _products(vectors: Float[Tensor, "T N"], *, centred: bool = False) -> Float[Tensor, "T T"]:
    """Scalar products of rows in float64, a piece of their columns at a time."""
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for piece in vectors.split(COLUMNS, dim=1):
        wide = piece.double()
        wide = wide - wide.mean(dim=0) if centred else wide
        found += wide @ wide.T
    return found


def principal(vectors: Float[Tensor, "R N"], components: int = 2) -> tuple[Float[Tensor, "R C"], Float[Tensor, " C"]]:
    """Coordinates on the first principal components of centred rows, and the share of variance that each explains."""
    values, sides = torch.linalg.eigh(_products(vectors, centred=True))
    order = values.argsort(descending=True)[:components]
    largest = values[order].clamp(min=0)
    signs = sides[:, order].gather(0, sides[:, order].abs().argmax(dim=0, keepdim=True)).sign()
    shares = largest / values.clamp(min=0).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return sides[:, order] * signs * largest.sqrt(), shares


def off_diagonal(matrix: Float[Tensor, "T T"]) -> dict[str, float]:
    """The mean of neighbouring starts, and of all pairs of starts; nan with a single start."""
    size = len(matrix)
    apart = matrix[~torch.eye(size, dtype=torch.bool)]
    return {"adjacent": float(matrix.diagonal(1).mean()), "all": float(apart.mean())}
