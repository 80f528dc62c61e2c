"""Inputs of an analysis: the experts of a run, an initial set of real pairs, and original or shortcut paths."""

import functools
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

from rmdd import config, methods
from rmdd.core.device import device_of
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory import statistics
from rmdd.distill.trajectory.matching import Matcher
from rmdd.experts.train import expert_model, kept_epochs
from rmdd.pipeline import Pipeline

TRAJECTORIES = ("original", "shortcut")


class Setting:
    """Inputs of an analysis: the experts of a run, trained if missing, and the initial pairs of its first phase.

    `experts` limits the number of experts. `endpoint` is the last epoch of shortcuts (None: the experts' last epoch).
    Each start epoch and expert gives `draws` gradients. Before any training, raise `ConfigError` if the run cannot be
    analysed, for example if it gives fewer than `least` gradients per kind of trajectory.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        trajectories: Sequence[str],
        *,
        endpoint: int | None = None,
        experts: int | None = None,
        least: int = 1,
        draws: int = 1,
    ):
        run, self.trajectories = pipeline.run, trajectories
        self.endpoint = endpoint_of(run.distill.match_epochs, run.experts.epochs, endpoint)
        self.num = min(experts or run.experts.num, run.experts.num)
        gradients = (self.endpoint - run.distill.match_epochs + 1) * self.num * draws
        stored = stored_epochs(run.experts.epochs, kept_epochs(run.experts, run.endpoints))
        mistakes = missing_epochs(run.experts.epochs, stored) if "original" in trajectories else []
        if not (mistakes or self.endpoint in stored):
            mistakes.append(
                f"--endpoint {self.endpoint} is not stored: the experts keep epochs {sorted(stored)}; give one of "
                "them as --endpoint, or train experts with experts.keep: all"
            )
        if gradients < least:
            mistakes.append(
                f"the analysis needs {least} gradients but gets {gradients}; give more --experts or --draws"
            )
        try:
            methods.matching_method(run)
        except ValueError as error:
            mistakes = [str(error)]
        if mistakes:
            raise config.ConfigError(mistakes, "analyse")
        self.run = pipeline.plan()
        self.store, self.train = pipeline.experts(), pipeline.prepared_split("train")
        self.folder: Path = pipeline.folder / "analyse"
        self.pairs = self.run.distill.phases[0].pairs
        self.device = device_of(self.run.runtime)

    def initial(self, method: methods.Method) -> Synthetic:
        """Return the initial set that `method` makes for the first phase."""
        return method.initial(0, self.train, method.records(0, self.train)).map(lambda t: t.to(self.device))

    def run_on(self, trajectory: str) -> config.Run:
        """Return a copy of the run with all pairs in one phase, on trajectories of the kind `trajectory`."""
        return statistics.probing(self.run, self.endpoint, trajectory, self.pairs, self.num)

    def matcher(self, trajectory: str) -> Matcher:
        """Return the matcher that computes matching gradients on trajectories of the kind `trajectory`."""
        model = expert_model(
            self.run.model, self.run.data.image_size, self.run.seed_of("experts"), 0, self.train.texts.shape[1]
        )
        return Matcher(methods.matching_method(self.run_on(trajectory)), 0, self.store, model, self.device)

    def starts(self) -> range:
        """Return all integer start epochs whose target epoch lies on the path."""
        return range(self.endpoint - self.run.distill.match_epochs + 1)

    @functools.cached_property
    def samples(self) -> list[int]:
        """Indices of the experts that the analysis uses."""
        return [e for e in self.store.complete() if e < self.num]

    def probe(self, trajectory: str, draws: int, *, averaged: bool = False) -> statistics.Probe:
        """Compute the matching gradients at every start epoch, on trajectories of the kind `trajectory`."""
        initial = self.initial(methods.matching_method(self.run_on(trajectory)))
        return statistics.probe(self.matcher(trajectory), initial, self.starts(), draws, averaged=averaged)

    def labels(self, draws: int) -> list[tuple[int, int]]:
        """Return the (expert, draw) of each gradient at one start epoch, in the order of the gradients in a `Probe`."""
        return list(itertools.product(self.samples, range(draws)))


def endpoint_of(least: int, last: int, endpoint: int | None) -> int:
    """Return `endpoint`, the epoch at which shortcuts end; the default is `last`.

    Raises `ConfigError` if it is below `least` or above `last`.
    """
    if endpoint is not None and not least <= endpoint <= last:
        mistake = f"--endpoint {endpoint} is outside of the experts' epochs; give one from {least} to {last}"
        raise config.ConfigError([mistake], "analyse")
    return last if endpoint is None else endpoint


def stored_epochs(last: int, kept: Collection[int] | None) -> set[int]:
    """Return the epochs stored for experts with `last` epochs: 0, `kept` and `last`, or all if `kept` is None."""
    return {0, *(kept or range(last)), last}


def missing_epochs(last: int, stored: Collection[int]) -> list[str]:
    """Return one message if the experts did not store every epoch up to `last`, otherwise an empty list."""
    if len(stored) > last:
        return []
    return [
        f"original trajectories need every epoch, but the experts keep {sorted(stored)}; train experts with "
        "experts.keep: all, or give --shortcut-only"
    ]


def trajectories_of(shortcut_only: bool) -> Sequence[str]:
    """Return the kinds of trajectories to analyse: original and shortcut, or shortcut only."""
    return TRAJECTORIES[1:] if shortcut_only else TRAJECTORIES
