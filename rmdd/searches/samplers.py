"""Optuna samplers, which choose the values of the next trial, and pruners, which stop poor trials."""

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rmdd import config
from rmdd.core.seeding import derive
from rmdd.searches.space import Space

FIRST_TRIAL = "first"
"""Key under which a study stores the number of its first new trial; lower numbers are copies from earlier searches."""


def trials_of(study: Study) -> list[FrozenTrial]:
    """Return the trials that this search has started, without those that were copied from other searches."""
    first = study.user_attrs.get(FIRST_TRIAL, 0)
    return [t for t in study.get_trials(deepcopy=False) if t.number >= first and t.state != TrialState.WAITING]


class Seeded(BaseSampler):
    """Optuna sampler that is created anew for every trial. Its seed depends on the number of the trial.

    A resumed search therefore draws the same values as a search that was never interrupted.
    """

    def __init__(self, make: Callable[[int], BaseSampler]):
        self.make = make
        self.number = -1
        self.inner = make(0)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self.number:
            self.number, self.inner = trial.number, self.make(trial.number)
        return self.inner

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._of(trial).sample_independent(study, trial, name, distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._of(trial).after_trial(study, trial, state, values)


class Grid(BaseSampler):
    """Optuna sampler that tries each row of `rows` once: the trial with number n gets row n."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> Any:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self.rows[(trial.number - study.user_attrs.get(FIRST_TRIAL, 0)) % len(self.rows)][name]


def sampler_of(search: config.Search, space: Space, seed: int) -> BaseSampler:
    if search.sampler == "grid":
        return Grid(space.grid())

    def make(number: int) -> BaseSampler:
        drawn = derive(seed, f"search by {search.sampler}", number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _sampler(search, drawn)

    return Seeded(make)


def _sampler(search: config.Search, seed: int) -> BaseSampler:
    samplers = optuna.samplers
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "cmaes":
        independent = samplers.RandomSampler(seed=seed)
        return samplers.CmaEsSampler(seed=seed, independent_sampler=independent, warn_independent_sampling=False)
    if search.sampler == "nsgaii":
        return samplers.NSGAIISampler(population_size=max(2, search.startup), seed=seed)
    return samplers.TPESampler(n_startup_trials=search.startup, multivariate=True, group=True, seed=seed)


def pruner_of(search: config.Search) -> optuna.pruners.BasePruner:
    if search.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=search.reduction)
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=search.startup, n_warmup_steps=0)
    return optuna.pruners.NopPruner()
