"""What a task is: independent work that runs in this process or on a cluster, with the same result.

A *task* is called as `task(item, hooks)`. It reports progress through its hooks, asks them whether to stop, keeps its
own checkpoints, and gives the same bits wherever it runs. One that was stopped before its end returns False. A *stream*
is for small items: it fans them out and yields their results.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rmdd.core.progress import Progress

Values = dict[str, Any]
"""Numbers and texts, small enough to be sent between processes."""


class Interrupted(KeyboardInterrupt):
    """Work was asked to stop and has saved its state."""


@dataclass(frozen=True)
class GroupMember:
    """One of the workers that do one item together."""

    rank: int
    size: int
    host: str
    """Address of this machine for the others."""
    meet: Callable[[str | None], str]
    """The first member calls it with an address; the others call it with None and get that address."""


@dataclass
class Hooks:
    """What a task is given besides its item."""

    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    should_stop: Callable[[], bool] = lambda: False
    member: GroupMember | None = None


Task = Callable[[Any, Hooks], Any]


@dataclass(frozen=True)
class Failed:
    """The result of an item that failed under `ReturnFailures`."""

    reason: str
    host: str
    again: bool
    """Whether another try may succeed: not after a `ValueError` or the like, which the same numbers bring again."""


@dataclass(frozen=True)
class ReturnFailures:
    """Calls the task and returns `Failed` where it fails: one item does not stop the others."""

    task: Task

    def __call__(self, item: Any, hooks: Hooks) -> Any:
        try:
            return self.task(item, hooks)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return Failed(reason, socket.gethostname(), isinstance(error, RuntimeError | OSError | MemoryError))


@runtime_checkable
class Stream(Protocol):
    def __call__(self, make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        """Yields the result of `make()(item)` for each item, in any order; every worker calls `make` once or more."""
        ...


def sequential_stream(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
    """A `Stream` in this process."""
    yield from map(make(), items)


def with_progress(progress: Progress, title: str, unit: str, stream: Stream) -> Stream:
    """`stream` with its progress shown: how many parts are done, and how many `unit` per second."""

    def watch(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        if not items:
            return
        with progress.stage(title, {"parts": len(items)}) as update:
            began, units, reused = time.perf_counter(), 0, 0
            for done, result in enumerate(stream(make, items), start=1):
                units += result[unit]
                reused += 0 if result.get("fresh", True) else result[unit]
                pace = (units - reused) / (time.perf_counter() - began)
                update("parts", {"done": done, unit: units, f"{unit}/s": round(pace)})
                yield result

    return watch
