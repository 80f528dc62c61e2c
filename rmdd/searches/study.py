"""`Study`: the trials of a search, stored in an Optuna database.

Several drivers (processes that run the search) can share the database. Finished trials never run again. If a driver
dies, a different driver locks the folder of its unfinished trial. Then it resumes the trial with the same values.
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
from rmdd.searches.samplers import FIRST_TRIAL, pruner_of, sampler_of, trials_of
from rmdd.searches.space import Space
from rmdd.searches.warm_start import EarlierTrial

INFEASIBLE = "infeasible"
PARTS = ("experts", "phases")
"""Kinds of storage folders that a trial uses; the trial's row in `trials.csv` lists the names of the folders."""

TRIES = 100
"""Number of consecutive draws of invalid values after which the search gives up."""

WAIT_SECONDS = 60.0
"""Seconds that a driver waits while a different driver writes to the same SQLite file."""


def url_of(search: config.Search, folder: Path) -> str:
    """Return the URL of a search's database, with the values of environment variables filled in."""
    if search.storage is None:
        return f"sqlite:///{folder / 'study.db'}"
    url: str = os.path.expandvars(search.storage)
    if "${" in url:
        raise ValueError(f"search.storage {search.storage} uses an environment variable that is not set; set it")
    return url


def open_study(search: config.Search, seed: int, folder: Path) -> optuna.Study:
    """Open the Optuna study of a search, or create the study; `seed` is the random seed of its sampler."""
    url = url_of(search, folder)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine = {"connect_args": {"timeout": WAIT_SECONDS}} if url.startswith("sqlite") else {}
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=engine)
    except Exception as error:  # every database driver raises its own exceptions
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
    """`TrialSource` of a search in one driver. Use it in a `with` block; its end unlocks the driver's trials."""

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
        self._only_driver = contextlib.ExitStack()
        if is_uri(base.runtime.storage) and self.search.storage is None:  # a second driver would overwrite study.db
            self._only_driver.enter_context(hold_folder(folder, wait=False))
        with self._one_driver_at_a_time():
            self.study = open_study(self.search, base.seed if self.search.seed is None else self.search.seed, folder)
            if FIRST_TRIAL not in self.study.user_attrs:
                self._add_earlier_trials(earlier)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *error: object) -> None:
        for _, stack in self._leases.values():
            stack.close()
        self._publish()
        self._only_driver.close()

    @property
    def limit(self) -> int:
        """Number of trials after which the search ends."""
        return self.space.trials

    @property
    def ended(self) -> set[str]:
        """Names of all finished trials, including trials that earlier calls or other drivers ran.

        Trials whose values make an invalid run are included only for a grid; other samplers replace such trials.
        """
        grid = self.search.sampler == "grid"
        ended = (t for t in trials_of(self.study) if t.state.is_finished())
        return {self._name(t.number) for t in ended if grid or not t.user_attrs.get(INFEASIBLE)}

    # -- methods of TrialSource --------------------------------------------------------------------------------------

    def ask(self) -> tuple[str, str] | None:
        """Return the name and the run (as JSON) of the next trial. If the search has enough trials, return None.

        Unfinished trials of drivers that died come before new trials.
        """
        with self._one_driver_at_a_time():
            for trial in trials_of(self.study):
                if trial.state == TrialState.RUNNING and self._name(trial.number) not in self.failures:
                    resumed = self._begin(optuna.Trial(self.study, trial._trial_id), resumes=True)
                    if resumed is not None:
                        return resumed
            for _ in range(TRIES):
                trials = trials_of(self.study)
                counted = [t for t in trials if not t.user_attrs.get(INFEASIBLE)]
                tried = len(trials) if self.search.sampler == "grid" else 0  # a grid cannot replace invalid trials
                if max(len(counted), tried) >= self.limit:
                    return None
                if not trials:
                    self._enqueue_run_file_values()
                drawn = self._begin(self.study.ask())
                if drawn is not None:
                    return drawn
        last = trials_of(self.study)[-1].user_attrs["error"]
        raise ValueError(
            f"{TRIES} draws in a row clash with the run file, the last one with: {last}; narrow search.space"
        )

    def tell(self, name: str, score: Values) -> bool:
        """Store the results of a trial's rung (step) in the database; return whether the trial should continue."""
        trial = self.trials[name]
        if self._leases[name][0].lost:
            self.say(f"{name}: another driver took over this trial, because this driver did not respond")
            self._release(name)
            return False
        for part in PARTS:
            if part in score and part not in trial.user_attrs:
                trial.set_user_attr(part, score[part])
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
        for kind, cost in score.get("cost", {}).items():
            trial.set_user_attr(kind, cost)
        if "value" in score:
            second = [] if self.search.cost == "none" else [score["cost"][self.search.cost]]
            self._end(name, [score["value"], *second])
        else:
            self._end(name, state=TrialState.FAIL)
        return False

    def fail(self, name: str, why: str) -> None:
        """Unlock a failed trial and leave it unfinished, so that the next driver resumes it."""
        self.failures[name] = why
        self.say(f"{name}: {why}")
        self._release(name)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _begin(self, trial: optuna.Trial, resumes: bool = False) -> tuple[str, str] | None:
        """Lock a trial, write its run file, and return the trial's name and run (as JSON).

        Returns None if a different driver has locked the trial. Also returns None if the trial's run is invalid.
        """
        name, folder = self._name(trial.number), self.folder / "trials" / f"{trial.number:03d}"
        if resumes and (name in self.trials or not self._is_in_this_storage(trial, folder)):
            return None
        stack = contextlib.ExitStack()
        try:
            lease = stack.enter_context(hold_folder(folder, wait=False))
        except FolderInUse:
            return None
        if resumes and self._state(trial.number) != TrialState.RUNNING:  # a different driver has finished the trial
            stack.close()
            return None
        trial.set_user_attr("storage", self._storage_address())
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
            self.say(f"{name}: resumed")
        self.trials[name], self._leases[name] = trial, (lease, stack)
        self.show(name, {"done": 0})
        runtime = run.runtime.model_copy(update={"storage": self._storage_address()})
        return name, run.model_copy(update={"runtime": runtime}).model_dump_json()

    def _is_in_this_storage(self, trial: optuna.Trial, folder: Path) -> bool:
        """Return whether a trial was started in this storage. A moved storage folder is still the same storage.

        Drivers that share a database can write to different storages.
        """
        return trial.user_attrs.get("storage") in (None, self._storage_address()) or (folder / "run.yaml").is_file()

    def _state(self, number: int) -> TrialState:
        return next(t.state for t in trials_of(self.study) if t.number == number)

    def _end(self, name: str, values: list[float] | None = None, state: TrialState | None = None) -> None:
        self.study.tell(self.trials[name], values, state=state)
        self._release(name)
        self._publish()

    def _release(self, name: str) -> None:
        self.show(name, {"done": math.inf})
        del self.trials[name]
        self._leases.pop(name)[1].close()

    def _enqueue_run_file_values(self) -> None:
        """If the values of the run file lie inside the search space, try them in the first trial."""
        values = self.space.active(self.loader.raw) if self.search.base else None
        if values is not None and self.search.sampler != "grid":
            self.study.enqueue_trial(self.space.parameters(values), skip_if_exists=True)

    def _add_earlier_trials(self, earlier: Sequence[EarlierTrial]) -> None:
        """Copy the trials of earlier searches into the study, so that the sampler can learn from their scores."""
        for trial in earlier[len(self.study.get_trials(deepcopy=False)) :]:
            values = [trial.value, *([] if self.search.cost == "none" else [trial.cost[self.search.cost]])]
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=self.space.parameters(trial.values),
                    distributions=self.space.distributions(trial.values),
                    values=values,
                    user_attrs={"from": trial.source},
                )
            )
        self.study.set_user_attr(FIRST_TRIAL, len(earlier))

    def _publish(self) -> None:
        """Upload the folder of the search, if the storage is at a URI."""
        self.stored.publish(self.folder)

    @contextlib.contextmanager
    def _one_driver_at_a_time(self) -> Iterator[None]:
        """Hold a lock in the block, so that two drivers never choose the same next trial."""
        with hold_folder(self.folder / "asking", wait=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield

    def _storage_address(self) -> str:
        storage = self.loader.base.runtime.storage
        return storage if is_uri(storage) else str(self.stored.root)

    @staticmethod
    def _name(number: int) -> str:
        return f"trial {number:03d}"
