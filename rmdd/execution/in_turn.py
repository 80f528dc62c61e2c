"""The executor without Ray, which runs one item after another in this process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rmdd.core.threads import torch_threads
from rmdd.execution.executor import Executor, Piece, PieceSource
from rmdd.execution.interrupts import stop_on_signal
from rmdd.execution.tasks import Hooks, Interrupted


@dataclass
class SequentialExecutor(Executor):
    """Runs items one by one in this process. After Ctrl-C or SIGTERM the running task saves its checkpoint and stops; a
    second signal stops the task at once. `hooks` receive the reports of all tasks, and can ask the tasks to stop."""

    threads: int = 1
    hooks: Hooks = field(default_factory=Hooks)

    def serve(self, source: PieceSource) -> None:
        with torch_threads(self.threads), stop_on_signal() as signalled:

            def stopped() -> bool:
                return signalled() | self.hooks.should_stop()

            while (pieces := source(0.5)) is not None:
                for piece in pieces:
                    result, failure = None, None
                    piece.on_report({})
                    try:
                        result = piece.task(piece.item, Hooks(self._reporting(piece), stopped))
                    except Exception as error:
                        failure = error
                    piece.settle(result, failure)
                    if stopped():
                        raise Interrupted
                if stopped():
                    raise Interrupted

    def _reporting(self, piece: Piece) -> Callable[[dict[str, Any]], None]:
        def report(metrics: dict[str, Any]) -> None:
            piece.on_report(metrics)
            self.hooks.report(metrics)

        return report
