"""`TrialLoader` builds the run of a trial from the base run and the values of the trial, and checks this run."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rmdd import config
from rmdd.distill.trajectory.planning import budget_error, with_estimated_phases
from rmdd.models.text import text_width
from rmdd.searches.space import overrides

WidthOf = Callable[[config.TextTower], int]


class TrialLoader:
    """Builds the runs of trials: each is `base` with some changed fields and without the section `search`.

    `width_of(tower)` returns the width of the embeddings of a text tower.
    """

    def __init__(self, base: config.Run, width_of: WidthOf = text_width):
        self.base, self.width_of = base, width_of
        self.raw = base.plain()
        self.shared = shares_experts(base.search.space)

    def load(self, values: Mapping[str, Any]) -> config.Run:
        return config.load(self.raw | {"search": {}}, overrides(values))

    def checked(self, values: Mapping[str, Any]) -> config.Run:
        """Load a trial; raise `ConfigError` if it is invalid, over budget or needs expert epochs that are not kept."""
        run, mistakes = self.load(values), []
        if run.distill.budget_check == "error":
            try:
                if run.distill.plan.plans:
                    with_estimated_phases(run, self.width_of(run.model.text))
                elif excess := budget_error(run, self.width_of(run.model.text)):
                    mistakes.append(excess)
            except ValueError as error:
                mistakes.append(str(error))
        base = self.base
        if self.shared and run.experts.keep == "endpoints" and run.endpoints != base.endpoints:
            mistakes.append(
                f"the trial needs expert epochs {list(run.endpoints)}, but the shared experts keep only "
                f"{list(base.endpoints)}; set experts.keep: all"
            )
        if mistakes:
            raise config.ConfigError(mistakes, base.name)
        return run

    def mistakes(self, values: Mapping[str, Any]) -> list[str]:
        """Return the messages of all mistakes in the run of a trial; empty if the trial can start."""
        try:
            self.checked(values)
        except config.ConfigError as error:
            return error.mistakes
        return []


def shares_experts(space: Iterable[str]) -> bool:
    """Return whether all trials use the same experts: true if `space` varies only fields of the section `distill`."""
    return all(field.split(".")[0] == "distill" for field in space)
