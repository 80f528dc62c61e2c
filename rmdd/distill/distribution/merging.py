"""The merged teachers of MDM: averages of two checkpoints, pulled towards the anchor w_0 where the two disagree.

Two checkpoints displace a tensor by d_1 and d_2 from the anchor, and c is the cosine between d_1 and d_2. Then

    w* = w_0 + alpha c / (1 + c) (d_1 + d_2)

For alpha = 1, w* lies between the anchor (reached if d_1 and d_2 are orthogonal) and the mean of both checkpoints
(reached if d_1 = d_2). Of all points between the anchor and the mean, w* is the nearest to the centre of the fine-tuned
weights (Model Stock).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmdd.experts.store import Store
from rmdd.models.dual import Params, check_same_shapes


class Cell(NamedTuple):
    """Address of a checkpoint in the pool: the number of the expert and the epoch."""

    expert: int
    epoch: int


def cosine(first: Tensor, second: Tensor, *, positive: bool = True) -> Tensor:
    """Return the cosine c between two displacements; 0 if a displacement is zero.

    A negative cosine is returned as 0 unless `positive` is false, because c / (1 + c) is huge for c near -1.
    """
    a, b = first.flatten(), second.flatten()
    value: Tensor = a @ b / (a.norm() * b.norm() + 1e-12)
    return value.clamp(0 if positive else 1e-6 - 1, 1)


def merge(anchor: Params, first: Params, second: Params, alpha: float, *, positive: bool = True) -> Params:
    """Merge two checkpoints into a teacher, tensor by tensor. Raises `ValueError` if their models differ."""
    for other in (first, second):
        check_same_shapes(*({n: tuple(p.shape) for n, p in params.items()} for params in (anchor, other)))
    merged = {}
    for name, origin in anchor.items():
        d_1, d_2 = first[name] - origin, second[name] - origin
        c = cosine(d_1, d_2, positive=positive)
        merged[name] = origin + alpha * c / (1 + c) * (d_1 + d_2)
    return merged


def interpolated(anchor: Params, other: Params, share: float) -> Params:
    """Interpolate linearly between two checkpoints: `share` 0 returns `anchor`, `share` 1 returns `other`."""
    return {n: (1 - share) * p + share * other[n] for n, p in anchor.items()}


def draw_two(
    experts: Sequence[int], epochs: Sequence[int], random: torch.Generator, *, within: bool = False
) -> tuple[Cell, Cell]:
    """Draw two different checkpoints from all `epochs` of `experts`; with `within`, both are of the same expert.

    Raises `ValueError` if fewer than two checkpoints are available.
    """
    if len(epochs) * (1 if within else len(experts)) < 2:
        raise ValueError(
            f"a merged teacher needs two checkpoints, but experts {list(experts)} with epochs {list(epochs)} have only "
            "one to draw from; raise experts.num, or set experts.keep: all"
        )

    first = Cell(_draw(experts, random), _draw(epochs, random))
    single_epoch = len(epochs) == 1  # then the two experts must differ
    other = first.expert if within else _draw([e for e in experts if not (single_epoch and e == first.expert)], random)
    return first, Cell(other, _draw([e for e in epochs if other != first.expert or e != first.epoch], random))


def _draw(options: Sequence[int], random: torch.Generator) -> int:
    return options[int(torch.randint(len(options), (1,), generator=random))]


class Pool:
    """Checkpoints of an expert store, read on demand; the most recently used are cached, up to `max_bytes` in total."""

    def __init__(self, store: Store, experts: Sequence[int], epochs: Sequence[int], max_bytes: int):
        self.store, self.experts, self.epochs, self.max_bytes = store, list(experts), list(epochs), max_bytes
        self._cached: OrderedDict[Cell, Params] = OrderedDict()
        self._bytes = 0

    def read(self, cell: Cell) -> Params:
        if cell in self._cached:
            self._cached.move_to_end(cell)
            return self._cached[cell]
        params = self.store.read(*cell)
        self._cached[cell] = params
        self._bytes += _size(params)
        while len(self._cached) > 1 and self._bytes > self.max_bytes:
            _, oldest = self._cached.popitem(last=False)
            self._bytes -= _size(oldest)
        return params


def _size(params: Params) -> int:
    return sum(p.numel() * p.element_size() for p in params.values())
