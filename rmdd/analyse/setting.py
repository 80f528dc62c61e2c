"""What the analyses of a run look at: its experts, a first set of real pairs, and paths of either kind."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

from rmdd import config, methods
from rmdd.distill import signals
from rmdd.distill.matching import Matcher
from rmdd.distill.synthetic import Synthetic
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.pipeline import Pipeline
from rmdd.places import device_of

TRAJECTORIES = ("original", "shortcut")


class Setting:
    """The experts of a run, trained first where they are missing, and the real pairs that its first phase begins with.

    `experts` limits how many are used, `endpoint` is where shortcuts end (default: the last epoch).
    """

    def __init__(self, pipeline: Pipeline, *, endpoint: int | None = None, experts: int | None = None):
        self.run = pipeline.plan()
        self.store, self.train = pipeline.experts(), pipeline.material("train")
        self.endpoint = self.store.epochs if endpoint is None else endpoint
        self.num = min(experts or self.run.experts.num, self.run.experts.num)
        self.folder: Path = pipeline.folder / "analyse"
        self.pairs = self.run.distill.phases[0].pairs
        self.device = device_of(self.run)
        least = self.run.distill.match_epochs
        if not least <= self.endpoint <= self.store.epochs:
            raise ValueError(
                f"asked for shortcuts to epoch {self.endpoint}; give one from {least} to {self.store.epochs}, where "
                "the experts end"
            )

    def initial(self, run: config.Run) -> Synthetic:
        method = methods.find(run.distill.method)(run)
        return method.initial(0, self.train, method.records(0, self.train)).map(lambda t: t.to(self.device))

    def probing(self, trajectory: str) -> config.Run:
        """The run on one kind of path; raises `ValueError` where the store cannot give it."""
        if trajectory == "original":
            check_every_epoch(self.store)
        return signals.probing(self.run, self.endpoint, trajectory, self.pairs, self.num)

    def matcher(self, trajectory: str) -> Matcher:
        model = expert_model(self.run, 0, self.train.texts.shape[1])
        return Matcher(self.probing(trajectory), 0, self.store, model, self.device)

    def starts(self) -> range:
        """Every whole epoch from which a target can be reached."""
        return range(self.endpoint - self.run.distill.match_epochs + 1)

    @functools.cached_property
    def samples(self) -> list[int]:
        """Numbers of the experts that are used."""
        return [e for e in self.store.complete() if e < self.num]

    def probe(self, trajectory: str, draws: int) -> signals.Probe:
        """Matching gradients at every start of the paths of one kind."""
        run = self.probing(trajectory)
        return signals.probe(self.matcher(trajectory), self.initial(run), self.starts(), draws)

    def labels(self, draws: int) -> list[tuple[int, int]]:
        """Expert and draw of each sample of a probe."""
        return list(itertools.product(self.samples, range(draws)))


def check_every_epoch(store: Store) -> None:
    """Raise `ValueError` when a store does not keep the whole trajectory."""
    gone = [e for e in range(store.epochs + 1) if not store.kept(e)]
    if gone:
        raise ValueError(
            f"original trajectories need every epoch and the store at {store.path} keeps {store.spec['keep']} of "
            f"0-{store.epochs}; train experts with experts.keep: all, or look at shortcuts only (--shortcut-only)"
        )


def chosen(shortcut_only: bool) -> Sequence[str]:
    return TRAJECTORIES[1:] if shortcut_only else TRAJECTORIES
