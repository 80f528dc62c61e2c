"""Independent pieces of work and who does them: in turn in this process, or side by side on a cluster.

A *task* is a plain function `task(item, hooks)`. It reports progress through its hooks, asks them whether to
stop, keeps its own checkpoints, and gives the same bits wherever it runs.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


class Interrupted(KeyboardInterrupt):
    """Work was asked to stop and has saved what it had."""


@dataclass
class Hooks:
    """What a task is given besides its item."""

    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    should_stop: Callable[[], bool] = lambda: False


Task = Callable[[Any, Hooks], Any]


@runtime_checkable
class Executor(Protocol):
    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """Results in the order of `items`. `on_report(name, metrics)` sees the latest report of each item."""
        ...


@dataclass
class InTurn:
    """One item after another in this process."""

    threads: int = 1
    stopped: Callable[[], bool] = field(default=lambda: False)

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            results = []
            for item, name in zip(items, names, strict=True):
                results.append(task(item, Hooks(functools.partial(on_report, name), self.stopped)))
                if self.stopped():
                    raise Interrupted
            return results
        finally:
            torch.set_num_threads(before)
