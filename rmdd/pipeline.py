"""`rmdd.run` and `Pipeline` execute all steps of one run, from ingest and experts to evaluation, export and report.

`Pipeline` calls the steps in the right order; `rmdd.runs.steps` implements them. The name of a result's folder contains
a hash of the settings that the result depends on, so runs that differ only in evaluation share experts and phases.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rmdd import config
from rmdd.artefact.assemble import assemble
from rmdd.artefact.card import export
from rmdd.artefact.distilled import DistilledSet
from rmdd.core.files import atomic_path, read_json
from rmdd.core.layout import require_layout
from rmdd.core.progress import Progress
from rmdd.core.storage import absolute_runtime, run_folder
from rmdd.core.version import VERSION
from rmdd.data.shards import Dataset
from rmdd.distill.trajectory.planning import PLAN, with_plan
from rmdd.execution.backend import Backend, hold_folders, open_backend
from rmdd.experts.store import Store
from rmdd.models.prepared import PreparedSplit, SplitSource
from rmdd.report.page import headline, write_report
from rmdd.report.rows import score_rows
from rmdd.report.sheets import draw_plan
from rmdd.runs.gate import is_gated
from rmdd.runs.items import TaskItem
from rmdd.runs.steps import Steps

T = TypeVar("T")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, repr=False)
class Result:
    """Paths and scores of a finished run."""

    set: Path
    """Folder of the distilled set."""
    report: Path
    """Path of the HTML report."""
    headline: str
    """One sentence that compares the set with random pairs and with all training pairs."""
    evaluation: dict[str, Any]
    """Scores and chosen settings, as stored in `evaluation.json`."""
    seconds: dict[str, float]
    """Wall-clock seconds of each step, by the name of the step, summed over all starts of the run."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.report.parent

    @property
    def table(self) -> list[dict[str, Any]]:
        """Rows of the table that `rmdd run` prints: `trained on`, `protocol`, and mean and spread of each recall."""
        return score_rows(self.evaluation)

    def __repr__(self) -> str:
        scores = [f"{r['trained on']} {r['test R@mean']:.1f}" for r in self.table if r["protocol"] == "test_last"]
        return f"Result({self.folder}: test R@mean {', '.join(scores)})"


def once(step: Callable[[Any], T]) -> Callable[[Any], T]:
    """Decorator: the Python method `step` runs at its first call only; later calls return the same value."""

    @functools.wraps(step)
    def value(self: Any) -> T:
        if step.__name__ not in self.values:
            self.values[step.__name__] = step(self)
        result: T = self.values[step.__name__]
        return result

    return value


class Pipeline:
    """The steps of one run, as Python methods. A step first runs the steps that it needs; each step runs at most once.

    `splits` names the splits whose captions are embedded; searches skip `test`. `open_pipeline` creates a pipeline.
    """

    def __init__(
        self,
        run: config.Run,
        backend: Backend,
        progress: Progress,
        folder: Path | None = None,
        splits: Sequence[str] = SPLITS,
    ):
        run = run.model_copy(update={"runtime": absolute_runtime(run.runtime)})
        if run.distill.plan.plans:
            run = with_plan(run, {"phases": []})  # planned phases are read from the plan in the run folder
        self.steps = Steps(run, backend, progress, folder or run_folder(run))
        self.splits, self.values = splits, dict[str, Any]()
        self.storage, self.folder = self.steps.storage, self.steps.folder
        require_layout(self.storage)
        self.storage.fetch(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "data.json").is_file():
            self._write_run()

    def _write_run(self) -> None:
        """Write `run.yaml`. A run that was ingested before changes this file only after its ingest has succeeded."""
        with atomic_path(self.folder / "run.yaml") as temporary:
            temporary.write_text(config.dump(self.steps.run), encoding="utf-8")

    # -- the steps -----------------------------------------------------------------------------------------------

    @once
    def ingest(self) -> Dataset:
        """Ingest the raw data, if that is not done yet, and return the dataset."""
        dataset = self.steps.ingest()
        self._write_run()
        return dataset

    @once
    def item(self) -> TaskItem:
        """Return the argument that every task of the run gets: the run, and the paths of the files that tasks use."""
        return self.steps.locate(self.ingest())

    @once
    def embed(self) -> SplitSource:
        """Embed the captions of `splits`; return the object that opens these splits."""
        return self.steps.embed(self.item(), self.ingest(), self.splits)

    @once
    def experts(self) -> Store:
        """Train the experts that are not trained yet; return the store of all experts."""
        return self.steps.experts(self.item(), self.ingest(), self.embed())

    @once
    def check_budget(self) -> None:
        """If the phases cost more than `distill.budget`, raise `ValueError` or warn (see `distill.budget_check`)."""
        self.steps.check_budget(self.steps.run)

    @once
    def planned(self) -> TaskItem:
        """Plan the phases unless the run file lists them; return the tasks' argument (see `item`) with these phases."""
        self.check_budget()
        self.experts()
        planned = self.steps.plan(self.item(), self.ingest())
        if planned is not self.item():
            _draw(self.folder / PLAN, self.folder / "plan.svg")
        return planned

    @once
    def begin_phases(self) -> TaskItem:
        """Write the synthetic pairs with which each phase starts; return the same as `planned`."""
        self.steps.begin_phases(self.planned(), self.embed())
        return self.planned()

    @once
    def distilled(self) -> TaskItem:
        """Distil all unfinished phases; return the tasks' argument (see `item`) with the phases of the set.

        These are the same as in `planned`, except that phases of a planned chain which do not help are dropped.
        """
        item = self.planned()
        if is_gated(item.run.distill):
            item = self.steps.distill_gated(item, self.ingest(), self.embed())
            _draw(self.folder / PLAN, self.folder / "plan.svg")
            self.steps.begin_phases(item, self.embed())
        else:
            self.begin_phases()
        self.steps.distill(item)
        return item

    @once
    def distill(self) -> list[Path]:
        """Distil all unfinished phases; return the folders of all phases."""
        item = self.distilled()
        return [item.paths.phase(p) for p in range(len(item.run.distill.phases))]

    @once
    def evaluate(self) -> dict[str, Any]:
        """Choose the snapshot on val, train students on it, score them on test; return `evaluation.json` as a dict."""
        item = self.distilled()
        probes = self.steps.probes(self.ingest())
        evaluation = self.steps.evaluate(item, self.embed(), self.experts(), probes)
        self.steps.cost(item)
        return evaluation

    @once
    def health(self) -> dict[str, Any]:
        """Return, for every snapshot, measures of how far the embeddings of its pairs have collapsed."""
        return self.steps.health(self.distilled())

    @once
    def export(self) -> Path:
        """Write the chosen snapshot as the distilled set of the run; return the folder of the set."""
        evaluation, item = self.evaluate(), self.distilled()
        with self.steps.timed("export"):
            distilled = assemble(
                item.run,
                self.embed().open("train"),
                [item.paths.set(p, i) for p, i in enumerate(evaluation["iterations"])],
                experts=item.paths.store.name,
                iterations=evaluation["iterations"],
                metrics=evaluation["table"],
                version=VERSION,
            )
            return export(distilled, self.folder / "set", overwrite=True)

    @once
    def report(self) -> Path:
        """Write the HTML report of the run; return the path of the page."""
        folder, health, item = self.export(), self.health(), self.distilled()
        with self.steps.timed("report"):
            page, evaluation = self.folder / "report.html", self.evaluate()
            test = self.embed().open("test").split
            write_report(page, item.run, item.paths, folder, evaluation, self.all_seconds(), health, test.some_images)
        return page

    def all(self) -> Result:
        """Run all steps; return the results of the run."""
        page, folder, evaluation = self.report(), self.export(), self.evaluate()
        return Result(folder, page, headline(DistilledSet.load(folder), evaluation), evaluation, self.all_seconds())

    # -- for searches, comparisons and analyses --------------------------------------------------------------------

    @property
    def run(self) -> config.Run:
        """The run of this pipeline. If its phases are planned, it contains them only after the step `planned`."""
        item: TaskItem | None = self.values.get("distilled") or self.values.get("planned")
        return item.run if item else self.steps.run

    @property
    def backend(self) -> Backend:
        return self.steps.backend

    @property
    def progress(self) -> Progress:
        return self.steps.progress

    def use_backend(self, backend: Backend, progress: Progress) -> None:
        """Use this backend and this progress display for all steps that have not run yet."""
        self.steps.backend, self.steps.progress = backend, progress

    def prepared_split(self, split: str) -> PreparedSplit:
        """Return a split (train, val or test) with the embeddings of its captions; the cache must contain them."""
        return self.item().source.open(split)

    def embedded(self, split: str) -> PreparedSplit:
        """Embed the captions of a split (train, val or test) unless they are in the cache; return the split."""
        self.steps.embed_split(self.item(), self.ingest(), split)
        return self.prepared_split(split)

    def plan(self) -> config.Run:
        """Plan the phases if the run file does not list them; return the run with its phases."""
        return self.planned().run

    def all_seconds(self) -> dict[str, float]:
        """Return the wall-clock seconds of each step, summed over all starts of the run."""
        return self.steps.all_seconds()


def _draw(plan: Path, drawing: Path) -> None:
    """Draw the plan of the phases as an SVG file, unless the file `drawing` is newer than the file `plan`."""
    if not drawing.is_file() or drawing.stat().st_mtime < plan.stat().st_mtime:
        draw_plan(read_json(plan), drawing)


@contextlib.contextmanager
def open_pipeline(run: config.Run, progress: Progress | None = None) -> Iterator[Pipeline]:
    """Lock the folder of a run, open the backend that `run.runtime` describes, and yield the pipeline of the run."""
    progress = progress or Progress()
    folder = run_folder(run)
    with hold_folders(run.runtime, folder), open_backend(run.runtime, folder / "events.jsonl", progress) as backend:
        yield Pipeline(run, backend, progress)


def run(source: config.Source, overrides: Iterable[str] = (), progress: Progress | None = None) -> Result:
    """Execute all steps of a run and return its results. To resume an interrupted run, pass it again.

    >>> rmdd.run("demo", ["distill.seed=1"])  # doctest: +SKIP

    `rmdd.load_config` explains `source` and `overrides`.
    """
    with open_pipeline(config.load(source, overrides), progress) as pipeline:
        return pipeline.all()
