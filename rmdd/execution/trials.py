"""Interfaces for the trials of a search: `TrialSource` chooses the trials, and `TrialRunner` runs one of them."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from rmdd.execution.tasks import Hooks, Values


@runtime_checkable
class TrialRunner(Protocol):
    """Runs one trial in steps, called rungs. After each rung the `TrialSource` may end the trial early."""

    def run_rung(self, hooks: Hooks) -> Values:
        """Run the next rung; return its results, with `done` true after the last rung. May raise `Interrupted`."""
        ...


@runtime_checkable
class TrialSource(Protocol):
    """Chooses the trials of a search, and decides after each rung whether the trial continues."""

    def ask(self) -> tuple[str, Any] | None:
        """Return the name of the next trial and its argument for `open_runner`; None if no more trials will start."""
        ...

    def tell(self, name: str, rung: Values) -> bool:
        """Store `rung`, the results of one rung of the trial `name`; return whether the trial runs its next rung."""
        ...

    def fail(self, name: str, why: str) -> None:
        """Record that the trial `name` failed, with the reason `why`."""
        ...


RunTrials = Callable[[TrialSource, Callable[[Any], TrialRunner], int | None], None]
"""`run_trials(source, open_runner, most)` runs all trials of a `TrialSource`, at most `most` of them in parallel."""


def sequential_trials(source: TrialSource, open_runner: Callable[[Any], TrialRunner], most: int | None = None) -> None:
    """Run the trials one after another in this process; `most`, the number of parallel trials, is ignored."""
    while (trial := source.ask()) is not None:
        name, argument = trial
        try:
            runner = open_runner(argument)
            while source.tell(name, runner.run_rung(Hooks())):
                pass
        except (RuntimeError, OSError, MemoryError) as error:
            source.fail(name, f"{type(error).__name__}: {error}")
