"""The steps of a run (ingest, embed, experts, plan, distill, evaluate ...) as methods that take and return values.

Every step first looks for finished results in the storage, so a restarted run resumes where it stopped.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmdd import config, methods
from rmdd.core.device import device_of
from rmdd.core.failures import MustChange
from rmdd.core.files import read_json, write_json
from rmdd.core.progress import Progress
from rmdd.core.storage import open_storage
from rmdd.core.tracking import is_curve
from rmdd.data.captions import SplitCaptions
from rmdd.data.carving import empty_splits
from rmdd.data.ingest import ingest
from rmdd.data.shards import MANIFEST, Dataset
from rmdd.distill import chain
from rmdd.distill.guard import PhaseDiverged
from rmdd.distill.trajectory.planning import PLAN, budget_error, with_plan
from rmdd.evaluate import examples, protocol, records, scores, summary
from rmdd.evaluate.probes.of_run import prepare, remarks
from rmdd.execution.backend import Backend
from rmdd.execution.executor import Mapper
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.tasks import Failed, Interrupted, ReturnFailures, Task, with_progress
from rmdd.experts import feed
from rmdd.experts.store import Store, stored_bytes
from rmdd.experts.train import begin_store
from rmdd.generate.studio import Tools
from rmdd.models.prepared import SplitSource
from rmdd.models.text import embed, encoder_identity, text_width
from rmdd.runs import gate
from rmdd.runs.items import TaskItem, needed_after_distillation, record
from rmdd.runs.path_starts import TrainPathStart
from rmdd.runs.paths import (
    EXAMPLES,
    HEALTH,
    candidates_of,
    dataset_folder,
    fetch_pretrained,
    is_finished,
    paths_of,
    protocol_of,
)
from rmdd.runs.students import TrainStudent
from rmdd.runs.tasks import CheckHealth, DistillPhase, DistillShared, GeneratePhase, MakePlan, TrainExpert

NO_RESULTS = ("run.yaml", "data.json", "seconds.json", "events.jsonl")
"""Names of the files in a run folder that do not depend on the content of the data."""


class Steps:
    """The steps of one run, executed by `backend`. `seconds.json` accumulates the wall-clock seconds of each step."""

    def __init__(self, run: config.Run, backend: Backend, progress: Progress, folder: Path):
        self.run, self.backend, self.progress, self.folder = run, backend, progress, folder
        self.storage = open_storage(run.runtime)

    # -- data ----------------------------------------------------------------------------------------------------

    def ingest(self) -> Dataset:
        """Return the run's dataset. Ingest the data first, unless this was done before."""
        run = self.run
        fetch_pretrained(run)
        with self.timed("ingest"):
            if run.data.source == "dataset":
                dataset = Dataset.open(dataset_folder(run))
            else:
                readers = with_progress(self.progress, "ingest", "pairs", self.backend.readers)
                dataset = ingest(run.data, dataset_folder(run), readers, run.runtime)
            self._bind(dataset)
        counts = ", ".join(
            f"{split} {n['pairs']} pairs ({n['captions']} captions)" for split, n in dataset.counts.items()
        )
        self.progress.say(f"data: {counts} at {dataset.path}")
        return dataset

    def locate(self, dataset: Dataset) -> TaskItem:
        """Return the input of the run's tasks: the run, its paths and the hash of its settings."""
        paths = paths_of(self.run, dataset)
        return TaskItem(self.run, paths, paths.phases.name)

    def embed(self, item: TaskItem, dataset: Dataset, splits: Sequence[str]) -> SplitSource:
        """Embed the captions of `splits` and decode the images on which models are scored.

        Raises `ConfigError` if one of these splits is empty.
        """
        counts = {split: (n["pairs"], n["captions"]) for split, n in dataset.counts.items()}
        if empty := empty_splits(counts, f"in {dataset.path}", splits):
            raise config.ConfigError([empty], self.run.name)
        for remark in dataset.remarks(self.run.data):
            self.progress.say(remark)
        with self.timed("embed"):
            for split in splits:
                self.embed_split(item, dataset, split)
                item.source.open(split)
        return item.source

    def embed_split(self, item: TaskItem, dataset: Dataset, split: str) -> None:
        """Embed those captions of the split `split` whose embeddings are missing from the cache."""
        run = self.run
        embed(
            SplitCaptions(dataset, split, run.data),
            run.model.text,
            item.paths.cache,
            device=str(device_of(run.runtime)),
            threads=run.runtime.threads,
            stream=with_progress(self.progress, f"embed {split}", "captions", self.backend.encoders),
        )

    def probes(self, dataset: Dataset) -> dict[str, dict[str, Any]]:
        """Ingest and embed the data of all probes (extra evaluations); return facts for the report, by probe."""
        facts: dict[str, dict[str, Any]] = {}
        for name in self.run.evaluate.probes:
            with self.timed("probes"):
                readers = with_progress(self.progress, f"ingest {name}", "pairs", self.backend.readers)
                encoders = with_progress(self.progress, f"embed {name}", "captions", self.backend.encoders)
                facts[name] = prepare(self.run, name, dataset, readers, encoders)
            for remark in remarks(name, facts[name]):
                self.progress.say(remark)
        return facts

    # -- experts and phases --------------------------------------------------------------------------------------

    def experts(self, item: TaskItem, dataset: Dataset, splits: SplitSource) -> Store:
        """Train the experts that are missing from the expert store; return the store."""
        run, path = self.run, item.paths.store
        with self.timed("experts"):
            facts = {
                "protocol": protocol_of(run),
                "model": run.model.model_dump(mode="json"),
                "text_encoder": encoder_identity(run.model.text),
                "data_hash": dataset.hash,
                "config_hash": path.name,
            }
            self.storage.fetch(path, _records)
            store = begin_store(run, path, text_width(run.model.text), facts)
            missing = [e for e in range(run.experts.num) if not store.is_complete(e)]
            if missing:
                feed.prepare(splits.open("train"), run.experts.augment, run.runtime.cache_gb)
            self._train([replace(item, number=e, stream=self.backend.pictures) for e in missing])
            self.storage.fetch(path, _records)
        self.progress.say(f"experts: {len(store.complete())} in {path} ({store.size() / 2**20:.0f} MiB)")
        return store

    def check_budget(self, run: config.Run) -> None:
        """Raise `ValueError` or warn (see `distill.budget_check`) if the phases cost more than the budget."""
        message = budget_error(run)
        if message and (run.distill.budget_check == "error" or not run.distill.phases):
            raise ValueError(message)
        if message:
            self.progress.say(f"warning: {message}")

    def plan(self, item: TaskItem, dataset: Dataset, task: MakePlan | None = None) -> TaskItem:
        """Return the input of the tasks, with all phases. If the run lists no phases, plan them from the experts."""
        if self.run.distill.phases:
            return item
        with self.timed("plan"):
            self.map("plan", task or MakePlan(), [item], {"plan": 1})
            self.storage.fetch(self.folder)
            plan = read_json(self.folder / PLAN)
            run = with_plan(self.run, plan)
        self.check_budget(run)
        for reason in plan["reasons"]:
            self.progress.say(f"plan: {reason}")
        paths = paths_of(run, dataset)
        return TaskItem(run, paths, paths.phases.name)

    def begin_phases(self, item: TaskItem, splits: SplitSource) -> None:
        """Write the initial synthetic pairs of each phase whose file of initial pairs is missing."""
        with self.timed("distill"):
            self.storage.fetch(item.paths.phases, needed_after_distillation)
            method = methods.method_of(item.run)
            for p in range(len(item.run.distill.phases)):
                method.begin(p, lambda: splits.open("train"), item.paths.phase(p))

    def distill(self, item: TaskItem) -> list[Path]:
        """Distil the unfinished phases; return the folders of all phases."""
        run, paths, backend = item.run, item.paths, self.backend
        phases = range(len(run.distill.phases))
        with self.timed("distill"):
            if chain.is_chained(run.distill):
                for wave in range(chain.waves(run.distill)):
                    self._distill_wave(item, wave)
            todo = [p for p in phases if not is_finished(run, paths, p)]
            items = [replace(item, number=p) for p in todo]
            totals = {f"phase {p}": run.distill.phases[p].iterations for p in todo}
            local = SequentialExecutor(run.runtime.threads)  # used if each phase needs all workers
            method = methods.method_of(run)
            if not method.iterates:
                tools = Tools(backend.executor, backend.encoders, backend.open_parts, self.progress)
                self.map("phases", GeneratePhase(tools), items, totals, local)
            elif method.draws > 1:
                shared = DistillShared(backend.open_parts, method.draws, self.progress.say)
                self.map("phases", shared, items, totals, local)
            else:
                self.map("phases", DistillPhase(), items, totals)
            self.storage.fetch(paths.phases, needed_after_distillation)
        return [paths.phase(p) for p in phases]

    def _distill_wave(self, item: TaskItem, wave: int) -> None:
        """Distil one wave of chained phases. First train the students from which the paths of this wave start."""
        rule, paths = item.run.distill, item.paths
        phases, experts = range(len(rule.phases)), range(item.run.experts.num)
        work = {p: (chain.updates_after(rule, p, wave - 1), chain.updates_after(rule, p, wave)) for p in phases}
        todo = {p: done for p, (begun, done) in work.items() if done > begun and not paths.set(p, done).is_file()}
        earlier = {p: chain.iterations_of_earlier_phases(rule, p, work[p][0]) for p in todo if p}
        starts = {
            f"phase {p}, expert {e}": replace(item, number=e, iterations=iterations)
            for p, iterations in earlier.items()
            for e in experts
        }
        self.map("path starts", TrainPathStart(), list(starts.values()), dict.fromkeys(starts, 1))
        items = [replace(item, number=p) for p in todo]
        self.map("phases", DistillPhase(wave=wave), items, {f"phase {p}": done for p, done in todo.items()})
        self.storage.fetch(paths.phases, needed_after_distillation)

    def distill_gated(self, item: TaskItem, dataset: Dataset, splits: SplitSource) -> TaskItem:
        """Distil a planned chain with the gate of `rmdd.runs.gate`; return the input of the tasks with the kept phases.

        If only one phase is left, it is planned and not yet distilled.
        """
        unplanned = replace(item, run=self.run)
        while gate.is_gated(item.run.distill):
            phases = len(item.run.distill.phases)
            plan = read_json(self.folder / PLAN)
            earlier = [d for d in plan.get("decisions", []) if d["phases"] > phases]
            decisions = [*earlier, *self._decisions(item, splits)]
            last = decisions[-1]
            if not last["kept"]:
                task = MakePlan(most=last["subsets"] - 1, decisions=tuple(decisions))
                item = self.plan(unplanned, dataset, task)
                assert len(item.run.distill.phases) < phases, "a plan without the dropped phase has fewer phases"
                continue
            decided = plan | {"order": last["order"], "decisions": decisions}
            if decided != plan:
                gate.write_plan(self.folder, self.run, decided)
            paths = paths_of(run := with_plan(self.run, decided), dataset)
            return TaskItem(run, paths, paths.phases.name)
        return item

    def _decisions(self, item: TaskItem, splits: SplitSource) -> list[dict[str, Any]]:
        """Distil the phases of a planned chain one by one, up to the first that is dropped; return all decisions."""
        decisions: list[dict[str, Any]] = []
        self.begin_phases(item, splits)
        with self.timed("distill"):
            for p in range(len(item.run.distill.phases)):
                try:
                    self._distill_wave(item, p)
                except PhaseDiverged as error:
                    if p == 0:
                        raise
                    decisions.append(gate.diverged(item, p + 1, error))
                else:
                    students = gate.students_at_gate(item, p + 1)
                    names = [student.job.name for student in students if student.job]
                    scored = self.map("choices on val", TrainStudent(), students, dict.fromkeys(names, 1))
                    before = decisions[-1]["score"] if decisions else None
                    decisions.append(gate.decision(item, students, scored, before))
                self.progress.say(f"plan: {decisions[-1]['reason']}")
                if not decisions[-1]["kept"]:
                    break
        return decisions

    # -- students ------------------------------------------------------------------------------------------------

    def evaluate(
        self, item: TaskItem, splits: SplitSource, store: Store, facts: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Choose the snapshot and the settings on val, score the final students on test; write `evaluation.json`.

        Returns the content of that file.
        """
        run, rule, by_protocol = item.run, item.run.evaluate, protocol.StudentProtocol.of(item.run)
        candidates = candidates_of(run)
        with self.timed("evaluate"):
            select = protocol.selection_jobs(rule, len(candidates)) if len(candidates) > 1 else []
            tune = protocol.tuning_jobs(rule)
            recipe = scores.tuning_jobs(rule) if rule.scores else []
            tried_all = self.students(item, "choices on val", select + tune + recipe, candidates)
            rates = scores.chosen_rates(list(zip(recipe, tried_all[len(select + tune) :], strict=True)))
            chosen = len(candidates) - 1
            curve: dict[int, float] = {}
            if select:
                best, curve = protocol.best_by_val([(j.snapshot, r) for j, r in zip(select, tried_all, strict=False)])
                chosen = best if rule.selection == "val_best" else chosen
            (loss, lr), tried = protocol.best_by_val(
                [((j.loss, j.lr), r) for j, r in zip(tune, tried_all[len(select) :], strict=False)]
            )
            final = protocol.final_jobs(by_protocol, loss, lr, store.complete()[: run.experts.num])
            final += scores.final_jobs(rule, rates) if rule.scores else []
            trained = self.students(item, "students", final, [candidates[chosen]] * len(candidates))
            rows = list(zip(final, trained, strict=True))
            paths = {j: record(replace(item, job=j)) for j in final if j.kind != "reference"}
            ranks = {job: records.ranks_of(path, self.storage) for job, path in paths.items()}
        by_kind = summary.by_kind(rows)
        table = summary.table_of(run.distill.method_name, by_kind, facts)
        evaluation = {
            "table": table,
            **({"probes": facts} if facts else {}),
            "diverged": {kind: sum("diverged" in r for r in rs) for kind, rs in by_kind.items()},
            **summary.gallery_sections(splits),
            "spread": "sample standard deviation over students (distilled), draws (random) and experts (full)",
            **summary.choices_section(by_protocol, candidates, chosen, curve, (loss, lr), tried),
            "student_curves": [r["curve"] for r in by_kind["student"]],
        }
        size = summary.size(run.distill, run.stored_size, splits.open("val").texts.shape[1])
        evaluation |= summary.further_sections(by_protocol, run.distill.method_name, table, rows, ranks, size)
        if rule.scores:
            evaluation["scores"] = scores.result(by_protocol, ranks, rates)
        write_json(self.folder / "evaluation.json", evaluation)
        found = summary.examples_by_row(run.distill.method_name, by_kind)
        if found:  # older releases wrote no examples
            write_json(self.folder / EXAMPLES, examples.content(splits.open("test").split, found))
        return evaluation

    def students(
        self, item: TaskItem, title: str, jobs: list[protocol.Job], candidates: list[tuple[int, ...]]
    ) -> list[dict[str, Any]]:
        """Train and score the students of `jobs`; return one mapping of scores per student, in the order of `jobs`."""
        items = [replace(item, job=job, iterations=candidates[job.snapshot]) for job in jobs]
        return self.map(title, TrainStudent(), items, dict.fromkeys([job.name for job in jobs], 1))

    def health(self, item: TaskItem) -> dict[str, Any]:
        """Embed each snapshot of the distilled set with the first expert; write and return measures of collapse."""
        with self.timed("health"):
            self.map("health", CheckHealth(), [item], {"health": 1})
            self.storage.fetch(self.folder / HEALTH)
        health: dict[str, Any] = read_json(self.folder / HEALTH)
        for warning in health["warnings"]:
            self.progress.say(f"warning: possible modality collapse: {warning}")
        return health

    def cost(self, item: TaskItem) -> dict[str, Any]:
        """Write the time and disk space that the run has used so far to `cost.json`; return the content of the file.

        These numbers are not in `evaluation.json`, as that file must be byte-identical if a run is killed and resumed.
        """
        logs, experts = gate.logs_of(item), stored_bytes(item.paths.store)
        cost = summary.measured_cost(item.run.runtime, logs, experts, self.all_seconds())
        write_json(self.folder / "cost.json", cost)
        return cost

    # -- helpers -------------------------------------------------------------------------------------------------

    def map(
        self, title: str, task: Task, items: list[TaskItem], totals: dict[str, int], executor: Mapper | None = None
    ) -> list[Any]:
        """Run `task` on `items`; return the results in their order. `totals` is the amount of work by item name."""
        if not items:
            return []
        with self.progress.stage(title, totals) as update:
            results = (executor or self.backend.executor).map(task, items, list(totals), update)
        if any(r is False for r in results):
            raise Interrupted
        return results

    def all_seconds(self) -> dict[str, float]:
        """Return the wall-clock seconds of each step, summed over all starts of this run."""
        return read_json(self.folder / "seconds.json") if (self.folder / "seconds.json").is_file() else {}

    def _train(self, items: list[TaskItem]) -> None:
        """Train experts and retry failed ones. Raises a `RuntimeError` that lists experts that failed every time,
        or `MustChange` if resuming cannot help."""
        executor, runtime, size = None, self.run.runtime, self.run.experts.worker_group.workers
        if items and self.backend.expert_pool is not None and (size > 1 or runtime.fleet == "train"):
            executor = self.backend.expert_pool(items[0].paths.store.name, size=size)
        by_reason: dict[str, list[str]] = {}
        kind: type[RuntimeError] = RuntimeError
        for retries_left in reversed(range(runtime.max_restarts + 1)):
            totals = {f"expert {item.number}": self.run.experts.epochs for item in items}
            results = self.map("experts", ReturnFailures(TrainExpert()), items, totals, executor)
            failed = [(item, r) for item, r in zip(items, results, strict=True) if isinstance(r, Failed)]
            items = [item for item, r in failed if r.again and retries_left]
            if executor is None and any(not r.again for _, r in failed):
                kind = MustChange  # Ray Train does not say whether an expert that it gives up may be tried again
            for item, r in failed:
                if item not in items:
                    by_reason.setdefault(f"on {r.host}: {r.reason}", []).append(str(item.number))
        if by_reason:
            lines = "".join(f"\n  expert {', '.join(numbers)} {reason}" for reason, numbers in by_reason.items())
            raise kind(
                f"{sum(map(len, by_reason.values()))} expert(s) could not be trained; all others are complete:{lines}"
            )

    def _bind(self, dataset: Dataset) -> None:
        """Raise `ValueError` if this run folder has results of a different dataset; otherwise write `data.json`."""
        path = self.folder / "data.json"
        earlier = read_json(path) if path.is_file() else {"data_hash": dataset.hash}
        if earlier["data_hash"] != dataset.hash:
            if any(file.name not in NO_RESULTS and file.name[0] != "." for file in self.folder.iterdir()):
                manifest, now = Path(earlier["path"]) / MANIFEST, _pairs(dataset.counts)
                stored = read_json(manifest) if manifest.is_file() else {}
                known = stored.get("data_hash") == earlier["data_hash"]  # a later ingest may have replaced the dataset
                then = _pairs(stored["counts"]) if known else now
                counts = f" ({then} pairs then, {now} pairs now)" if then != now else ""
                raise ValueError(
                    f"{self.folder} has results of other data{counts}; to start with the new data, "
                    "change `name` in the run file, or delete this folder"
                )
            self.progress.say("the data changed since the last start; that start left no results")
        write_json(path, {"data_hash": dataset.hash, "path": str(dataset.path)})

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            total = self.all_seconds()
            total[step] = round(total.get(step, 0.0) + time.perf_counter() - began, 2)
            write_json(self.folder / "seconds.json", total)


def _pairs(counts: Mapping[str, Mapping[str, int]]) -> int:
    return sum(of_split["pairs"] for of_split in counts.values())


def _records(name: str) -> bool:
    """Return whether the main process reads file `name` of an expert store; curves and epochs after 0 are not read."""
    return not is_curve(name) and (not name.endswith(".safetensors") or name.endswith("/theta-0.safetensors"))
