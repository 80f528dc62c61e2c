"""Data that is split into parts: each worker keeps one part in memory, and all parts are called at the same time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class PartLost(RuntimeError):
    """A worker died, and the part of the data in its memory is lost."""


@runtime_checkable
class WorkerParts(Protocol):
    """Workers that keep one part of some data each; part 0, 1, ... in the order of the workers."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call the Python method named `method` on every part; return one result per part. May raise `PartLost`."""
        ...


@dataclass
class LocalParts(WorkerParts):
    """`WorkerParts` without workers: this process keeps all parts in its memory."""

    parts: Sequence[Any]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(part, method)(*arguments) for part in self.parts]


OpenParts = Callable[..., contextlib.AbstractContextManager[WorkerParts]]
"""`open_parts(make, size, most, accelerated)` starts `size` workers (None: as many as fit on the cluster, but at most
`most`). Each worker creates its part by `make(rank, size)`, and gets its share of a GPU if `accelerated`."""


@contextlib.contextmanager
def local_parts(
    make: Callable[[int, int], Any], size: int | None = None, most: int | None = None, accelerated: bool = False
) -> Iterator[WorkerParts]:
    """Create `size` parts (default: one) in this process, where `OpenParts` would start workers."""
    count = size or 1
    yield LocalParts([make(rank, count) for rank in range(count)])


def with_restarts(work: Callable[[], T], restarts: int, say: Callable[[str], None]) -> T:
    """Call `work`. If it raises `PartLost`, call it again to resume from its checkpoint, at most `restarts` times."""
    for remaining in reversed(range(restarts + 1)):
        try:
            return work()
        except PartLost as error:
            if not remaining:
                raise
            say(f"{error}; all workers start again from the last checkpoint")
    raise AssertionError("unreachable")
