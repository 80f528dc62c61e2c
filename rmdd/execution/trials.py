"""Interfaces for the trials of a search (a source that chooses them, a runner of one), and a sequential loop."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from rmdd.execution.tasks import Hooks, Values


@runtime_checkable
class TrialRunner(Protocol):
    """Runs one trial in steps, called rungs: after each rung the source may end the trial."""

    def run_rung(self, hooks: Hooks) -> Values:
        """Run the next rung, and return its results with `done`: whether it was the last. Raises `Interrupted`."""
        ...


@runtime_checkable
class TrialSource(Protocol):
    """Chooses the next trial, and decides after each rung whether a trial continues. Called from one thread."""

    def ask(self) -> tuple[str, Any] | None:
        """Return the name of the next trial and the argument of `open_runner` for it; None if there are no more."""
        ...

    def tell(self, name: str, rung: Values) -> bool:
        """Take the results of a rung, and return whether the trial continues."""
        ...

    def fail(self, name: str, why: str) -> None:
        """Take notice that a trial failed, with the reason."""
        ...


RunTrials = Callable[[TrialSource, Callable[[Any], TrialRunner], int | None], None]
"""`run_trials(source, open_runner, most)` runs trials until the source has no more, at most `most` in parallel."""


def sequential_trials(source: TrialSource, open_runner: Callable[[Any], TrialRunner], most: int | None = None) -> None:
    """Run the trials one after another in this process (a `RunTrials` that ignores `most`)."""
    while (trial := source.ask()) is not None:
        name, argument = trial
        try:
            runner = open_runner(argument)
            while source.tell(name, runner.run_rung(Hooks())):
                pass
        except (RuntimeError, OSError, MemoryError) as error:
            source.fail(name, f"{type(error).__name__}: {error}")
