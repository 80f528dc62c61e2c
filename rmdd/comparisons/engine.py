"""From the rows of a comparison to their scores: training pairs, rates chosen on val, students.

Every student is a task of its own under the hash of its training pairs and its protocol, so a comparison that was
stopped goes on, and one with more rows trains only their students. Random pairs and full data are those of `rmdd run`,
records included.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rmdd import config
from rmdd.comparisons.entries import Entry, check_data, renormalised, same_text, seconds_of, temperature_of
from rmdd.core.device import device_of
from rmdd.core.progress import Progress
from rmdd.coresets import cost
from rmdd.data.splits import load_split
from rmdd.evaluate import protocol, records
from rmdd.evaluate.protocol import Job
from rmdd.evaluate.students import TrainingPairs
from rmdd.evaluate.training_pairs import pairs_of_set, write_pairs, write_records
from rmdd.execution.backend import Backend
from rmdd.execution.tasks import Failed, Interrupted, ReturnFailures
from rmdd.experts.store import Store
from rmdd.models.prepared import PreparedSplit
from rmdd.models.text import embed
from rmdd.pipeline import Pipeline
from rmdd.runs.items import ExternalPairs, TaskItem, record
from rmdd.runs.paths import paths_of, seen_by
from rmdd.runs.students import TrainStudent

FOLDER = Path("comparisons")
PAIRS, STUDENTS = FOLDER / "pairs", FOLDER / "students"

Rates = Literal["learned", "tuned", "trained"]
Costs = dict[str, int | float | None]


@dataclass(frozen=True, eq=False)
class Row:
    """One row: the training pairs, the run whose students learn them, and the rates."""

    name: str
    entry: Entry
    compared: "ComparedRun"
    run: config.Run
    rates: Rates
    pairs: Path | None = None
    """File of training pairs within the storage; None for random pairs and full data, which a run has itself."""
    costs: Costs = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def choices(self) -> list[Job]:
        """Students by which rates (and the loss of real pairs) are chosen on val."""
        rule = self.run.evaluate
        if self.rates != "tuned":
            return []
        if self.entry.kind != "set":
            return protocol.tuning_jobs(self.run.evaluate)
        students = range(rule.selection_students)
        return [Job("select", i, snapshot=0, lr=lr) for lr in rule.baseline_lrs for i in students]

    def students(self, loss: str, lr: float) -> list[Job]:
        """Those whose scores are the row."""
        rule = self.run.evaluate
        if self.entry.kind == "full":
            store = Store.open(self.compared.item().paths.store)
            return [Job("full", e) for e in store.complete()[: self.run.experts.num]]
        if self.entry.kind == "set":
            return [Job("student", i, lr=lr) for i in range(rule.students)]
        number = rule.students if self.entry.kind == "subset" else min(rule.students, rule.baseline_draws)
        return [Job("baseline", i, loss=loss, lr=lr) for i in range(number)]

    def item(self, job: Job) -> TaskItem:
        dataset = self.compared.ingest()
        paths = paths_of(self.run, dataset)
        if self.pairs is None:
            return TaskItem(self.run, paths, paths.phases.name, job=job)
        rule = self.run.hashed("evaluate", "learned")
        learned: dict[str, Any] = {"pairs": self.pairs.name, "lr": job.lr}
        if self.entry.kind == "set":
            learned |= {"loss": self.run.distill.loss, "temperature": self.run.student_temperature}
        else:
            learned |= {"loss": job.loss, "updates": protocol.StudentProtocol.of(self.run).updates}
        value = config.hash_value({**seen_by(self.run, dataset), "evaluate": rule, **learned})
        return TaskItem(self.run, paths, value, job=job, external=ExternalPairs(self.pairs, STUDENTS / value))


class ComparedRun(Pipeline):
    """The run behind the rows of one protocol: its data, embeddings, and experts where full data is a row."""

    def check(self, entries: Sequence[Entry]) -> list[str]:
        """Why entries do not belong to the data, or are not in its training split."""
        dataset = self.ingest()
        wrong = [mistake for entry in entries for mistake in check_data(entry, dataset.hash)]
        most = dataset.counts["train"]["captions"]
        wrong += [f"{e.name} asks for more than the {most} captions of train" for e in entries if (e.pairs or 0) > most]
        subsets = [] if wrong else [entry for entry in entries if entry.subset is not None]
        split = load_split(dataset, "train", self.run.data, self.item().paths.cache) if subsets else None
        for entry in subsets:
            assert entry.subset is not None and split is not None
            try:
                if not entry.subset.rows(split):
                    wrong.append(f"{entry.name} holds no pairs")
            except ValueError as error:
                wrong.append(f"{entry.name}: {error}")
        return wrong

    def row(self, name: str, entry: Entry, rates: Rates | None = None) -> Row:
        """Raises ValueError where the entry does not fit the data."""
        if entry.kind == "full":
            self.experts()
            return Row(name, entry, self, self.run, "trained", costs=self._full())
        if entry.kind == "random":
            rule = self.run.distill
            run = self.run.model_copy(
                update={"distill": rule.model_copy(update={"budget": entry.pairs or rule.budget})}
            )
            train, number = self.prepared_split("train"), min(run.evaluate.students, run.evaluate.baseline_draws)
            budget, seed = run.distill.budget, run.seed_of("evaluate")
            draws = [protocol.random_records(train, budget, seed, draw) for draw in range(number)]
            return Row(name, entry, self, run, "tuned", costs=self._real(draws))
        if entry.subset is not None:
            rows = entry.subset.rows(self.prepared_split("train").split)
            costs = self._real([rows]) | {"seconds": seconds_of(entry, self.storage.root)}
            return Row(name, entry, self, self.run, "tuned", self._within(write_records(self._pairs, rows)), costs)
        assert entry.distilled is not None
        return self._distilled(name, entry, rates or entry.rates)

    def _distilled(self, name: str, entry: Entry, rates: Rates) -> Row:
        distilled = entry.distilled
        assert distilled is not None
        train, remarks = self.prepared_split("train"), []
        subsets, duplicates = self._learned(entry, train)
        if duplicates is not None:
            remarks.append(
                f"texts are the nearest real captions of its own, encoded anew; {duplicates} of {distilled.num_pairs} "
                "are the caption of an earlier pair"
            )
        if distilled.mean and (distilled.mean, distilled.std) != (tuple(train.mean), tuple(train.std)):
            remarks.append("pictures were brought to the pixel constants of this protocol")
        towers = distilled.model.get("image", {})
        if towers.get("trainable", True) != self.run.model.image.trainable:
            remarks.append(
                f"made for {'trained' if towers['trainable'] else 'frozen'} image towers, students' are "
                f"{'trained' if self.run.model.image.trainable else 'frozen'}"
            )
        if not distilled.model:
            remarks.append("bare tensors: that they are of these encoders and data is taken on trust")
        epochs, batch = self.run.evaluate.epochs, self.run.evaluate.batch
        steps = sum(-(-subset.pairs // batch) * epochs for subset in distilled.subsets)
        if steps != (real := protocol.StudentProtocol.of(self.run).updates):
            remarks.append(f"its students make {steps:,} updates, those of real pairs {real:,}")
        rule = self.run.distill
        change = {"loss": distilled.loss or rule.loss, "temperature": temperature_of(distilled) or rule.temperature}
        run = self.run.model_copy(update={"distill": rule.model_copy(update=change)})
        sizes = distilled.budget()
        costs: Costs = {
            "pairs": distilled.num_pairs,
            "parameters": sizes["total"]["parameters"],
            "bytes": sizes["total"]["bytes"],
            "seconds": seconds_of(entry, self.storage.root),
        }
        if duplicates is not None:
            costs["duplicates"] = duplicates
        file = self._within(write_pairs(self._pairs, subsets))
        return Row(name, entry, self, run, rates, file, costs, tuple(remarks))

    def _learned(self, entry: Entry, train: PreparedSplit) -> tuple[list[TrainingPairs], int | None]:
        """The training pairs of a set, and how many captions came twice where its texts had to be encoded anew."""
        distilled = entry.distilled
        assert distilled is not None
        texts, duplicates = [subset.texts for subset in distilled.subsets], None
        if not same_text(distilled, self.run.model.text):
            captions = [caption for subset in distilled.subsets for caption in subset.captions]
            cache = self.item().paths.cache
            vectors = embed(captions, self.run.model.text, cache, device=str(device_of(self.run.runtime)))
            texts = list(torch.tensor(vectors).split([subset.pairs for subset in distilled.subsets]))
            duplicates = len(captions) - len(set(captions))
        subsets = [
            replace(pairs, images=renormalised(pairs.images, distilled, train.mean, train.std), texts=own)
            for pairs, own in zip(pairs_of_set(distilled), texts, strict=True)
        ]
        return subsets, duplicates

    @property
    def _pairs(self) -> Path:
        return self.storage.root / PAIRS

    def _within(self, file: Path) -> Path:
        return file.relative_to(self.storage.root)

    def _real(self, draws: Sequence[Sequence[int]]) -> Costs:
        """Of as many records in every draw; bytes are their mean."""
        train, pairs = self.prepared_split("train"), len(draws[0])
        costs = cost.ByteCosts.of(train.split, self.item().paths.cache)
        mean_bytes = statistics.fmean(costs.bytes_of(draw)["total"] for draw in draws)
        numbers = cost.parameters(pairs, self.run.data.image_size, train.texts.shape[1])
        return {"pairs": pairs, "parameters": numbers, "bytes": round(mean_bytes), "seconds": None}

    def _full(self) -> Costs:
        """Pairs are images here, with all of their captions."""
        split = self.prepared_split("train").split
        return self._real([range(len(split.captions))]) | {"pairs": len(split)}


@dataclass(frozen=True)
class Scored:
    """The students of a row in order, and how their rates came about; `error` where there are none."""

    records: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[Path] = field(default_factory=list)
    """Where the ranks of each student's test captions and images lie, if they were kept."""
    chosen: dict[str, Any] | None = None
    error: str | None = None


def score(rows: Sequence[Row], backend: Backend, progress: Progress) -> list[Scored]:
    """All students of all rows, side by side: first those by which val chooses, then those that test is read for."""
    choices = {id(row): row.choices() for row in rows}
    tried = _do("choices on val", [(row, job) for row in rows for job in choices[id(row)]], backend, progress)
    chosen: dict[int, dict[str, Any]] = {}
    errors: dict[int, str] = {}
    for row in rows:
        scored = [((job.loss, job.lr), tried[id(row), job]) for job in choices[id(row)]]
        if failed := next((r for _, r in scored if isinstance(r, Failed)), None):
            errors[id(row)] = failed.reason
        elif scored:
            (loss, lr), means = protocol.best_by_val(scored)
            grid = [{"loss": c[0] or row.run.distill.loss, "lr": c[1], "R@mean": v} for c, v in means.items()]
            chosen[id(row)] = {"loss": loss or row.run.distill.loss, "lr": lr, "val": grid}
    final: dict[int, list[Job]] = {}
    for row in rows:
        if id(row) not in errors:
            rule = chosen.get(id(row), {"loss": "", "lr": 0.0})
            final[id(row)] = row.students(rule["loss"], rule["lr"])
    done = _do("students", [(row, job) for row in rows for job in final.get(id(row), [])], backend, progress)
    return [_scored(row, final.get(id(row), []), done, chosen.get(id(row)), errors.get(id(row))) for row in rows]


def _scored(
    row: Row, jobs: list[Job], done: dict[tuple[int, Job], Any], chosen: dict[str, Any] | None, error: str | None
) -> Scored:
    results = [done[id(row), job] for job in jobs]
    error = error or next((r.reason for r in results if isinstance(r, Failed)), None)
    if error is not None:
        return Scored(chosen=chosen, error=error)
    files = [records.ranks_file(record(row.item(job))) for job in jobs]
    for file in files:
        row.compared.storage.fetch(file)
    return Scored(results, [file for file in files if file.is_file()], chosen)


def _do(title: str, jobs: list[tuple[Row, Job]], backend: Backend, progress: Progress) -> dict[tuple[int, Job], Any]:
    """The records of students by row and job; one that fails does not stop the others."""
    if not jobs:
        return {}
    names = [f"{row.name}: {job.name}" + (f" at {job.lr:g}" if job.lr else "") for row, job in jobs]
    items = [replace(row.item(job), job=job) for row, job in jobs]
    with progress.stage(title, dict.fromkeys(names, 1)) as update:
        results = backend.executor.map(ReturnFailures(TrainStudent()), items, names, update)
    if any(r is False for r in results):
        raise Interrupted
    return {(id(row), job): result for (row, job), result in zip(jobs, results, strict=True)}
