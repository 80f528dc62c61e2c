"""What an expert trains on: the records of an epoch in their order, and the pictures that go with them.

N images, T caption records, B of them in a batch, S pixels on a side. Pictures come from a cache that all workers of a
node map, or, where that would not fit `runtime.cache_gb`, from the shards in every epoch, a window of pairs at a time.
Order and pictures depend on (seed, expert, epoch, record) alone: either feed gives the same bits, in any process.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.data.augment import augment
from rmdd.data.decode import decode_as
from rmdd.data.shards import Dataset
from rmdd.data.splits import read_rows, squashed
from rmdd.models.prepared import PreparedSplit

Key = tuple[int, int, int]
"""(seed, expert, epoch)."""


@dataclass(frozen=True)
class Part:
    """Consecutive steps that are read from the shards together."""

    records: np.ndarray
    """int64 (steps, B)."""
    rows: np.ndarray
    """int64 (steps, B): the row of each record's picture in the shards."""


@dataclass(frozen=True)
class Look:
    """How records become pictures; small enough to travel with every part."""

    dataset: Path
    split: str
    data: config.Data
    augment: config.Augment
    key: Key

    def view(self, image: bytes, record: int) -> np.ndarray:
        """What one record sees of an encoded image: uint8 (3, S, S)."""
        if not self.augment.active:
            return squashed(image, self.data)
        seed, expert, epoch = self.key
        picture = decode_as(image, self.data)
        return augment(picture, self.augment, self.data.image_size, generator(seed, "augment", expert, epoch, record))

    def read(self, part: Part) -> dict[int, bytes | np.ndarray]:
        """By row, the encoded images of a part, or the squashed ones where that is all a record sees."""
        images = read_rows(_opened(self.dataset), self.split, part.rows)
        return {row: image if self.augment.active else squashed(image, self.data) for row, image in images}

    def step(self, held: dict[int, bytes | np.ndarray], part: Part, step: int) -> np.ndarray:
        """uint8 (B, 3, S, S)."""
        pairs = zip(part.rows[step].tolist(), part.records[step].tolist(), strict=True)
        return np.stack([i if isinstance(i := held[row], np.ndarray) else self.view(i, n) for row, n in pairs])

    def __call__(self, part: Part) -> Iterator[np.ndarray]:
        """The pictures of a part, step by step."""
        held = self.read(part)
        for step in range(len(part.records)):
            yield self.step(held, part, step)


Stream = Callable[[Look, Sequence[Part], int], Iterable[np.ndarray]]
"""Applies the look to the parts, so many at a time and in order, elsewhere: `rmdd.execution.ray.feed`."""


@functools.lru_cache(maxsize=4)
def _opened(path: Path) -> Dataset:
    return Dataset.open(path)


def order(rule: config.Shuffle, image_of: np.ndarray, key: Key) -> tuple[np.ndarray, list[int]]:
    """The records of an epoch, int64 (T,), and where in it each window begins."""
    if rule.kind == "global":
        records = torch.randperm(len(image_of), generator=generator(key[0], "expert order", *key[1:])).numpy()
        return records, list(range(0, len(records), rule.pairs))
    count = -(-(int(image_of[-1]) + 1) // rule.block)
    blocks = torch.randperm(count, generator=generator(key[0], "expert blocks", *key[1:])).tolist()
    windows: list[np.ndarray] = []
    for window, first in enumerate(range(0, count, rule.window)):
        mixed = [_records(image_of, block * rule.block, rule.block) for block in blocks[first : first + rule.window]]
        records = np.concatenate(mixed)
        draw = generator(key[0], "expert window", *key[1:], window)
        windows.append(records[torch.randperm(len(records), generator=draw).numpy()])
    return np.concatenate(windows), [0, *np.cumsum([len(w) for w in windows])[:-1].tolist()]


def _records(image_of: np.ndarray, first: int, images: int) -> np.ndarray:
    low, high = np.searchsorted(image_of, [first, first + images])
    return np.arange(low, high)


@dataclass(frozen=True)
class Epoch:
    """One pass of one expert: `records` (steps, B) in order, and the steps at which windows begin."""

    records: np.ndarray
    begins: tuple[int, ...]
    key: Key

    @classmethod
    def of(cls, experts: config.Experts, seed: int, image_of: np.ndarray, expert: int, epoch: int) -> "Epoch":
        """The last short batch is dropped; fewer records than a batch are one batch."""
        key = (seed, expert, epoch)
        records, begins = order(experts.shuffle, image_of, key)
        batch = min(experts.batch, len(records))
        steps = len(records) // batch
        at = sorted({-(-begin // batch) for begin in begins})
        return cls(records[: steps * batch].reshape(steps, batch), tuple(s for s in at if s < steps), key)

    def share(self, rank: int, size: int) -> "Epoch":
        """The records of one of `size` workers that split every batch."""
        return Epoch(np.array_split(self.records, size, axis=1)[rank], self.begins, self.key)


def fits(prepared: PreparedSplit, augment: config.Augment, cache_gb: float) -> bool:
    """Whether the pictures that experts train on are cached, or streamed."""
    return prepared.split.cache_bytes(augment.active) <= cache_gb * 1e9


def prepare(prepared: PreparedSplit, augment: config.Augment, cache_gb: float) -> None:
    """Write the cache that experts train from, if it fits, before every worker would."""
    if fits(prepared, augment, cache_gb) and augment.active:
        prepared.split.encoded(0)
    elif fits(prepared, augment, cache_gb):
        prepared.split.images  # noqa: B018


def pictures(
    prepared: PreparedSplit,
    epoch: Epoch,
    data: config.Data,
    augment: config.Augment,
    cache_gb: float,
    workers: int = 0,
    stream: Stream | None = None,
) -> Iterator[Tensor]:
    """uint8 (B, 3, S, S) for every step. `workers` processes decode, those of `stream` unless that is None."""
    split = prepared.split
    look = Look(split.dataset.path, split.name, data, augment, epoch.key)
    if fits(prepared, augment, cache_gb):
        yield from _loaded(_Cached(prepared, epoch.records, look), workers)
        return
    ends = [*epoch.begins[1:], len(epoch.records)]
    rows = split.rows[split.image_of[epoch.records]]
    parts = [Part(epoch.records[a:b], rows[a:b]) for a, b in zip(epoch.begins, ends, strict=True)]
    if stream is None:
        yield from _loaded(_Read(look, parts), workers)
    else:
        yield from (torch.from_numpy(np.array(images)) for images in stream(look, parts, max(1, workers)))


def _loaded(source: torch.utils.data.Dataset[Tensor], workers: int) -> torch.utils.data.DataLoader[Tensor]:
    return torch.utils.data.DataLoader(source, batch_size=None, num_workers=workers, generator=torch.Generator())


@dataclass
class _Cached(torch.utils.data.Dataset[Tensor]):
    prepared: PreparedSplit
    records: np.ndarray
    look: Look

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, step: int) -> Tensor:
        split, records = self.prepared.split, self.records[step]
        index = split.image_of[records]
        if not self.look.augment.active:
            return torch.from_numpy(split.images[index])
        pairs = zip(index.tolist(), records.tolist(), strict=True)
        return torch.from_numpy(np.stack([self.look.view(split.encoded(i), record) for i, record in pairs]))


@dataclass
class _Read(torch.utils.data.Dataset[Tensor]):
    """Steps in turn, holding one part; each loader process reads every part for itself."""

    look: Look
    parts: Sequence[Part]
    _held: tuple[int, dict[int, bytes | np.ndarray]] = field(default=(-1, {}))

    def __post_init__(self) -> None:
        self._place = [(number, step) for number, part in enumerate(self.parts) for step in range(len(part.records))]

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, step: int) -> Tensor:
        number, within = self._place[step]
        if self._held[0] != number:
            self._held = (-1, {})  # let go of one window before the next is read
            self._held = (number, self.look.read(self.parts[number]))
        return torch.from_numpy(self.look.step(self._held[1], self.parts[number], within))
