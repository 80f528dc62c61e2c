"""Independent pieces of work and who does them: in turn in this process, or side by side on a cluster.

A *task* is a plain function `task(item, hooks)`. It reports progress through its hooks, asks them whether to
stop, keeps its own checkpoints, and gives the same bits wherever it runs.
"""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


class Interrupted(KeyboardInterrupt):
    """Work was asked to stop and has saved what it had."""


@dataclass
class Hooks:
    """What a task is given besides its item."""

    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    should_stop: Callable[[], bool] = lambda: False


Task = Callable[[Any, Hooks], Any]


Values = dict[str, Any]
"""Numbers and texts, small enough to be sent about."""


@runtime_checkable
class Stream(Protocol):
    def __call__(self, make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        """What `make()` gives for each item, in any order; every worker calls `make` once or more."""
        ...


def in_turn(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
    """A `Stream` in this process."""
    yield from map(make(), items)


@runtime_checkable
class Executor(Protocol):
    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """Results in the order of `items`. `on_report(name, metrics)` sees the latest report of each item."""
        ...


@dataclass
class InTurn:
    """One item after another in this process. Ctrl-C and SIGTERM ask the item at work to save and stop; a second
    one stops it where it is."""

    threads: int = 1

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with _asked_to_stop() as stopped:
                results = []
                for item, name in zip(items, names, strict=True):
                    results.append(task(item, Hooks(functools.partial(on_report, name), stopped)))
                    if stopped():
                        raise Interrupted
                return results
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a signal has come; the second one raises `KeyboardInterrupt`."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
