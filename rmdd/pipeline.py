"""One run, read top to bottom: ingest, embed, experts, plan, phases, students, health, export, report.

Each step is done once and hands its value to the next; what a step does is in `rmdd.runs.steps`. Results lie under the
hash of what shaped them: two runs that differ in evaluation alone share their experts and phases.
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
    """What a finished run leaves: the distilled set, the page, and the numbers."""

    set: Path
    report: Path
    evaluation: dict[str, Any]
    seconds: dict[str, float]


def once(step: Callable[[Any], T]) -> Callable[[Any], T]:
    """A method that is executed at its first call, and returns the same value at every later one."""

    @functools.wraps(step)
    def value(self: Any) -> T:
        if step.__name__ not in self.values:
            self.values[step.__name__] = step(self)
        result: T = self.values[step.__name__]
        return result

    return value


class Pipeline:
    """The steps of one run in their order. A call runs the steps up to it, each once, and returns its value.

    `splits` are embedded; a run that never reads test leaves it out. Use `open_pipeline`, which brings a backend.
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
        run = with_phases(run, []) if run.distill.plan.plans else run  # the plan in the run folder has its phases
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
        """The dataset: pairs in shards."""
        return self.steps.ingest()

    @once
    def item(self) -> TaskItem:
        """The run and the paths of its parts, which every task is given."""
        return self.steps.locate(self.ingest())

    @once
    def embed(self) -> SplitSource:
        """The splits with their embeddings."""
        return self.steps.embed(self.item(), self.ingest(), self.splits)

    @once
    def experts(self) -> Store:
        """The trained experts."""
        return self.steps.experts(self.item(), self.ingest(), self.embed())

    @once
    def check_budget(self) -> None:
        """Whether the phases are within the budget; raises `ValueError` or warns, as configured."""
        self.steps.check_budget(self.steps.run)

    @once
    def planned(self) -> TaskItem:
        """The run with its phases, and the paths of its parts."""
        self.check_budget()
        self.experts()
        planned = self.steps.plan(self.item(), self.ingest())
        if planned is not self.item():
            _draw(self.folder / PLAN, self.folder / "plan.svg")
        return planned

    @once
    def begin_phases(self) -> TaskItem:
        """`planned`, with what its phases start from."""
        self.steps.begin_phases(self.planned(), self.embed())
        return self.planned()

    @once
    def distill(self) -> list[Path]:
        """The folders of the distilled phases."""
        return self.steps.distill(self.begin_phases())

    @once
    def evaluate(self) -> dict[str, Any]:
        """What val chose and the scores on test."""
        self.distill()
        probes = self.steps.probes(self.ingest())
        evaluation = self.steps.evaluate(self.planned(), self.embed(), self.experts(), probes)
        self.steps.cost(self.planned())
        return evaluation

    @once
    def health(self) -> dict[str, Any]:
        """The health of embeddings over the distillation."""
        self.distill()
        return self.steps.health(self.planned())

    @once
    def export(self) -> Path:
        """The folder of the distilled set."""
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
        """The page that shows the run."""
        folder, health, item = self.export(), self.health(), self.planned()
        with self.steps.timed("report"):
            page, evaluation = self.folder / "report.html", self.evaluate()
            write_report(page, item.run, item.paths, folder, evaluation, self.all_seconds(), health)
        return page

    def all(self) -> Result:
        """The whole line."""
        page = self.report()
        return Result(self.export(), page, self.evaluate(), self.all_seconds())

    # -- for what is built on runs -------------------------------------------------------------------------------

    @property
    def run(self) -> config.Run:
        """The run, with the phases of its plan once that is made."""
        planned: TaskItem | None = self.values.get("planned")
        return planned.run if planned else self.steps.run

    @property
    def backend(self) -> Backend:
        return self.steps.backend

    @property
    def progress(self) -> Progress:
        return self.steps.progress

    def work_with(self, backend: Backend, progress: Progress) -> None:
        """Do the steps that are left over another backend."""
        self.steps.backend, self.steps.progress = backend, progress

    def prepared_split(self, split: str) -> PreparedSplit:
        """A split with its embeddings."""
        return self.item().source.open(split)

    def embedded(self, split: str) -> PreparedSplit:
        """`prepared_split`, its captions embedded by the backend where they are not yet."""
        self.steps.embed_split(self.item(), self.ingest(), split)
        return self.prepared_split(split)

    def plan(self) -> config.Run:
        """The run with its phases."""
        return self.planned().run

    def all_seconds(self) -> dict[str, float]:
        """Wall seconds per step, added up over all sittings of this run."""
        return self.steps.all_seconds()


def _draw(plan: Path, drawing: Path) -> None:
    """Draw a plan that is newer than its drawing."""
    if not drawing.is_file() or drawing.stat().st_mtime < plan.stat().st_mtime:
        draw_plan(read_json(plan), drawing)


@contextlib.contextmanager
def open_pipeline(run: config.Run, progress: Progress | None = None) -> Iterator[Pipeline]:
    """A pipeline with the backend that `runtime` describes."""
    progress = progress or Progress()
    folder = run_folder(run)
    with hold_folders(run.runtime, folder), open_backend(run.runtime, folder / "events.jsonl", progress) as backend:
        yield Pipeline(run, backend, progress)


def run(run: config.Run, progress: Progress | None = None) -> Result:
    """Do a whole run and return what it left. Going on after an interruption is calling it again."""
    with open_pipeline(run, progress) as pipeline:
        return pipeline.all()
