"""Rows of numbers: computed some at a time, and written as `.npy` files that are whole or absent."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, cat

from rmdd.core.files import allocate, atomic_path

Computed = TypeVar("Computed", Tensor, np.ndarray)


def in_chunks(compute: Callable[[Any], Computed], rows: Any, size: int) -> Computed:
    """`compute` of `size` rows at a time, joined in their order. `rows` is what can be sliced, and not empty."""
    pieces: Any = [compute(rows[i : i + size]) for i in range(0, len(rows), size)]
    joined: Any = cat(pieces) if isinstance(pieces[0], Tensor) else np.concatenate(pieces)
    return joined


def write_array(path: Path, values: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


@contextlib.contextmanager
def mapped_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Iterator[np.ndarray]:
    """An array to fill that lies in the file `path`, which appears when the block succeeds."""
    with atomic_path(path) as temporary:
        values = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        allocate(temporary)
        yield values
        values.flush()
