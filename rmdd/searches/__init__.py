"""`rmdd search`: trials of one run with other values, compared by val R@mean.

What the trials share, data and experts, is made first by all workers. Then each trial goes from snapshot to
snapshot, side by side through Ray Tune or in turn, and `rmdd.searches.study` decides what is tried and what goes on.
"""

from collections.abc import Collection, Iterable, Mapping
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
from rmdd.searches.warm_start import COMPARED, earlier_trials


@dataclass(frozen=True)
class Searched:
    """What a search leaves: its folder, a row per trial, and what could not be done this time."""

    folder: Path
    table: TrialTable
    failures: dict[str, str]


def search_folder(base: config.Run) -> Path:
    """Where a search keeps its trials: named by what decides them."""
    rule = hashed(base.search, "search")
    value = config.hash_value({"run": base.hash_of(), "seed": base.seed, "search": rule})[:8]
    return root_of(base.runtime) / "searches" / f"{base.name}-{value}"


def check(base: config.Run, width_of: WidthOf = text_width) -> None:
    """Raise `ConfigError` with all that is wrong with the space; `width_of` gives the length of a text embedding."""
    mistakes = _planned(base.distill.plan, base.search.space)
    mistakes = mistakes or Space(base.search).mistakes(TrialLoader(base, width_of).mistakes)
    if mistakes:
        raise config.ConfigError(mistakes, base.name)


def facts_of(base: config.Run) -> dict[str, Any] | None:
    """What a search would try; None without a space. Raises `ConfigError` where the run file cannot take it."""
    if not base.search.space:
        return None
    check(base, lambda tower: text_features(tower)[0])
    return {
        "fields": list(base.search.space),
        "trials": Space(base.search).trials,
        "experts": "shared" if shares_experts(base.search.space) else "of each trial",
    }


def _planned(plan: config.Plan, fields: Collection[str]) -> list[str]:
    """Fields of phases that plan themselves, and of a plan that nobody follows."""
    if plan.plans:
        return [
            f"search.space.{field}: distill.phases is {plan.kind}, so there is no such number to try; try "
            "distill.plan.reach, max_phases or endpoints instead, or list the phases in distill.phases"
            for field in fields
            if field.startswith("distill.phases.")
        ]
    unplanned = "the phases are listed, so no plan is made and every trial would be the same; set distill.phases: auto"
    alone = "distill.phases" not in fields
    return [f"search.space.{field}: {unplanned}" for field in fields if alone and field.startswith("distill.plan.")]


def begun_in(folder: Path | str) -> config.Run | None:
    """The run of a search that was begun in a folder or at a URI, also in a moved storage; None without one."""
    storage, file = locate_file(str(folder), "search.json", depth=2)
    if not file.is_file():
        return None
    run = read_json(file)["run"]
    return config.load({**run, "runtime": {**run["runtime"], "storage": storage}})


def search(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), progress: Progress | None = None
) -> Searched:
    """Search as the `search` section of a run file says; see `config.load` for `source` and `overrides`.

    >>> search("demo", ["search.space={distill.lr_image: {loguniform: [10, 10000]}}"])  # doctest: +SKIP

    Calling it again goes on where it stopped, also beside another driver at the same time.
    """
    base = config.load(source, overrides)
    check(base)
    return run_search(base, progress)


def run_search(base: config.Run, progress: Progress | None = None) -> Searched:
    """Make the trials that are missing, and write the table, the plots and the best run file."""
    progress = progress or Progress()
    folder, storage = search_folder(base), open_storage(base.runtime)
    check_layout(storage)
    storage.fetch(folder)
    earlier = earlier_trials(base.search, {section: base.hash_of(section) for section in COMPARED}, base.name)
    trials = TrialLoader(base)
    with hold_folders(base.runtime), open_backend(base.runtime, folder / "events.jsonl", progress) as backend:
        write_json(folder / "search.json", {"schema_version": 1, "run": base.model_dump(mode="json")})
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
        return Searched(folder, table, study.failures)
