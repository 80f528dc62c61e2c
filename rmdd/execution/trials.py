"""Trials of a search: what decides which are made, what makes one, and the loop over them in this process."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from rmdd.execution.tasks import Hooks, Values


@runtime_checkable
class TrialRunner(Protocol):
    """One trial, made rung by rung; it may be ended after each."""

    def run_rung(self, hooks: Hooks) -> Values:
        """Do the next rung; `done` is true after the last. Raises `Interrupted` when asked to stop."""
        ...


@runtime_checkable
class TrialSource(Protocol):
    """Decides which trial is made next, and whether one goes on. Called from one thread."""

    def ask(self) -> tuple[str, Any] | None:
        """The name of a trial and what its runner is opened with; None when nothing is left to begin."""
        ...

    def tell(self, name: str, rung: Values) -> bool:
        """Take the result of a rung; returns whether the trial goes on."""
        ...

    def fail(self, name: str, why: str) -> None:
        """The trial could not be done here and now."""
        ...


RunTrials = Callable[[TrialSource, Callable[[Any], TrialRunner], int | None], None]
"""`run_trials(source, open_runner, most)` makes trials until the source has none, at most `most` side by side."""


def sequential_trials(source: TrialSource, open_runner: Callable[[Any], TrialRunner], most: int | None = None) -> None:
    """`RunTrials` one after the other in this process, whatever `most` allows."""
    while (trial := source.ask()) is not None:
        name, what = trial
        try:
            runner = open_runner(what)
            while source.tell(name, runner.run_rung(Hooks())):
                pass
        except (RuntimeError, OSError, MemoryError) as error:
            source.fail(name, f"{type(error).__name__}: {error}")
