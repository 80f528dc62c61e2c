"""Score the rows of a comparison: prepare training pairs, choose rates on val, train and test students.

Each student is a separate task. Its scores are stored under a hash of its training pairs and protocol, so a stopped
comparison resumes, and added rows train only their own students. Students that `rmdd run` trained on random pairs or
full data are reused.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rmdd import config
from rmdd.comparisons.entries import Entry, check_data, renormalised, same_text, seconds_of, temperature_of
from rmdd.config.order import in_words
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
from rmdd.runs.paths import model_settings, paths_of
from rmdd.runs.students import TrainStudent

FOLDER = Path("comparisons")
PAIRS, STUDENTS = FOLDER / "pairs", FOLDER / "students"

Rates = Literal["learned", "tuned", "trained"]
Costs = dict[str, int | float | None]


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a comparison: its training pairs, and the run and settings of its students."""

    name: str
    entry: Entry
    pipeline: Pipeline
    run: config.Run
    """Run whose evaluation settings the students of this row follow."""
    rates: Rates
    """Origin of the learning rates: learned (stored in the set), tuned (chosen on val), trained (the experts' own)."""
    pairs: Path | None = None
    """Path of the file of training pairs, relative to the storage; None for random pairs and full data."""
    costs: Costs = field(default_factory=dict)
    """Costs of the training pairs: number of pairs, parameters, bytes and seconds."""
    remarks: tuple[str, ...] = ()

    def choices(self) -> list[Job]:
        """Return the jobs whose val scores decide the learning rates (and, for real pairs, the loss) of this row."""
        rule = self.run.evaluate
        if self.rates != "tuned":
            return []
        if self.entry.kind != "set":
            return protocol.tuning_jobs(self.run.evaluate)
        students = range(rule.selection_students)
        return [Job("select", i, snapshot=0, lr=lr) for lr in rule.baseline_lrs for i in students]

    def students(self, loss: str, lr: float) -> list[Job]:
        """Return the jobs whose scores make up the row; `loss` and `lr` were chosen on val."""
        rule = self.run.evaluate
        if self.entry.kind == "full":
            store = Store.open(self.pipeline.item().paths.store)
            return [Job("full", e) for e in store.complete()[: self.run.experts.num]]
        if self.entry.kind == "set":
            return [Job("student", i, lr=lr) for i in range(rule.students)]
        number = rule.students if self.entry.kind == "subset" else min(rule.students, rule.baseline_draws)
        return [Job("baseline", i, loss=loss, lr=lr) for i in range(number)]

    def item(self, job: Job) -> TaskItem:
        dataset = self.pipeline.ingest()
        paths = paths_of(self.run, dataset)
        if self.pairs is None:
            return TaskItem(self.run, paths, paths.phases.name, job=job)
        rule = self.run.hashed("evaluate", "learned")
        learned: dict[str, Any] = {"pairs": self.pairs.name, "lr": job.lr}
        if self.entry.kind == "set":
            learned |= {"loss": self.run.distill.loss, "temperature": self.run.student_temperature}
            if self.run.evaluate.order != "sequence":
                learned |= {"order": self.run.evaluate.order, "between": self.run.evaluate.between}
        else:
            learned |= {"loss": job.loss, "updates": protocol.StudentProtocol.of(self.run).updates}
        value = config.hash_value({**model_settings(self.run, dataset), "evaluate": rule, **learned})
        return TaskItem(self.run, paths, value, job=job, external=ExternalPairs(self.pairs, STUDENTS / value))


class ComparedRun(Pipeline):
    """Pipeline that prepares data and embeddings for all rows of a comparison, and the experts for the row `full`."""

    def check(self, entries: Sequence[Entry]) -> list[str]:
        """Return a message for every entry that uses a different dataset or pairs outside the training split."""
        dataset = self.ingest()
        wrong = [mistake for entry in entries for mistake in check_data(entry, dataset.hash)]
        total = dataset.counts["train"]["captions"]
        wrong += [
            f"{e.name} needs {e.pairs} pairs, but train has only {total} captions; ask for fewer"
            for e in entries
            if (e.pairs or 0) > total
        ]
        subsets = [] if wrong else [entry for entry in entries if entry.subset is not None]
        split = load_split(dataset, "train", self.run.data, self.item().paths.cache) if subsets else None
        for entry in subsets:
            assert entry.subset is not None and split is not None
            try:
                if not entry.subset.rows(split):
                    wrong.append(f"{entry.name} holds no pairs; remove it")
            except ValueError as error:
                wrong.append(f"{entry.name}: {error}")
        return wrong

    def row(self, name: str, entry: Entry, rates: Rates | None = None) -> Row:
        """Prepare the table row of a set, subset or baseline. Raises `ValueError` if it does not fit the data."""
        if entry.kind == "full":
            self.experts()
            return Row(name, entry, self, self.run, "trained", costs=self._full_costs())
        if entry.kind == "random":
            rule = self.run.distill
            run = self.run.model_copy(
                update={"distill": rule.model_copy(update={"budget": entry.pairs or rule.budget})}
            )
            train, number = self.prepared_split("train"), min(run.evaluate.students, run.evaluate.baseline_draws)
            budget, seed = run.distill.budget, run.seed_of("evaluate")
            draws = [protocol.random_records(train, budget, seed, draw) for draw in range(number)]
            return Row(name, entry, self, run, "tuned", costs=self._real_costs(draws))
        if entry.subset is not None:
            rows = entry.subset.rows(self.prepared_split("train").split)
            costs = self._real_costs([rows]) | {"seconds": seconds_of(entry, self.storage.root)}
            file = self._relative(write_records(self._pairs, rows))
            return Row(name, entry, self, self.run, "tuned", file, costs)
        assert entry.distilled is not None
        return self._distilled_row(name, entry, rates or entry.rates)

    def _distilled_row(self, name: str, entry: Entry, rates: Rates) -> Row:
        distilled = entry.distilled
        assert distilled is not None
        train, remarks = self.prepared_split("train"), []
        subsets, duplicates = self._training_pairs(entry, train)
        if duplicates is not None:
            remarks.append(
                "its texts are the nearest real captions, embedded with this text encoder; "
                f"{duplicates} of {distilled.num_pairs} pairs have the same caption as an earlier pair"
            )
        if distilled.mean and (distilled.mean, distilled.std) != (tuple(train.mean), tuple(train.std)):
            remarks.append("its images were normalised again with the mean and std of this protocol")
        towers = distilled.model.get("image", {})
        if towers.get("trainable", True) != self.run.model.image.trainable:
            remarks.append(
                f"it was distilled for {'trained' if towers['trainable'] else 'frozen'} image towers, but these "
                f"students have {'trained' if self.run.model.image.trainable else 'frozen'} ones"
            )
        if not distilled.model:
            remarks.append("bare tensors: rmdd cannot check that they fit these encoders and this data")
        own_order = {"order": distilled.order, "between": distilled.between} if distilled.model else {}
        training = self.run.evaluate.model_copy(update=own_order)
        if training.order != "sequence" and len(distilled.subsets) > 1:
            remarks.append(f"its students train on {in_words(training.order, training.between)}")
        steps = protocol.updates(training, [subset.pairs for subset in distilled.subsets])
        if steps != (real := protocol.StudentProtocol.of(self.run).updates):
            remarks.append(f"its students train for {steps:,} updates, students of real pairs for {real:,}")
        rule = self.run.distill
        change = {"loss": distilled.loss or rule.loss, "temperature": temperature_of(distilled) or rule.temperature}
        run = self.run.model_copy(update={"distill": rule.model_copy(update=change), "evaluate": training})
        sizes = distilled.budget()
        costs: Costs = {
            "pairs": distilled.num_pairs,
            "parameters": sizes["total"]["parameters"],
            "bytes": sizes["total"]["bytes"],
            "seconds": seconds_of(entry, self.storage.root),
        }
        if duplicates is not None:
            costs["duplicates"] = duplicates
        file = self._relative(write_pairs(self._pairs, subsets))
        return Row(name, entry, self, run, rates, file, costs, tuple(remarks))

    def _training_pairs(self, entry: Entry, train: PreparedSplit) -> tuple[list[TrainingPairs], int | None]:
        """Return the training pairs of a set, and the number of duplicates among its captions.

        The number is None if the text embeddings of the set are used, so that its captions are not embedded.
        """
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
            replace(pairs, images=renormalised(pairs.images, distilled, train.mean, train.std), texts=embeddings)
            for pairs, embeddings in zip(pairs_of_set(distilled), texts, strict=True)
        ]
        return subsets, duplicates

    @property
    def _pairs(self) -> Path:
        return self.storage.root / PAIRS

    def _relative(self, file: Path) -> Path:
        return file.relative_to(self.storage.root)

    def _real_costs(self, draws: Sequence[Sequence[int]]) -> Costs:
        """Return the costs of random draws of real pairs, all of one size; `bytes` is the mean over the draws."""
        train, pairs = self.prepared_split("train"), len(draws[0])
        costs = cost.ByteCosts.of(train.split, self.item().paths.cache)
        mean_bytes = statistics.fmean(costs.bytes_of(draw)["total"] for draw in draws)
        numbers = cost.parameters(pairs, self.run.data.image_size, train.texts.shape[1])
        return {"pairs": pairs, "parameters": numbers, "bytes": round(mean_bytes), "seconds": None}

    def _full_costs(self) -> Costs:
        """Return the costs of the training split; here a pair is an image with all its captions."""
        split = self.prepared_split("train").split
        return self._real_costs([range(len(split.captions))]) | {"pairs": len(split)}


@dataclass(frozen=True)
class ScoredRow:
    """The scores of the students of a row, or the error that stopped a student."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """The stored scores of each student, by the index of the student."""
    ranks: list[Path] = field(default_factory=list)
    """Files with the retrieval ranks on test, for those students that have such a file."""
    chosen: dict[str, Any] | None = None
    """Loss and learning rate that were chosen on val, and the val scores of all tried combinations."""
    error: str | None = None
    """Error message of the first student that failed, or None."""


def score(rows: Sequence[Row], backend: Backend, progress: Progress) -> list[ScoredRow]:
    """Train and score the students of all rows in parallel: first to choose settings on val, then for the table."""
    chosen, errors = choose(rows, backend, progress)
    final: dict[int, list[Job]] = {}
    for row in rows:
        if id(row) not in errors:
            rule = chosen.get(id(row), {"loss": "", "lr": 0.0})
            final[id(row)] = row.students(rule["loss"], rule["lr"])
    done = run_jobs("students", [(row, job) for row in rows for job in final.get(id(row), [])], backend, progress)
    return [_scored_row(row, final.get(id(row), []), done, chosen.get(id(row)), errors.get(id(row))) for row in rows]


def choose(
    rows: Sequence[Row], backend: Backend, progress: Progress
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return the loss and the rate of each row, chosen on val, and the error messages of rows that failed, by id."""
    choices = {id(row): row.choices() for row in rows}
    tried = run_jobs("choices on val", [(row, job) for row in rows for job in choices[id(row)]], backend, progress)
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
    return chosen, errors


def _scored_row(
    row: Row, jobs: list[Job], done: dict[tuple[int, Job], Any], chosen: dict[str, Any] | None, error: str | None
) -> ScoredRow:
    results = [done[id(row), job] for job in jobs]
    error = error or next((r.reason for r in results if isinstance(r, Failed)), None)
    if error is not None:
        return ScoredRow(chosen=chosen, error=error)
    files = [records.ranks_file(record(row.item(job))) for job in jobs]
    for file in files:
        row.pipeline.storage.fetch(file)
    return ScoredRow(results, [file for file in files if file.is_file()], chosen)


def run_jobs(
    title: str, jobs: list[tuple[Row, Job]], backend: Backend, progress: Progress
) -> dict[tuple[int, Job], Any]:
    """Train and score students; return their records by `id(row)` and job. A failed student has a `Failed` instead."""
    if not jobs:
        return {}
    names = [f"{row.name}: {job.name}" + (f" at {job.lr:g}" if job.lr else "") for row, job in jobs]
    items = [replace(row.item(job), job=job) for row, job in jobs]
    with progress.stage(title, dict.fromkeys(names, 1)) as update:
        results = backend.executor.map(ReturnFailures(TrainStudent()), items, names, update)
    if any(r is False for r in results):
        raise Interrupted
    return {(id(row), job): result for (row, job), result in zip(jobs, results, strict=True)}
