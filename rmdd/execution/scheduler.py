"""Execute the runs of a sweep with one shared executor, so that work that several runs need is done only once."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rmdd.execution.executor import Executor, Piece, PieceSource
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.tasks import Hooks, Interrupted, Task


@runtime_checkable
class TargetedTask(Protocol):
    """A task that can name the path of each item's result. If items have the same path, only one of them is run."""

    def __call__(self, item: Any, hooks: Hooks) -> Any: ...

    def target(self, item: Any) -> Path: ...


@contextlib.contextmanager
def collect_errors(errors: dict[str, Exception], label: str) -> Iterator[None]:
    """Catch an error that the block raises, and store it as `errors[label]`."""
    try:
        yield
    except Exception as error:
        errors[label] = error


@dataclass
class _SharedPiece:
    """The result of a piece of work for one or more runs of a sweep, and the functions that get the work's progress."""

    reports: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    settled: bool = False
    result: Any = None
    error: Exception | None = None

    def report(self, metrics: dict[str, Any]) -> None:
        for each in self.reports:
            each(metrics)

    def settle(self, result: Any, error: Exception | None) -> None:
        self.settled, self.result, self.error = True, result, error


class SweepScheduler:
    """Executes the runs of a sweep in threads. Only one thread computes at a time.

    The other threads wait until the queued pieces of work that they need are finished. If two runs need the same piece,
    the first run queues it, and the second run waits for its result.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self.turn = threading.Lock()
        self.changed = threading.Condition()
        self.queue: list[Piece] = []
        self.shared: dict[Path, _SharedPiece] = {}
        self.runs: list[threading.Thread] = []
        self.running = 0
        self.stopped = False
        self.errors: dict[str, Exception] = {}

    def add(self, label: str, run: Callable[[], Any]) -> None:
        """Add a run of the sweep: `run` is a function that executes it, `label` its name in messages and errors."""

        def take_part() -> None:
            try:
                with self.turn, contextlib.suppress(Interrupted), collect_errors(self.errors, label):
                    self._check()
                    run()
            finally:
                with self.changed:
                    self.running -= 1
                    self.changed.notify_all()

        self.running += 1
        self.runs.append(threading.Thread(target=take_part, name=label, daemon=True))

    def run_all(self) -> dict[str, Exception]:
        """Execute all runs; return the errors of the failed ones by label. Raises `Interrupted` after a stop signal."""
        for run in self.runs:
            run.start()
        try:
            self.executor.serve(self._new_pieces)
        except BaseException:
            with self.changed:
                self.stopped = True
                self.changed.notify_all()
            raise
        finally:
            for run in self.runs:
                run.join()
        return self.errors

    def executor_of(self, label: str) -> Executor:
        """Return an executor for one run, which adds the run's pieces of work to the queue of the sweep."""
        return _RunExecutor(self, label)

    def map(
        self,
        label: str,
        task: TargetedTask,
        items: Sequence[Any],
        names: Sequence[str],
        on_report: Callable[[str, dict[str, Any]], None],
    ) -> list[Any]:
        with self.changed:
            self._check()
            awaited = []
            for item, name in zip(items, names, strict=True):
                target = task.target(item)
                if target not in self.shared:
                    shared = self.shared[target] = _SharedPiece()
                    settle = functools.partial(self._settle, shared)
                    self.queue.append(Piece(self._alone(task), item, f"{label}: {name}", shared.report, settle))
                self.shared[target].reports.append(functools.partial(on_report, name))
                awaited.append(self.shared[target])
            self.changed.notify_all()
        self.turn.release()
        try:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or all(shared.settled for shared in awaited))
        finally:
            self.turn.acquire()
        self._check()
        for shared in awaited:
            if shared.error is not None:
                raise shared.error
        return [shared.result for shared in awaited]

    def _new_pieces(self, seconds: float) -> list[Piece] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.queue or not self.running, timeout=seconds)
            pieces, self.queue = self.queue, []
            return pieces if pieces or self.running else None

    def _check(self) -> None:
        if self.stopped:
            raise Interrupted

    def _settle(self, shared: _SharedPiece, result: Any, error: Exception | None) -> None:
        with self.changed:
            shared.settle(result, error)
            self.changed.notify_all()

    def _alone(self, task: Task) -> Task:
        """If `task` runs in this process, make it hold the lock `turn`: all threads share torch's random state."""
        if not isinstance(self.executor, SequentialExecutor):
            return task

        def alone(item: Any, hooks: Hooks) -> Any:
            with self.turn:
                return task(item, hooks)

        return alone


class _RunExecutor(Executor):
    def __init__(self, scheduler: SweepScheduler, label: str):
        self.scheduler, self.label = scheduler, label

    def serve(self, source: PieceSource) -> None:
        raise AssertionError("the scheduler of a sweep serves pieces of work, not a run")

    def map(
        self, task: Any, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        return self.scheduler.map(self.label, task, items, names, on_report)
