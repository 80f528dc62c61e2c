"""Paths through an expert's trajectory that a student is matched to.

A *layer* is one parameter tensor. With s_l(t) the length of layer l's step in epoch t, a shortcut to endpoint E
places theta_l(t) = (1 - beta_l(t)) theta_l(0) + beta_l(t) theta_l(E), where beta_l(t) is the share of the way
that the layer had gone by epoch t (PTM-ST, equations 4-5). Each layer goes straight at the expert's own pace;
the joint path is not a straight line, for the layers differ in pace.
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

KEPT = 4
"""Checkpoints of one trajectory that stay in memory, the latest used: starts repeat."""


@runtime_checkable
class Path(Protocol):
    endpoint: int
    vectors: int
    """Sets of parameters held in memory at most."""

    def at(self, epoch: int | float) -> Params:
        """Parameters at an epoch in [0, endpoint], not to be changed in place."""
        ...


class OriginalPath:
    """The trajectory as it was trained; every epoch must be in the store, and only whole epochs can be asked for."""

    def __init__(self, store: Store, expert: int):
        self.endpoint, self.vectors = store.epochs, KEPT
        self._read = functools.lru_cache(maxsize=KEPT)(functools.partial(store.read, expert))

    def at(self, epoch: int | float) -> Params:
        _check(epoch, self.endpoint)
        if epoch != int(epoch):
            raise ValueError(f"asked for epoch {epoch} of a trajectory that is kept at whole epochs; draw integer ones")
        return self._read(int(epoch))


class ShortcutPath:
    """Per-layer straight line between two checkpoints, placed by arc length."""

    def __init__(self, start: Params, end: Params, norms: Mapping[str, np.ndarray], endpoint: int):
        self.start, self.end, self.endpoint, self.vectors = start, end, endpoint, 2
        self.beta = {n: arc_positions(norms[n][:endpoint], _length(start[n])) for n in start}

    def at(self, epoch: int | float) -> Params:
        _check(epoch, self.endpoint)
        beta = {n: b.at(epoch) for n, b in self.beta.items()}
        return {n: (1 - b) * self.start[n] + b * self.end[n] for n, b in beta.items()}

    def straightness(self) -> dict[str, float]:
        """Per layer, chord over path length, at most 1: by how much each step shrinks (0 for a layer at rest)."""
        chord = {n: _length(self.end[n] - self.start[n]) for n in self.start}
        return {n: chord[n] / b.total if b.total > 0 else 0.0 for n, b in self.beta.items()}


class AnchoredPath:
    """Shortcuts joined at `anchors`, a checkpoint for each of some epochs, first and last among them (MCT)."""

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
    """beta(0), ..., beta(E) with the path length they were measured on."""

    def __init__(self, beta: list[float], total: float):
        super().__init__(beta)
        self.total = total

    def at(self, epoch: int | float) -> float:
        """beta, linear between whole epochs."""
        low = math.floor(epoch)
        share = epoch - low
        return self[low] if share == 0 else (1 - share) * self[low] + share * self[low + 1]


def arc_positions(steps: np.ndarray, size: float = 0.0) -> ArcPositions:
    """Cumulative share of the path length: beta(0) = 0 and beta(E) = 1, float64.

    A layer whose whole path is below float32 resolution of its own `size` has not moved: beta is 0 throughout.
    """
    travelled = np.concatenate([[0.0], np.cumsum(steps, dtype=np.float64)])
    total = float(travelled[-1])
    if total <= np.finfo(np.float32).eps * size or total == 0:
        return ArcPositions([0.0] * len(travelled), 0.0)
    return ArcPositions([float(x) for x in travelled / total], total)


def open_path(store: Store, expert: int, rule: config.Distill, endpoint: int) -> Path:
    """The path of one expert: as trained, the shortcut to `endpoint`, or to the last epoch (convexified)."""
    if rule.trajectory == "original":
        return OriginalPath(store, expert)
    last = store.epochs if rule.trajectory == "convexified" else endpoint
    if last > store.epochs:
        raise ValueError(
            f"the path ends at epoch {last} but the store at {store.path} holds epochs 0-{store.epochs}; lower the "
            f"endpoint to {store.epochs} or train experts with epochs: {last}"
        )
    return ShortcutPath(store.read(expert, 0), store.read(expert, last), store.norms(expert), last)


def _length(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _check(epoch: int | float, endpoint: int) -> None:
    if not 0 <= epoch <= endpoint:
        raise ValueError(f"asked for epoch {epoch} of a path that covers 0-{endpoint}")
