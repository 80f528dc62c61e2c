"""Paths through an expert's trajectory, on which a student's start and target lie.

A *layer* is one parameter tensor. In a shortcut to endpoint E, layer l is at
theta_l(t) = (1 - beta_l(t)) theta_l(0) + beta_l(t) theta_l(E) in epoch t. The share beta_l(t) is the length of the
expert's path of layer l up to epoch t, divided by the length up to E (PTM-ST, equations 4-5). So each layer moves on a
straight line. The joint path of all layers is not straight, because the layers move at different speeds.
"""

import functools
import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from rmdd import config
from rmdd.experts.store import Store
from rmdd.models.dual import Params

CACHED = 4
"""Number of recently used checkpoints of a trajectory that are kept in memory, because start epochs repeat."""


@runtime_checkable
class Path(Protocol):
    """A path through the parameter space that follows an expert; positions on the path are epochs."""

    endpoint: int
    """Last epoch that the path reaches."""
    vectors: int
    """Largest number of parameter sets that the path holds in memory."""

    def at(self, epoch: int | float) -> Params:
        """Return the parameters at an epoch in [0, endpoint]; do not change them in place."""
        ...


class OriginalPath:
    """The trajectory as trained; the store must hold every epoch, and only whole epochs can be read."""

    def __init__(self, store: Store, expert: int):
        self.endpoint, self.vectors = store.epochs, CACHED
        self._read = functools.lru_cache(maxsize=CACHED)(functools.partial(store.read, expert))

    def at(self, epoch: int | float) -> Params:
        _check(epoch, self.endpoint)
        if epoch != int(epoch):
            raise ValueError(f"asked for epoch {epoch} of a trajectory that has whole epochs only; use integer starts")
        return self._read(int(epoch))


class ShortcutPath:
    """A straight line per layer between two checkpoints; the position on it follows the arc length of the layer."""

    def __init__(self, start: Params, end: Params, norms: Mapping[str, np.ndarray], endpoint: int):
        self.start, self.end, self.endpoint, self.vectors = start, end, endpoint, 2
        self.beta = {n: arc_positions(norms[n][:endpoint], _length(start[n])) for n in start}

    def at(self, epoch: int | float) -> Params:
        _check(epoch, self.endpoint)
        beta = {n: b.at(epoch) for n, b in self.beta.items()}
        return {n: (1 - b) * self.start[n] + b * self.end[n] for n, b in beta.items()}

    def straightness(self) -> dict[str, float]:
        """Return chord length over path length for each layer: 1 for a straight path, 0 if the layer never moves."""
        chord = {n: _length(self.end[n] - self.start[n]) for n in self.start}
        return {n: chord[n] / b.total if b.total > 0 else 0.0 for n, b in self.beta.items()}


class AnchoredPath:
    """Shortcuts from each anchor to the next (MCT). `anchors` are checkpoints by epoch, first and last included."""

    def __init__(self, anchors: Mapping[int, Params], norms: Mapping[str, np.ndarray]):
        self.epochs = sorted(anchors)
        self.endpoint, self.vectors = self.epochs[-1], len(self.epochs)
        self.legs = [
            ShortcutPath(anchors[a], anchors[b], {n: s[a:b] for n, s in norms.items()}, b - a)
            for a, b in zip(self.epochs, self.epochs[1:], strict=False)
        ]

    def at(self, epoch: int | float) -> Params:
        _check(epoch, self.endpoint)
        leg = max(0, sum(a < epoch for a in self.epochs) - 1)
        return self.legs[leg].at(epoch - self.epochs[leg])


class ArcPositions(list[float]):
    """The list beta(0), ..., beta(E) of one layer: the share of its path that each epoch has reached."""

    def __init__(self, beta: list[float], total: float):
        super().__init__(beta)
        self.total = total

    def at(self, epoch: int | float) -> float:
        """Return the share beta at `epoch`, interpolated linearly between whole epochs."""
        low = math.floor(epoch)
        share = epoch - low
        return self[low] if share == 0 else (1 - share) * self[low] + share * self[low + 1]


def arc_positions(steps: np.ndarray, size: float = 0.0) -> ArcPositions:
    """Return the share beta of the path length covered by the end of each epoch, from beta(0) = 0 to beta(E) = 1.

    If the path is shorter than the float32 rounding error of `size`, the layer's norm, the layer counts as not moved,
    and all shares are 0. The shares are in float64.
    """
    distance = np.concatenate([[0.0], np.cumsum(steps, dtype=np.float64)])
    total = float(distance[-1])
    if total <= np.finfo(np.float32).eps * size or total == 0:
        return ArcPositions([0.0] * len(distance), 0.0)
    return ArcPositions([float(x) for x in distance / total], total)


def open_path(store: Store, expert: int, rule: config.Distill, endpoint: int, start: Params | None = None) -> Path:
    """Open the path of one expert: `original` (as trained), `shortcut` (to `endpoint`), or `convexified` (the shortcut
    to the last epoch). A shortcut begins at `start` if given, else at epoch 0 of the expert; its layers move at the
    expert's pace either way. Raises `ValueError` when the endpoint lies after the last epoch of the store."""
    if rule.trajectory == "original":
        return OriginalPath(store, expert)
    last = store.epochs if rule.trajectory == "convexified" else endpoint
    if last > store.epochs:
        raise ValueError(
            f"the path ends at epoch {last} but the store at {store.path} holds epochs 0-{store.epochs}; lower the "
            f"endpoint to {store.epochs} or train experts with epochs: {last}"
        )
    begin = store.read(expert, 0) if start is None else start
    return ShortcutPath(begin, store.read(expert, last), store.norms(expert), last)


def _length(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _check(epoch: int | float, endpoint: int) -> None:
    if not 0 <= epoch <= endpoint:
        raise ValueError(f"asked for epoch {epoch} of a path that covers epochs 0-{endpoint}")
