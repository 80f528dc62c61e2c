"""What an executor is: it does pieces as they come, or a list of items in one call."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rmdd.execution.tasks import Failed, ReturnFailures, Task


@dataclass
class Piece:
    """One item with its task, and the functions that are called with its progress and its end."""

    task: Task
    item: Any
    name: str
    on_report: Callable[[dict[str, Any]], None]
    settle: Callable[[Any, Exception | None], None]
    """Takes the result, or the error that ended it. An error raised in here ends the work of all."""


PieceSource = Callable[[float], Sequence[Piece] | None]
"""Gives the pieces that have come meanwhile, after so many seconds at most; None when no more will come."""


class RetriesExhausted(RuntimeError):
    """The workers of an item died too often."""

    def __init__(self, message: str, host: str):
        super().__init__(message)
        self.host = host


@runtime_checkable
class Mapper(Protocol):
    """Does a list of items."""

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """Results in the order of `items`. `on_report(name, metrics)` sees the latest report of each item."""
        ...


@runtime_checkable
class Executor(Mapper, Protocol):
    """Does pieces. Both methods raise `Interrupted` when work was asked to stop and has saved its state."""

    def serve(self, source: PieceSource) -> None:
        """Do all pieces as they come; each is told its end by its `settle`."""
        ...

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """See `Mapper`. Raises the first error; a `ReturnFailures` task returns `RetriesExhausted` as `Failed`."""
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
    """All pieces at the first call."""
    left = iter([pieces] if pieces else [])
    return lambda seconds: next(left, None)
