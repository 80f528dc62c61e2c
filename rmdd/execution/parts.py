"""Parts of something large, each held in the memory of one worker, and asked together."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class PartLost(RuntimeError):
    """A worker died, and the part that it held is lost."""


@runtime_checkable
class WorkerParts(Protocol):
    """Workers that hold one part each."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What the method `method` of every part returns, in the order of ranks. Raises `PartLost`."""
        ...


@dataclass
class LocalParts(WorkerParts):
    """All parts in this process."""

    parts: Sequence[Any]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(part, method)(*arguments) for part in self.parts]


OpenParts = Callable[..., contextlib.AbstractContextManager[WorkerParts]]
"""`open(make, size, most, accelerated)` opens `size` workers (None: as many as there is room for, up to `most`, if
set); each makes its part by `make(rank, size)`, and has a worker's share of a GPU if it is `accelerated`."""


@contextlib.contextmanager
def local_parts(
    make: Callable[[int, int], Any], size: int | None = None, most: int | None = None, accelerated: bool = False
) -> Iterator[WorkerParts]:
    """`OpenParts` in this process."""
    count = size or 1
    yield LocalParts([make(rank, count) for rank in range(count)])


def with_restarts(work: Callable[[], T], restarts: int, say: Callable[[str], None]) -> T:
    """Call `work`, which resumes from checkpoints, again after each `PartLost`, at most `restarts` times."""
    for left in reversed(range(restarts + 1)):
        try:
            return work()
        except PartLost as error:
            if not left:
                raise
            say(f"{error}; the ranks start again from what was kept")
    raise AssertionError("unreachable")
