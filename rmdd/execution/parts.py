"""Divide data into parts, one in the memory of each worker, and call a method on all parts at the same time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class PartLost(RuntimeError):
    """A worker died, and the part of the data in its memory is lost."""


@runtime_checkable
class WorkerParts(Protocol):
    """Workers among which some data is divided: worker i keeps part i of the data in its memory."""

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
"""`open_parts(make, size, most, accelerated)` starts `size` workers, or, if `size` is None, as many as fit on the
cluster, up to `most`. Each worker creates its part of the data by `make(rank, size)`, and has a share of a GPU if
`accelerated`."""


@contextlib.contextmanager
def local_parts(
    make: Callable[[int, int], Any], size: int | None = None, most: int | None = None, accelerated: bool = False
) -> Iterator[WorkerParts]:
    """Implement `OpenParts` without workers: create all `size` parts (default: one) in this process."""
    count = size or 1
    yield LocalParts([make(rank, count) for rank in range(count)])


def with_restarts(work: Callable[[], T], restarts: int, say: Callable[[str], None]) -> T:
    """Call `work`. If it raises `PartLost`, call it again, at most `restarts` times, to resume from its checkpoint."""
    for remaining in reversed(range(restarts + 1)):
        try:
            return work()
        except PartLost as error:
            if not remaining:
                raise
            say(f"{error}; all workers start again from the last checkpoint")
    raise AssertionError("unreachable")
