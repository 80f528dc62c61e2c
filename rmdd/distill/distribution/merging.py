"""Teachers between checkpoints: two of them averaged around an anchor, each tensor as far as they agree (MDM).

With displacements d_1, d_2 of a tensor from the anchor w_0 and c the cosine between them,

    w* = w_0 + alpha c / (1 + c) (d_1 + d_2)

which is alpha times the point between anchor and mean that lies nearest to the centre of the fine-tuned weights (Model
Stock): their mean where they agree, the anchor where they are orthogonal.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmdd.experts.store import Store
from rmdd.models.dual import Params, check_same_shapes


class Cell(NamedTuple):
    """A checkpoint of the pool."""

    expert: int
    epoch: int


def agreeing(first: Tensor, second: Tensor, *, positive: bool = True) -> Tensor:
    """The cosine between two displacements, 0 where one is empty. Below 0 the ratio blows up, so it counts as 0 there
    unless `positive` is false."""
    a, b = first.flatten(), second.flatten()
    cosine = a @ b / (a.norm() * b.norm() + 1e-12)
    return cosine.clamp(0 if positive else 1e-6 - 1, 1)


def merge(anchor: Params, first: Params, second: Params, alpha: float, *, positive: bool = True) -> Params:
    """The teacher of two checkpoints, tensor by tensor. Raises `ValueError` where they are of different models."""
    for other in (first, second):
        check_same_shapes(*({n: tuple(p.shape) for n, p in params.items()} for params in (anchor, other)))
    merged = {}
    for name, origin in anchor.items():
        one, two = first[name] - origin, second[name] - origin
        c = agreeing(one, two, positive=positive)
        merged[name] = origin + alpha * c / (1 + c) * (one + two)
    return merged


def between(anchor: Params, other: Params, share: float) -> Params:
    """The weighted sum of two checkpoints."""
    return {n: (1 - share) * p + share * other[n] for n, p in anchor.items()}


def two_cells(
    experts: Sequence[int], epochs: Sequence[int], random: torch.Generator, *, within: bool = False
) -> tuple[Cell, Cell]:
    """Two different cells of experts x epochs; `within` draws both from one expert.

    Raises `ValueError` where there are no two.
    """
    if len(epochs) * (1 if within else len(experts)) < 2:
        raise ValueError(
            f"a mixed teacher needs two checkpoints, and experts {list(experts)} with epochs {list(epochs)} have no "
            "two to draw from; raise experts.num, or set experts.keep: all"
        )

    first = Cell(_draw(experts, random), _draw(epochs, random))
    lone = len(epochs) == 1  # then the second expert must be another one
    other = first.expert if within else _draw([e for e in experts if not (lone and e == first.expert)], random)
    return first, Cell(other, _draw([e for e in epochs if other != first.expert or e != first.epoch], random))


def _draw(among: Sequence[int], random: torch.Generator) -> int:
    return among[int(torch.randint(len(among), (1,), generator=random))]


class Pool:
    """Checkpoints of a store, read when they are asked for; those asked for last stay in memory, up to `most` bytes."""

    def __init__(self, store: Store, experts: Sequence[int], epochs: Sequence[int], most: int):
        self.store, self.experts, self.epochs, self.most = store, list(experts), list(epochs), most
        self._held: OrderedDict[Cell, Params] = OrderedDict()
        self._bytes = 0

    def read(self, cell: Cell) -> Params:
        if cell in self._held:
            self._held.move_to_end(cell)
            return self._held[cell]
        params = self.store.read(*cell)
        self._held[cell] = params
        self._bytes += _size(params)
        while len(self._held) > 1 and self._bytes > self.most:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= _size(oldest)
        return params


def _size(params: Params) -> int:
    return sum(p.numel() * p.element_size() for p in params.values())
