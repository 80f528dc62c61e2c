"""Independent pieces of work and who does them: in turn in this process, or side by side on a cluster.

A *task* is a plain function `task(item, hooks)`. It reports progress through its hooks, asks them whether to
stop, keeps its own checkpoints, and gives the same bits wherever it runs. One that was stopped before its end
returns False.
"""

import contextlib
import functools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """Work was asked to stop and has saved what it had."""


@dataclass(frozen=True)
class Seat:
    """A place among the workers that do one item together."""

    rank: int
    size: int
    host: str
    """Address of this machine for the others."""
    meet: Callable[[str | None], str]
    """The first calls it with what the others are to know; they call it with None and get that."""


@dataclass
class Hooks:
    """What a task is given besides its item."""

    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    should_stop: Callable[[], bool] = lambda: False
    seat: Seat | None = None


@dataclass(frozen=True)
class Failed:
    """What stands in the place of a result that `Spared` did not get."""

    reason: str
    host: str
    again: bool
    """Whether another try may do better: not after a `ValueError` or the like, which the same numbers bring again."""


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


@dataclass
class Piece:
    """One item on its way: what to do with it, and whom to tell how it goes and how it ended."""

    task: Task
    item: Any
    name: str
    on_report: Callable[[dict[str, Any]], None]
    settle: Callable[[Any, Exception | None], None]
    """Takes the result, or the error that ended it. An error raised in here ends the work of all."""


Source = Callable[[float], Sequence[Piece] | None]
"""Gives the pieces that have come meanwhile, after so many seconds at most; None when no more will come."""


class GivenUp(RuntimeError):
    """The workers of an item died too often."""

    def __init__(self, message: str, host: str):
        super().__init__(message)
        self.host = host


@runtime_checkable
class Climber(Protocol):
    """Work in rungs, which may be ended after each."""

    def climb(self, hooks: Hooks) -> Values:
        """Do the next rung; `done` is true after the last. Raises `Interrupted` when asked to stop."""
        ...


@runtime_checkable
class Inquiry(Protocol):
    """Who decides what is tried next, and whether it goes on. Called from one thread."""

    def ask(self) -> tuple[str, Any] | None:
        """A name and what to climb; None when nothing is left to begin."""
        ...

    def told(self, name: str, rung: Values) -> bool:
        """Take what a rung gave; returns whether to climb on."""
        ...

    def failed(self, name: str, why: str) -> None:
        """It could not be done here and now."""
        ...


class Lost(RuntimeError):
    """One of some ranks died, and what it held is gone."""


@runtime_checkable
class Ranks(Protocol):
    """Who each hold a part of something, and are asked together."""

    def ask(self, what: str, *given: Any) -> list[Any]:
        """What the method `what` of every part returns, in the order of ranks. Raises `Lost`."""
        ...


@dataclass
class Here(Ranks):
    """All parts in this process."""

    parts: Sequence[Any]

    def ask(self, what: str, *given: Any) -> list[Any]:
        return [getattr(part, what)(*given) for part in self.parts]


OpenRanks = Callable[..., contextlib.AbstractContextManager[Ranks]]
"""`open(make, size, most, accelerated)` opens `size` ranks (None: as many as do well, up to `most`, if given); each
makes its part from its number and their number, `make(rank, size)`, and has a worker's share of a GPU if it is
`accelerated`."""


@contextlib.contextmanager
def ranks_here(
    make: Callable[[int, int], Any], size: int | None = None, most: int | None = None, accelerated: bool = False
) -> Iterator[Ranks]:
    """`OpenRanks` in this process."""
    count = size or 1
    yield Here([make(rank, count) for rank in range(count)])


def with_restarts(work: Callable[[], T], restarts: int, say: Callable[[str], None]) -> T:
    """`work()`, which opens ranks and goes on from what it kept, again after each `Lost`, up to so many times."""
    for left in reversed(range(restarts + 1)):
        try:
            return work()
        except Lost as error:
            if not left:
                raise
            say(f"{error}; the ranks start again from what was kept")
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Spared:
    """The task, which returns why it failed where it fails: one item does not stop the others."""

    task: Task

    def __call__(self, item: Any, hooks: Hooks) -> Any:
        try:
            return self.task(item, hooks)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return Failed(reason, socket.gethostname(), isinstance(error, RuntimeError | OSError | MemoryError))


@runtime_checkable
class Mapper(Protocol):
    """Who does a list of items."""

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """Results in the order of `items`. `on_report(name, metrics)` sees the latest report of each item."""
        ...


@runtime_checkable
class Executor(Mapper, Protocol):
    """Who does the work. Both raise `Interrupted` when work was asked to stop and has saved what it had."""

    def serve(self, source: Source) -> None:
        """Do all pieces as they come; the end of one is told to it alone."""
        ...

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """See `Mapper`. Raises the first error of a task, or `GivenUp`, which a `Spared` one returns as `Failed`."""
        results: dict[int, Any] = {}

        def settle(place: int, result: Any, error: Exception | None) -> None:
            if isinstance(task, Spared) and isinstance(error, GivenUp):
                result, error = Failed(str(error), error.host, again=False), None
            if error is not None:
                raise error
            results[place] = result

        pieces = [
            Piece(task, item, name, functools.partial(on_report, name), functools.partial(settle, place))
            for place, (item, name) in enumerate(zip(items, names, strict=True))
        ]
        self.serve(once(pieces))
        return [results[place] for place in range(len(pieces))]


def once(pieces: Sequence[Piece]) -> Source:
    """All pieces at the first call."""
    left = iter([pieces] if pieces else [])
    return lambda seconds: next(left, None)


@dataclass
class InTurn(Executor):
    """One item after another in this process. Ctrl-C and SIGTERM ask the item at work to save and stop; a second
    one stops it where it is. `hooks` see all reports, and may ask to stop too."""

    threads: int = 1
    hooks: Hooks = field(default_factory=Hooks)

    def serve(self, source: Source) -> None:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with asked_to_stop() as signalled:

                def stopped() -> bool:
                    return signalled() | self.hooks.should_stop()

                while (pieces := source(0.5)) is not None:
                    for piece in pieces:
                        result, failure = None, None
                        try:
                            result = piece.task(piece.item, Hooks(self._telling(piece), stopped))
                        except Exception as error:
                            failure = error
                        piece.settle(result, failure)
                        if stopped():
                            raise Interrupted
                    if stopped():
                        raise Interrupted
        finally:
            torch.set_num_threads(before)

    def _telling(self, piece: Piece) -> Callable[[dict[str, Any]], None]:
        def report(metrics: dict[str, Any]) -> None:
            piece.on_report(metrics)
            self.hooks.report(metrics)

        return report


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a signal has come; the second one raises `KeyboardInterrupt`."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def time_limit(minutes: float | None, say: Callable[[str], None]) -> Iterator[None]:
    """Stop what goes on inside after `minutes` as Ctrl-C would. Raises `ValueError` outside the main thread."""
    if minutes is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("runtime.time_limit needs the main thread, where signals come in; unset it or run there")
    began = time.monotonic()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    except KeyboardInterrupt:
        if time.monotonic() - began >= 60 * minutes:
            say(f"the time limit of {minutes:g} minutes (runtime.time_limit) was reached")
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
