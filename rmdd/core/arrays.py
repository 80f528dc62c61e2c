"""Compute arrays in chunks of rows, and write `.npy` files atomically (a file is complete or missing)."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, cat

from rmdd.core.files import allocate, atomic_path

Computed = TypeVar("Computed", Tensor, np.ndarray)


def in_chunks(compute: Callable[[Any], Computed], rows: Any, size: int) -> Computed:
    """Apply `compute` to chunks of `size` rows and concatenate the results in order; `rows` must not be empty."""
    pieces: Any = [compute(rows[i : i + size]) for i in range(0, len(rows), size)]
    join: Any = cat if isinstance(pieces[0], Tensor) else np.concatenate
    joined: Computed = join(pieces)
    return joined


def write_array(path: Path, values: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


@contextlib.contextmanager
def mapped_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Iterator[np.ndarray]:
    """Yield a memory-mapped array to fill; its file is renamed to `path` when the block ends without an error."""
    with atomic_path(path) as temporary:
        values = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        allocate(temporary)
        yield values
        values.flush()
