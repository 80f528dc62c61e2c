"""`rmdd search`: hyper-parameter search over fields of a run file, for the best R@mean on val.

The dataset is ingested and the experts are trained once for all trials. Then trials distil from snapshot to snapshot.
They run in parallel with Ray Tune, or one at a time. `rmdd.searches.study` chooses values and stops poor trials.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.config.hashing import hashed
from rmdd.core.files import read_json, write_json
from rmdd.core.layout import check_layout, locate_file
from rmdd.core.locks import hold_folder
from rmdd.core.progress import Progress
from rmdd.core.storage import open_storage, root_of
from rmdd.execution.backend import hold_folders, open_backend
from rmdd.execution.tasks import Values
from rmdd.models.text import text_width
from rmdd.pipeline import Pipeline
from rmdd.runs.cost import text_features
from rmdd.searches.loading import TrialLoader, WidthOf, shares_experts
from rmdd.searches.space import Space
from rmdd.searches.study import Study
from rmdd.searches.table import TrialTable, write_table
from rmdd.searches.trial import SPLITS, open_trial
from rmdd.searches.warm_start import COMPARED_SECTIONS, earlier_trials


@dataclass(frozen=True, repr=False)
class SearchResult:
    """Result of a search: its folder, a table with a row per trial, and the errors of failed trials."""

    folder: Path
    table: TrialTable
    failures: dict[str, str]
    """Error message of each trial that failed in this call, by the trial's name; the next call resumes these trials."""

    def __repr__(self) -> str:
        return f"SearchResult({self.folder}: {self.table}, {len(self.failures)} failures)"


def search_folder(base: config.Run) -> Path:
    """Return the folder of a search; its name ends in a hash of the base run, the seed and the search settings."""
    rule = hashed(base.search, "search")
    value = config.hash_value({"run": base.hash_of(), "seed": base.seed, "search": rule})[:8]
    return root_of(base.runtime) / "searches" / f"{base.name}-{value}"


def check(base: config.Run, width_of: WidthOf = text_width) -> None:
    """Raise `ConfigError` with all mistakes in `search.space`; `width_of(tower)` is a text tower's embedding width."""
    mistakes = _plan_mistakes(base.distill.plan, base.search.space)
    mistakes = mistakes or Space(base.search).mistakes(TrialLoader(base, width_of).mistakes)
    if mistakes:
        raise config.ConfigError(mistakes, base.name)


def facts_of(base: config.Run) -> dict[str, Any] | None:
    """Return what `rmdd check` prints about a search (fields, trials, experts); None if `search.space` is empty.

    Raises `ConfigError` if `search.space` has mistakes.
    """
    if not base.search.space:
        return None
    check(base, lambda tower: text_features(tower)[0])
    return {
        "fields": list(base.search.space),
        "trials": Space(base.search).trials,
        "experts": "shared" if shares_experts(base.search.space) else "of each trial",
    }


def _plan_mistakes(plan: config.Plan, fields: Collection[str]) -> list[str]:
    """Return a message per searched field without effect: fields of phases if these are planned, else of the plan."""
    if plan.plans:
        return [
            f"search.space.{field}: distill.phases is {plan.kind}, so phases have no fixed values to vary; vary "
            "distill.plan.reach, max_phases or endpoints instead, or list the phases in distill.phases"
            for field in fields
            if field.startswith("distill.phases.")
        ]
    if "distill.phases" in fields:
        return []
    unplanned = (
        "the phases are listed, so the plan has no effect and all trials would be equal; set distill.phases: auto"
    )
    return [f"search.space.{field}: {unplanned}" for field in fields if field.startswith("distill.plan.")]


def base_run_in(folder: Path | str) -> config.Run | None:
    """Return the base run of the search in `folder` (path or URI). If the folder holds no search, return None."""
    storage, file = locate_file(str(folder), "search.json", depth=2)
    if not file.is_file():
        return None
    run = read_json(file)["run"]
    return config.load({**run, "runtime": {**run["runtime"], "storage": storage}})


def search(source: config.Source, overrides: Iterable[str] = (), progress: Progress | None = None) -> SearchResult:
    """Run the hyper-parameter search that the section `search` of a run file describes.

    >>> rmdd.search("demo", ["search.space={distill.lr_image: {loguniform: [10, 10000]}}"])  # doctest: +SKIP

    `rmdd.load_config` explains `source` and `overrides`. A second call resumes the search. Several processes may run
    the same search at the same time; each trial is run by one of them.
    """
    base = config.load(source, overrides)
    check(base)
    return run_search(base, progress)


def run_search(base: config.Run, progress: Progress | None = None) -> SearchResult:
    """Run the trials that are not finished; write the table, the plots and a run file with the best values."""
    progress = progress or Progress()
    folder, storage = search_folder(base), open_storage(base.runtime)
    check_layout(storage)
    storage.fetch(folder)
    earlier = earlier_trials(base.search, {section: base.hash_of(section) for section in COMPARED_SECTIONS}, base.name)
    trials = TrialLoader(base)
    with hold_folders(base.runtime), open_backend(base.runtime, folder / "events.jsonl", progress) as backend:
        write_json(folder / "search.json", {"schema_version": 1, "run": base.plain()})
        with hold_folder(folder / "shared", wait=True):
            pipeline = Pipeline(base, backend, progress, splits=SPLITS)
            (pipeline.experts if trials.shared else pipeline.ingest)()
        with progress.stage("trials", {}) as stage:
            snapshots = base.distill.snapshots

            def show(name: str, metrics: Values) -> None:
                stage.add({name: snapshots})
                stage.expect(study.limit, snapshots, len(study.ended - stage.items.keys()))
                stage(name, {**metrics, "done": min(metrics["done"], snapshots)})

            with Study(trials, folder, earlier, progress.say, show) as study:
                try:
                    backend.run_trials(study, open_trial, base.search.concurrency)
                finally:
                    table = write_table(trials, folder, study.study)
        return SearchResult(folder, table, study.failures)
