"""The training data of an expert: the caption records of an epoch in order, and the pixels of their images.

Symbols: N images, T caption records, B of them in a batch, S pixels on a side. If all images fit `runtime.cache_gb`,
they are read from a cache file that all workers of a node memory-map. Otherwise the images are read from the shards in
every epoch, one window of pairs at a time. Order and pixels depend only on seed, expert, epoch and caption record, so
cached and streamed data are bit-identical in every process.
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
"""Key that determines the order and the augmentations of an epoch: (seed, expert, epoch)."""


@dataclass(frozen=True)
class Part:
    """Consecutive training steps whose images are read from the shards together."""

    records: np.ndarray
    """Index of the caption record of each pair, int64 (steps, B)."""
    rows: np.ndarray
    """Row in the shards that holds the image of each caption record, int64 (steps, B)."""


@dataclass(frozen=True)
class PixelReader:
    """Reads and augments the images of a `Part`; a reader is small enough to be sent to worker processes."""

    dataset: Path
    split: str
    data: config.Data
    augment: config.Augment
    key: Key

    def pixels(self, image: bytes, record: int) -> np.ndarray:
        """Decode an image for one caption record, with augmentation if the experts use it: uint8 (3, S, S)."""
        if not self.augment.active:
            return squashed(image, self.data)
        seed, expert, epoch = self.key
        decoded = decode_as(image, self.data)
        return augment(decoded, self.augment, self.data.image_size, generator(seed, "augment", expert, epoch, record))

    def read(self, part: Part) -> dict[int, bytes | np.ndarray]:
        """Return a part's images by row number: encoded if they will be augmented, else decoded and resized."""
        images = read_rows(_opened(self.dataset), self.split, part.rows)
        return {row: image if self.augment.active else squashed(image, self.data) for row, image in images}

    def step(self, images: dict[int, bytes | np.ndarray], part: Part, step: int) -> np.ndarray:
        """Return the pixels of one training step of a part, uint8 (B, 3, S, S); `images` come from `read`."""
        pairs = zip(part.rows[step].tolist(), part.records[step].tolist(), strict=True)
        return np.stack([i if isinstance(i := images[row], np.ndarray) else self.pixels(i, n) for row, n in pairs])

    def __call__(self, part: Part) -> Iterator[np.ndarray]:
        """Yield the pixels of a part, one training step after the other."""
        images = self.read(part)
        for step in range(len(part.records)):
            yield self.step(images, part, step)


Stream = Callable[[PixelReader, Sequence[Part], int], Iterable[np.ndarray]]
"""Function (reader, parts, number of parts read at once) that yields pixels per step; see `rmdd.execution.ray.feed`."""


@functools.lru_cache(maxsize=4)
def _opened(path: Path) -> Dataset:
    return Dataset.open(path)


def order(rule: config.Shuffle, image_of: np.ndarray, key: Key) -> tuple[np.ndarray, list[int]]:
    """Return the caption records of an epoch in shuffled order, int64 (T,), and the first position of each window."""
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
    """The mini-batches of one epoch of one expert."""

    records: np.ndarray
    """Indices of the caption records in each training step, (steps, B)."""
    begins: tuple[int, ...]
    """Training steps at which the shuffle windows begin."""
    key: Key
    """Seed, expert and epoch, which determine the order and the augmentations."""

    @classmethod
    def of(cls, experts: config.Experts, seed: int, image_of: np.ndarray, expert: int, epoch: int) -> "Epoch":
        """Return the mini-batches of an epoch; a shorter last batch is dropped, unless it is the only batch."""
        key = (seed, expert, epoch)
        records, begins = order(experts.shuffle, image_of, key)
        batch = min(experts.batch, len(records))
        steps = len(records) // batch
        first_steps = sorted({-(-begin // batch) for begin in begins})
        return cls(records[: steps * batch].reshape(steps, batch), tuple(s for s in first_steps if s < steps), key)

    def share(self, rank: int, size: int) -> "Epoch":
        """Return the share of every batch that worker `rank` of `size` workers trains on."""
        return Epoch(np.array_split(self.records, size, axis=1)[rank], self.begins, self.key)


def fits(prepared: PreparedSplit, augment: config.Augment, cache_gb: float) -> bool:
    """Return whether the images of the experts fit the cache; if not, the images are streamed from the shards."""
    return prepared.split.cache_bytes(augment.active) <= cache_gb * 1e9


def prepare(prepared: PreparedSplit, augment: config.Augment, cache_gb: float) -> None:
    """Write the image cache before the experts start, if the images fit it; otherwise every worker would write it."""
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
    """Yield the pixels of every step, uint8 (B, 3, S, S).

    `workers` is the number of decoding processes. `stream` reads images that do not fit the cache, for example with
    Ray; with None, processes of this machine read them.
    """
    split = prepared.split
    reader = PixelReader(split.dataset.path, split.name, data, augment, epoch.key)
    if fits(prepared, augment, cache_gb):
        yield from _loaded(_Cached(prepared, epoch.records, reader), workers)
        return
    ends = [*epoch.begins[1:], len(epoch.records)]
    rows = split.rows[split.image_of[epoch.records]]
    parts = [Part(epoch.records[a:b], rows[a:b]) for a, b in zip(epoch.begins, ends, strict=True)]
    if stream is None:
        yield from _loaded(_FromShards(reader, parts), workers)
    else:
        yield from (torch.from_numpy(np.array(images)) for images in stream(reader, parts, max(1, workers)))


def _loaded(source: torch.utils.data.Dataset[Tensor], workers: int) -> torch.utils.data.DataLoader[Tensor]:
    return torch.utils.data.DataLoader(source, batch_size=None, num_workers=workers, generator=torch.Generator())


@dataclass
class _Cached(torch.utils.data.Dataset[Tensor]):
    """Pixels of each training step, read from the memory-mapped image cache."""

    prepared: PreparedSplit
    records: np.ndarray
    reader: PixelReader

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, step: int) -> Tensor:
        split, records = self.prepared.split, self.records[step]
        index = split.image_of[records]
        if not self.reader.augment.active:
            return torch.from_numpy(split.images[index])
        pairs = zip(index.tolist(), records.tolist(), strict=True)
        return torch.from_numpy(np.stack([self.reader.pixels(split.encoded(i), record) for i, record in pairs]))


@dataclass
class _FromShards(torch.utils.data.Dataset[Tensor]):
    """Pixels of each step, read from the shards, one part at a time; every loader process reads all parts."""

    reader: PixelReader
    parts: Sequence[Part]
    _images: tuple[int, dict[int, bytes | np.ndarray]] = field(default=(-1, {}))
    """Number of the part in memory, and the images of this part by row number."""

    def __post_init__(self) -> None:
        self._steps = [(number, step) for number, part in enumerate(self.parts) for step in range(len(part.records))]

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> Tensor:
        number, within = self._steps[step]
        if self._images[0] != number:
            self._images = (-1, {})  # this frees the old part before the next is read
            self._images = (number, self.reader.read(self.parts[number]))
        return torch.from_numpy(self.reader.step(self._images[1], self.parts[number], within))
