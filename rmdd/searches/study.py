"""The trials of a search and their scores, in Optuna's storage, which no kill and no second driver can hurt.

The storage decides: a trial that ended is written to it and never run again. A driver that gets the lease of the folder
of a trial whose driver died goes on with it, by the same number and with the same values.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import optuna
from optuna.trial import TrialState

from rmdd import config
from rmdd.core.files import atomic_path, write_json
from rmdd.core.locks import FolderInUse, Lease, hold_folder
from rmdd.core.storage import is_uri, open_storage
from rmdd.execution.tasks import Values
from rmdd.searches.loading import TrialLoader
from rmdd.searches.samplers import FIRST, begun, pruner_of, sampler_of
from rmdd.searches.space import Space
from rmdd.searches.warm_start import EarlierTrial

INFEASIBLE = "infeasible"
PARTS = ("experts", "phases")
"""Folders of the storage that a trial is made of."""

TRIES = 100
"""Draws in a row that clash with the run file before a search gives up."""

WAIT_SECONDS = 60.0
"""How long a driver waits for another that writes to the same SQLite file."""


def url_of(search: config.Search, folder: Path) -> str:
    """The database of a search, with its variables filled in."""
    if search.storage is None:
        return f"sqlite:///{folder / 'study.db'}"
    url: str = os.path.expandvars(search.storage)
    if "${" in url:
        raise ValueError(f"search.storage {search.storage} names a variable that is not set; export it")
    return url


def open_study(search: config.Search, seed: int, folder: Path) -> optuna.Study:
    """The study of a search, made where it is not there. `seed` is that of the sampler."""
    url = url_of(search, folder)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine = {"connect_args": {"timeout": WAIT_SECONDS}} if url.startswith("sqlite") else {}
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=engine)
    except Exception as error:  # of the database's own driver, whichever it is
        address = search.storage or url
        raise ValueError(f"search.storage {address} cannot be opened: {type(error).__name__}: {error}") from error
    return optuna.create_study(
        study_name=folder.name,
        storage=storage,
        sampler=sampler_of(search, Space(search), seed),
        pruner=pruner_of(search),
        directions=["maximize"] if search.cost == "none" else ["maximize", "minimize"],
        load_if_exists=True,
    )


class Study:
    """The trials of one search as one driver sees them; an `rmdd.execution.trials.TrialSource`. Use it in a `with`."""

    def __init__(
        self,
        loader: TrialLoader,
        folder: Path,
        earlier: Sequence[EarlierTrial],
        say: Callable[[str], None] = lambda text: None,
        show: Callable[[str, Values], None] = lambda name, metrics: None,
    ):
        base = loader.base
        self.loader, self.search, self.folder = loader, base.search, folder
        self.say, self.show = say, show
        self.space = Space(base.search)
        self.stored = open_storage(base.runtime)
        self.trials: dict[str, optuna.Trial] = {}
        self.failures: dict[str, str] = {}
        self._leases: dict[str, tuple[Lease, contextlib.ExitStack]] = {}
        self._alone = contextlib.ExitStack()
        if is_uri(base.runtime.storage) and self.search.storage is None:  # its file is copied to and fro
            self._alone.enter_context(hold_folder(folder, wait=False))
        with self._asking():
            self.study = open_study(self.search, base.seed if self.search.seed is None else self.search.seed, folder)
            if FIRST not in self.study.user_attrs:
                self._learn(earlier)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *error: object) -> None:
        for _, stack in self._leases.values():
            stack.close()
        self._keep()
        self._alone.close()

    @property
    def limit(self) -> int:
        """How many trials there are to be."""
        return self.space.trials

    @property
    def ended(self) -> set[str]:
        """Names of the trials that ended, also in earlier sittings and by other drivers, of those that count."""
        grid = self.search.sampler == "grid"
        ended = (t for t in begun(self.study) if t.state.is_finished())
        return {self._name(t.number) for t in ended if grid or not t.user_attrs.get(INFEASIBLE)}

    # -- what the runner calls ---------------------------------------------------------------------------------------

    def ask(self) -> tuple[str, str] | None:
        """The next trial: one that nobody works on any more, else a new one; None when there are enough."""
        with self._asking():
            for trial in begun(self.study):
                if trial.state == TrialState.RUNNING and self._name(trial.number) not in self.failures:
                    resumed = self._begin(optuna.Trial(self.study, trial._trial_id), resumes=True)
                    if resumed is not None:
                        return resumed
            for _ in range(TRIES):
                trials = begun(self.study)
                counted = [t for t in trials if not t.user_attrs.get(INFEASIBLE)]
                gone = len(trials) if self.search.sampler == "grid" else 0  # a grid has no other draw to offer
                if max(len(counted), gone) >= self.limit:
                    return None
                if not trials:
                    self._begin_with_the_run_file()
                drawn = self._begin(self.study.ask())
                if drawn is not None:
                    return drawn
        last = begun(self.study)[-1].user_attrs["error"]
        raise ValueError(f"{TRIES} draws in a row clash with the run file, the last with: {last}; narrow search.space")

    def tell(self, name: str, score: Values) -> bool:
        trial = self.trials[name]
        if self._leases[name][0].lost:
            self.say(f"{name}: another driver took over while this one stood still")
            self._let_go(name)
            return False
        for what in PARTS:
            if what in score and what not in trial.user_attrs:
                trial.set_user_attr(what, score[what])
        if "step" in score:
            curve = trial.user_attrs.get("curve", [])
            if score["step"] > len(curve):
                curve = [*curve, score["val"]]
                trial.set_user_attr("curve", curve)
                if self.search.cost == "none":
                    trial.report(score["val"], score["step"])
            self.show(name, {"done": score["step"], "val": score["val"]})
            stops = score["step"] == len(curve) and self.search.pruner != "none" and trial.should_prune()
            if stops and not score["done"]:
                self._end(name, state=TrialState.PRUNED)
                return False
        if not score["done"]:
            return True
        if "error" in score:
            trial.set_user_attr("error", score["error"])
            self.say(f"{name}: {score['error']}")
        for what, spent in score.get("cost", {}).items():
            trial.set_user_attr(what, spent)
        if "value" in score:
            cost = [] if self.search.cost == "none" else [score["cost"][self.search.cost]]
            self._end(name, [score["value"], *cost])
        else:
            self._end(name, state=TrialState.FAIL)
        return False

    def fail(self, name: str, why: str) -> None:
        """Leave a trial open, to be gone on with by the next driver."""
        self.failures[name] = why
        self.say(f"{name}: {why}")
        self._let_go(name)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _begin(self, trial: optuna.Trial, resumes: bool = False) -> tuple[str, str] | None:
        """Hold a trial and write down its run; None when another driver holds it, or its values clash."""
        name, folder = self._name(trial.number), self.folder / "trials" / f"{trial.number:03d}"
        if resumes and (name in self.trials or not self._lies_here(trial, folder)):
            return None
        stack = contextlib.ExitStack()
        try:
            lease = stack.enter_context(hold_folder(folder, wait=False))
        except FolderInUse:
            return None
        if resumes and self._state(trial.number) != TrialState.RUNNING:  # its driver ended it meanwhile
            stack.close()
            return None
        trial.set_user_attr("storage", self._where())
        values = self.space.suggest(trial)
        try:
            run = self.loader.checked(values)
        except config.ConfigError as error:
            trial.set_user_attr(INFEASIBLE, True)
            trial.set_user_attr("error", "; ".join(error.mistakes))
            self.study.tell(trial, state=TrialState.FAIL)
            stack.close()
            return None
        with atomic_path(folder / "run.yaml") as temporary:
            temporary.write_text(config.dump(run), encoding="utf-8")
        write_json(folder / "values.json", values)
        if resumes:
            self.say(f"{name}: goes on")
        self.trials[name], self._leases[name] = trial, (lease, stack)
        self.show(name, {"done": 0})
        at = run.runtime.model_copy(update={"storage": self._where()})
        return name, run.model_copy(update={"runtime": at}).model_dump_json()

    def _lies_here(self, trial: optuna.Trial, folder: Path) -> bool:
        """Whether a trial was begun in this storage, which may have moved since, and not in another one of drivers
        that share a database."""
        return trial.user_attrs.get("storage") in (None, self._where()) or (folder / "run.yaml").is_file()

    def _state(self, number: int) -> TrialState:
        return next(t.state for t in begun(self.study) if t.number == number)

    def _end(self, name: str, values: list[float] | None = None, state: TrialState | None = None) -> None:
        self.study.tell(self.trials[name], values, state=state)
        self._let_go(name)
        self._keep()

    def _let_go(self, name: str) -> None:
        self.show(name, {"done": math.inf})
        del self.trials[name]
        self._leases.pop(name)[1].close()

    def _begin_with_the_run_file(self) -> None:
        """Have the first trial take the run file's own values, where the space holds them."""
        own = self.space.active(self.loader.raw) if self.search.base else None
        if own is not None and self.search.sampler != "grid":
            self.study.enqueue_trial(self.space.parameters(own), skip_if_exists=True)

    def _learn(self, earlier: Sequence[EarlierTrial]) -> None:
        """Add the trials of earlier searches to the study."""
        for each in earlier[len(self.study.get_trials(deepcopy=False)) :]:
            values = [each.value, *([] if self.search.cost == "none" else [each.cost[self.search.cost]])]
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=self.space.parameters(each.values),
                    distributions=self.space.distributions(each.values),
                    values=values,
                    user_attrs={"from": each.source},
                )
            )
        self.study.set_user_attr(FIRST, len(earlier))

    def _keep(self) -> None:
        """Have a storage at a URI hold what the search has so far."""
        self.stored.publish(self.folder)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """One driver at a time decides what is tried next."""
        with hold_folder(self.folder / "asking", wait=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield

    def _where(self) -> str:
        storage = self.loader.base.runtime.storage
        return storage if is_uri(storage) else str(self.stored.root)

    @staticmethod
    def _name(number: int) -> str:
        return f"trial {number:03d}"
