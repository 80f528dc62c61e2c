"""What the analyses of a run look at: its experts, a first set of real pairs, and paths of either kind."""

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
    """The experts of a run, trained first where they are missing, and the real pairs that its first phase begins with.

    `experts` limits how many are used, `endpoint` is where shortcuts end (default: the last epoch), `least` how many
    gradients of one trajectory are needed, with `draws` of each start and expert. Raises `ConfigError` before anything
    is trained when the run's experts cannot be looked at like that.
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
                f"the experts keep epochs {sorted(stored)}, asked for shortcuts to {self.endpoint}; give one of "
                "them as --endpoint, or train experts with experts.keep: all"
            )
        if gradients < least:
            mistakes.append(f"{gradients} gradients, {least} are needed; give more --experts or --draws")
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
        return method.initial(0, self.train, method.records(0, self.train)).map(lambda t: t.to(self.device))

    def probing(self, trajectory: str) -> config.Run:
        """The run on one kind of path."""
        return statistics.probing(self.run, self.endpoint, trajectory, self.pairs, self.num)

    def matcher(self, trajectory: str) -> Matcher:
        model = expert_model(
            self.run.model, self.run.data.image_size, self.run.seed_of("experts"), 0, self.train.texts.shape[1]
        )
        return Matcher(methods.matching_method(self.probing(trajectory)), 0, self.store, model, self.device)

    def starts(self) -> range:
        """Every whole epoch from which a target can be reached."""
        return range(self.endpoint - self.run.distill.match_epochs + 1)

    @functools.cached_property
    def samples(self) -> list[int]:
        """Numbers of the experts that are used."""
        return [e for e in self.store.complete() if e < self.num]

    def probe(self, trajectory: str, draws: int, *, averaged: bool = False) -> statistics.Probe:
        """Matching gradients at every start of the paths of one kind."""
        initial = self.initial(methods.matching_method(self.probing(trajectory)))
        return statistics.probe(self.matcher(trajectory), initial, self.starts(), draws, averaged=averaged)

    def labels(self, draws: int) -> list[tuple[int, int]]:
        """Expert and draw of each sample of a probe."""
        return list(itertools.product(self.samples, range(draws)))


def endpoint_of(least: int, last: int, endpoint: int | None) -> int:
    """Where shortcuts end: `endpoint`, or the last epoch. Raises `ConfigError` when it is not in least..last."""
    if endpoint is not None and not least <= endpoint <= last:
        mistake = f"asked for shortcuts to epoch {endpoint}; give one from {least} to {last}, where the experts end"
        raise config.ConfigError([mistake], "analyse")
    return last if endpoint is None else endpoint


def stored_epochs(last: int, kept: Collection[int] | None) -> set[int]:
    """Epochs that a store has of experts of `last` epochs; `kept`: those that stay, None for all."""
    return {0, *(kept or range(last)), last}


def missing_epochs(last: int, stored: Collection[int]) -> list[str]:
    """What is wrong where a store does not have the whole trajectory."""
    if len(stored) > last:
        return []
    return [
        f"original trajectories need every epoch and the experts keep {sorted(stored)}; train experts with "
        "experts.keep: all, or look at shortcuts only"
    ]


def chosen(shortcut_only: bool) -> Sequence[str]:
    return TRAJECTORIES[1:] if shortcut_only else TRAJECTORIES
