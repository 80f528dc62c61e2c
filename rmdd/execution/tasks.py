"""Tasks and streams: independent work that runs in this process or on a cluster, with identical results.

A *task* is a function that is called as `task(item, hooks)`. It reports its progress by `hooks.report`, saves its own
checkpoints, and ends early if `hooks.should_stop()` is true; then it returns False. A *stream* runs a function on many
small items, possibly on several workers, and yields the results.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rmdd.core.failures import may_pass
from rmdd.core.progress import Progress

Values = dict[str, Any]
"""Mapping of names to numbers and texts, small enough to be sent from one process to another."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work, after its tasks had saved their checkpoints."""


@dataclass(frozen=True)
class GroupMember:
    """One of the `size` workers that run the same item together, such as one expert; `rank` is its number, from 0."""

    rank: int
    size: int
    host: str
    """Network address of this worker's machine, as the other members see it."""
    meet: Callable[[str | None], str]
    """Function that each member calls to get the address of rank 0; rank 0 passes its own address, all others None."""


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
    """Whether to run the item again: True after an error that may not happen again, such as a lack of memory."""


@dataclass(frozen=True)
class ReturnFailures:
    """Wraps a task: if the task raises an error, the result is a `Failed`, so that the other items still run."""

    task: Task

    def __call__(self, item: Any, hooks: Hooks) -> Any:
        try:
            return self.task(item, hooks)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return Failed(reason, socket.gethostname(), may_pass(error))


@runtime_checkable
class Stream(Protocol):
    """Runs a function on many small items, possibly on several workers."""

    def __call__(self, make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        """Yield `make()(item)` for each item, in any order. `make` is called on the workers, at least once on each."""
        ...


def sequential_stream(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
    """`Stream` without workers: run the items one after another in this process, and yield their results."""
    yield from map(make(), items)


def with_progress(progress: Progress, title: str, unit: str, stream: Stream) -> Stream:
    """Return `stream` with a display of the number of finished items, and of the speed in `unit` per second."""

    def watch(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        if not items:
            return
        with progress.stage(title, {"parts": len(items)}) as update:
            update("parts", {})
            began, units, reused = time.perf_counter(), 0, 0
            for done, result in enumerate(stream(make, items), start=1):
                units += result[unit]
                reused += 0 if result.get("fresh", True) else result[unit]
                pace = (units - reused) / (time.perf_counter() - began)
                update("parts", {"done": done, unit: units, f"{unit}/s": round(pace)})
                yield result

    return watch
