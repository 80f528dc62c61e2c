"""Interface of an executor, which runs a task on each of many items, in this process or on workers of a cluster."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rmdd.execution.tasks import Failed, ReturnFailures, Task


@dataclass
class Piece:
    """One piece of work: an item, the task to run on it, and functions that receive the task's progress and result."""

    task: Task
    item: Any
    name: str
    on_report: Callable[[dict[str, Any]], None]
    """Function that receives the task's metrics, and an empty mapping when a worker begins the piece."""
    settle: Callable[[Any, Exception | None], None]
    """Called as `settle(result, None)` or `settle(None, error)`. If `settle` raises an error, all work stops."""


PieceSource = Callable[[float], Sequence[Piece] | None]
"""Function that waits up to the given seconds for new pieces of work; returns them, or None if no more will come."""


class RetriesExhausted(RuntimeError):
    """The workers that ran an item died more often than `runtime.max_restarts` allows."""

    def __init__(self, message: str, host: str):
        super().__init__(message)
        self.host = host


@runtime_checkable
class Mapper(Protocol):
    """Runs a task on a list of items."""

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """Run `task` on each item; return the results in the items' order. `on_report(name, metrics)` gets progress."""
        ...


@runtime_checkable
class Executor(Mapper, Protocol):
    """Runs pieces of work. After a stop signal, `serve` and `map` raise `Interrupted` once checkpoints are saved."""

    def serve(self, source: PieceSource) -> None:
        """Run all pieces of work that `source` returns. When a piece's task has ended, call the piece's `settle`."""
        ...

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """See `Mapper.map`. Raises the first error. With `ReturnFailures`, an item whose workers die gives `Failed`."""
        results: dict[int, Any] = {}

        def settle(index: int, result: Any, error: Exception | None) -> None:
            if isinstance(task, ReturnFailures) and isinstance(error, RetriesExhausted):
                result, error = Failed(str(error), error.host, again=False), None
            if error is not None:
                raise error
            results[index] = result

        pieces = [
            Piece(task, item, name, functools.partial(on_report, name), functools.partial(settle, index))
            for index, (item, name) in enumerate(zip(items, names, strict=True))
        ]
        self.serve(all_at_once(pieces))
        return [results[index] for index in range(len(pieces))]


def all_at_once(pieces: Sequence[Piece]) -> PieceSource:
    """Return a `PieceSource` that returns all pieces at its first call, then None."""
    batches = iter([pieces] if pieces else [])
    return lambda seconds: next(batches, None)
