"""Rows too many to compute at once, taken some at a time."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, cat

Computed = TypeVar("Computed", Tensor, np.ndarray)


def in_chunks(compute: Callable[[Any], Computed], rows: Any, size: int) -> Computed:
    """`compute` of `size` rows at a time, joined in their order. `rows` is what can be sliced, and not empty."""
    found: Any = [compute(rows[i : i + size]) for i in range(0, len(rows), size)]
    joined: Any = cat(found) if isinstance(found[0], Tensor) else np.concatenate(found)
    return joined
