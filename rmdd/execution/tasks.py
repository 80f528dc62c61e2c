"""Tasks and streams: independent work that runs in this process or on a cluster, with identical results.

A *task* is called as `task(item, hooks)`. It reports its progress to the hooks, stops when they say so, and saves its
checkpoints. A task that stopped before its end returns False. A *stream* is for many small items: it distributes them
over workers and yields their results.
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
    """Work was stopped by a signal, after saving its state."""


@dataclass(frozen=True)
class GroupMember:
    """One of several workers that run one item together."""

    rank: int
    size: int
    host: str
    """Network address of this worker's machine, as the other members see it."""
    meet: Callable[[str | None], str]
    """Shares an address: the first member calls it with its address, the others with None; it returns that address."""


@dataclass
class Hooks:
    """Functions by which a task reports progress and learns that it should stop."""

    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    should_stop: Callable[[], bool] = lambda: False
    member: GroupMember | None = None


Task = Callable[[Any, Hooks], Any]


@dataclass(frozen=True)
class Failed:
    """The result of an item whose task failed under `ReturnFailures`."""

    reason: str
    host: str
    again: bool
    """Whether another try may succeed. An error such as `ValueError` would come again with the same numbers."""


@dataclass(frozen=True)
class ReturnFailures:
    """Calls a task, and returns `Failed` instead of raising its error, so that one item does not stop the others."""

    task: Task

    def __call__(self, item: Any, hooks: Hooks) -> Any:
        try:
            return self.task(item, hooks)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return Failed(reason, socket.gethostname(), isinstance(error, RuntimeError | OSError | MemoryError))


@runtime_checkable
class Stream(Protocol):
    """Runs a function on many small items, possibly on several workers."""

    def __call__(self, make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        """Yield `make()(item)` for each item, in any order; every worker calls `make` at least once."""
        ...


def sequential_stream(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
    """Yield the results of the items, one after another, in this process (a `Stream`)."""
    yield from map(make(), items)


def with_progress(progress: Progress, title: str, unit: str, stream: Stream) -> Stream:
    """Return `stream` with a progress display: the number of finished items, and how many `unit` per second."""

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
