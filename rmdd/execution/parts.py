"""Data in parts: each worker keeps one part in its memory, and a method is called on all parts at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class PartLost(RuntimeError):
    """A worker died, and its part is lost."""


@runtime_checkable
class WorkerParts(Protocol):
    """Workers that keep one part each."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call the method named `method` of every part; return the results, part 0 first. Raises `PartLost`."""
        ...


@dataclass
class LocalParts(WorkerParts):
    """All parts, in the memory of this process."""

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
    """Open the parts in this process, by default a single one (an `OpenParts`)."""
    count = size or 1
    yield LocalParts([make(rank, count) for rank in range(count)])


def with_restarts(work: Callable[[], T], restarts: int, say: Callable[[str], None]) -> T:
    """Call `work`, which resumes from checkpoints, and again after each `PartLost`, at most `restarts` times."""
    for remaining in reversed(range(restarts + 1)):
        try:
            return work()
        except PartLost as error:
            if not remaining:
                raise
            say(f"{error}; all workers start again from the last checkpoint")
    raise AssertionError("unreachable")
