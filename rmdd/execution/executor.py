"""The interface of an executor, which runs tasks on items: pieces as they arrive, or a list of items in one call."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rmdd.execution.tasks import Failed, ReturnFailures, Task


@dataclass
class Piece:
    """An item, its task, and the functions that get its progress reports and its result."""

    task: Task
    item: Any
    name: str
    on_report: Callable[[dict[str, Any]], None]
    settle: Callable[[Any, Exception | None], None]
    """Called with the result and None, or with None and the error. An error raised by it stops all work."""


PieceSource = Callable[[float], Sequence[Piece] | None]
"""`source(seconds)` returns new pieces, waiting for at most that long, or None if no more will come."""


class RetriesExhausted(RuntimeError):
    """The workers of an item died more often than `runtime.max_restarts` allows."""

    def __init__(self, message: str, host: str):
        super().__init__(message)
        self.host = host


@runtime_checkable
class Mapper(Protocol):
    """Runs a task on a list of items."""

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """Return the results in the order of `items`; `on_report(name, metrics)` gets the progress of each item."""
        ...


@runtime_checkable
class Executor(Mapper, Protocol):
    """Runs pieces. Both methods raise `Interrupted` after a stop signal, when the running tasks have saved."""

    def serve(self, source: PieceSource) -> None:
        """Run all pieces as they arrive, and call the `settle` of each at its end."""
        ...

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """See `Mapper`. Raises the first error; with `ReturnFailures`, `RetriesExhausted` becomes a `Failed` result."""
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
    """Return a source that gives all pieces at its first call."""
    batches = iter([pieces] if pieces else [])
    return lambda seconds: next(batches, None)
