"""`rmdd.run` and `Pipeline`: one run from top to bottom, from ingest and experts to evaluation, export and report.

Each step runs once and passes its value to the next; `rmdd.runs.steps` implements the steps. The folder of a result is
named by a hash of its settings, so two runs that differ only in their evaluation share experts and phases.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rmdd import config
from rmdd.artefact.assemble import assemble
from rmdd.artefact.card import export
from rmdd.core.files import atomic_path, read_json
from rmdd.core.layout import require_layout
from rmdd.core.progress import Progress
from rmdd.core.storage import absolute_runtime, run_folder
from rmdd.core.version import VERSION
from rmdd.data.shards import Dataset
from rmdd.distill.trajectory.planning import PLAN, with_phases
from rmdd.execution.backend import Backend, hold_folders, open_backend
from rmdd.experts.store import Store
from rmdd.models.prepared import PreparedSplit, SplitSource
from rmdd.report.page import write_report
from rmdd.report.sheets import draw_plan
from rmdd.runs.items import TaskItem
from rmdd.runs.steps import Steps

T = TypeVar("T")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Result:
    """The results of a finished run."""

    set: Path
    """Folder of the distilled set."""
    report: Path
    """The HTML report."""
    evaluation: dict[str, Any]
    """Content of `evaluation.json`."""
    seconds: dict[str, float]
    """Wall-clock seconds by step."""


def once(step: Callable[[Any], T]) -> Callable[[Any], T]:
    """Decorate a method to run at its first call and return the same value at every later call."""

    @functools.wraps(step)
    def value(self: Any) -> T:
        if step.__name__ not in self.values:
            self.values[step.__name__] = step(self)
        result: T = self.values[step.__name__]
        return result

    return value


class Pipeline:
    """The steps of one run. Calling a step first runs the steps before it, each at most once, and returns its value.

    `splits` lists the splits to embed; searches leave out test. `open_pipeline` opens a pipeline with its backend.
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
        run = with_phases(run, []) if run.distill.plan.plans else run  # the phases are in the plan of the run folder
        self.steps = Steps(run, backend, progress, folder or run_folder(run))
        self.splits, self.values = splits, dict[str, Any]()
        self.storage, self.folder = self.steps.storage, self.steps.folder
        require_layout(self.storage)
        self.storage.fetch(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / "run.yaml") as temporary:
            temporary.write_text(config.dump(run), encoding="utf-8")

    # -- the steps -----------------------------------------------------------------------------------------------

    @once
    def ingest(self) -> Dataset:
        """Return the ingested dataset."""
        return self.steps.ingest()

    @once
    def item(self) -> TaskItem:
        """Return the input of the run's tasks: the run and its paths."""
        return self.steps.locate(self.ingest())

    @once
    def embed(self) -> SplitSource:
        """Embed the splits and return their source."""
        return self.steps.embed(self.item(), self.ingest(), self.splits)

    @once
    def experts(self) -> Store:
        """Train the missing experts and return their store."""
        return self.steps.experts(self.item(), self.ingest(), self.embed())

    @once
    def check_budget(self) -> None:
        """Raise `ValueError` or warn (see `distill.budget_check`) if the phases cost more than the budget."""
        self.steps.check_budget(self.steps.run)

    @once
    def planned(self) -> TaskItem:
        """Plan the phases if the run lists none; return the run with its phases, and its paths."""
        self.check_budget()
        self.experts()
        planned = self.steps.plan(self.item(), self.ingest())
        if planned is not self.item():
            _draw(self.folder / PLAN, self.folder / "plan.svg")
        return planned

    @once
    def begin_phases(self) -> TaskItem:
        """Write the initial synthetic pairs of the phases; return the run with its phases, and its paths."""
        self.steps.begin_phases(self.planned(), self.embed())
        return self.planned()

    @once
    def distill(self) -> list[Path]:
        """Distil the phases and return their folders."""
        return self.steps.distill(self.begin_phases())

    @once
    def evaluate(self) -> dict[str, Any]:
        """Choose on val, train the final students and return the content of `evaluation.json`."""
        self.distill()
        probes = self.steps.probes(self.ingest())
        evaluation = self.steps.evaluate(self.planned(), self.embed(), self.experts(), probes)
        self.steps.cost(self.planned())
        return evaluation

    @once
    def health(self) -> dict[str, Any]:
        """Measure and return the embedding health of every snapshot."""
        self.distill()
        return self.steps.health(self.planned())

    @once
    def export(self) -> Path:
        """Export the distilled set and return its folder."""
        evaluation, item = self.evaluate(), self.planned()
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
        """Write the HTML report and return its path."""
        folder, health, item = self.export(), self.health(), self.planned()
        with self.steps.timed("report"):
            page, evaluation = self.folder / "report.html", self.evaluate()
            write_report(page, item.run, item.paths, folder, evaluation, self.all_seconds(), health)
        return page

    def all(self) -> Result:
        """Run all steps."""
        page = self.report()
        return Result(self.export(), page, self.evaluate(), self.all_seconds())

    # -- for searches, comparisons and analyses --------------------------------------------------------------------

    @property
    def run(self) -> config.Run:
        """The run; once the plan exists, with the planned phases."""
        planned: TaskItem | None = self.values.get("planned")
        return planned.run if planned else self.steps.run

    @property
    def backend(self) -> Backend:
        return self.steps.backend

    @property
    def progress(self) -> Progress:
        return self.steps.progress

    def use_backend(self, backend: Backend, progress: Progress) -> None:
        """Run the remaining steps with another backend and progress display."""
        self.steps.backend, self.steps.progress = backend, progress

    def prepared_split(self, split: str) -> PreparedSplit:
        """Return a split with its embeddings; the cache must hold them."""
        return self.item().source.open(split)

    def embedded(self, split: str) -> PreparedSplit:
        """Embed the captions of a split if the cache lacks them, and return the split."""
        self.steps.embed_split(self.item(), self.ingest(), split)
        return self.prepared_split(split)

    def plan(self) -> config.Run:
        """Return the run with its phases."""
        return self.planned().run

    def all_seconds(self) -> dict[str, float]:
        """Return the wall-clock seconds of each step, summed over all starts of this run."""
        return self.steps.all_seconds()


def _draw(plan: Path, drawing: Path) -> None:
    """Draw the plan as SVG if the drawing is missing or older than the plan."""
    if not drawing.is_file() or drawing.stat().st_mtime < plan.stat().st_mtime:
        draw_plan(read_json(plan), drawing)


@contextlib.contextmanager
def open_pipeline(run: config.Run, progress: Progress | None = None) -> Iterator[Pipeline]:
    """Lock the run folder, open the backend that `runtime` describes, and yield the run's pipeline."""
    progress = progress or Progress()
    folder = run_folder(run)
    with hold_folders(run.runtime, folder), open_backend(run.runtime, folder / "events.jsonl", progress) as backend:
        yield Pipeline(run, backend, progress)


def run(run: config.Run, progress: Progress | None = None) -> Result:
    """Execute all steps of a run and return its results. After an interruption, call it again to resume."""
    with open_pipeline(run, progress) as pipeline:
        return pipeline.all()
