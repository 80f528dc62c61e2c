"""One run, read top to bottom: ingest, embed, experts, distil, evaluate, export, report.

Every step looks first for what is already there, so running again goes on where it stopped. Results lie under
the hash of what shaped them; two runs that differ in evaluation alone share their experts and phases.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rmdd import config, methods
from rmdd.artefact.assemble import assemble
from rmdd.artefact.card import export
from rmdd.core.device import device_of
from rmdd.core.files import atomic_path, read_json, write_json
from rmdd.core.progress import Progress
from rmdd.core.storage import anchored, open_storage, run_folder
from rmdd.core.tracking import is_curve
from rmdd.core.version import VERSION
from rmdd.data.captions import SplitCaptions
from rmdd.data.ingest import ingest
from rmdd.data.shards import Dataset
from rmdd.distill.trajectory.planning import PLAN, over_budget, with_phases
from rmdd.evaluate import protocol, records, scores, summary
from rmdd.evaluate.probes.of_run import prepare, remarks
from rmdd.evaluate.protocol import Job
from rmdd.execution.backend import Backend, hold_folders, open_backend
from rmdd.execution.executor import Executor, Mapper
from rmdd.execution.in_turn import InTurn
from rmdd.execution.parts import OpenParts, parts_here
from rmdd.execution.tasks import Failed, Interrupted, Spared, Stream, Task, in_turn, watched
from rmdd.experts import feed
from rmdd.experts.store import Store, stored_bytes
from rmdd.experts.train import begin_store
from rmdd.generate.studio import Tools
from rmdd.models.prepared import PreparedSplit
from rmdd.models.text import embed, encoder_identity, text_width
from rmdd.runs.paths import HEALTH, Places, bring_parts, candidates_of, dataset_folder, is_made, places_of, protocol_of
from rmdd.runs.tasks import Item, checkup, expert, generate, phase, plan, prepared_split, record, shared_phase, student

P = TypeVar("P", bound="Pipeline")


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: the distilled set, the page, and the numbers."""

    set: Path
    report: Path
    evaluation: dict[str, Any]
    seconds: dict[str, float]


class Pipeline:
    """The steps of one run over one executor and two streams. Use `open_pipeline`, which brings them.

    `fleet` makes the executor of experts from the name of their store, `stream` reads their pictures where they are
    not cached; without them experts are items like others, and read for themselves. `ranks` hold rows of features.
    """

    def __init__(
        self,
        run: config.Run,
        executor: Executor,
        progress: Progress,
        readers: Stream = in_turn,
        encoders: Stream = in_turn,
        fleet: Callable[[str], Mapper] | None = None,
        stream: feed.Stream | None = None,
        ranks: OpenParts = parts_here,
        folder: Path | None = None,
    ):
        run = run.model_copy(update={"runtime": anchored(run.runtime)})
        run = with_phases(run, []) if run.distill.plan.plans else run  # they are in the plan that lies there
        self.run, self.executor, self.progress = run, executor, progress
        self.readers, self.encoders = readers, encoders
        self.fleet, self.stream, self.ranks = fleet, stream, ranks
        self.splits: tuple[str, ...] = ("train", "val", "test")
        self.storage = open_storage(run.runtime)
        self.folder = folder or run_folder(run)
        self._dataset: Dataset | None = None
        self.storage.fetch(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / "run.yaml") as temporary:
            temporary.write_text(config.dump(run), encoding="utf-8")

    @classmethod
    def of(cls: type[P], run: config.Run, backend: Backend, progress: Progress, folder: Path | None = None) -> P:
        size, fleet = run.experts.gang.workers, None
        if backend.expert_pool is not None and (size > 1 or run.runtime.fleet == "train"):
            fleet = functools.partial(backend.expert_pool, size=size)
        return cls(
            run,
            backend.executor,
            progress,
            backend.readers,
            backend.encoders,
            fleet,
            backend.pictures,
            backend.open_parts,
            folder,
        )

    # -- steps ---------------------------------------------------------------------------------------------------

    def ingest(self) -> Dataset:
        """Bring the data in, or open what was ingested before."""
        if self._dataset is not None:
            return self._dataset
        bring_parts(self.run)
        with self._timed("ingest"):
            run = self.run
            if run.data.source == "dataset":
                dataset = Dataset.open(dataset_folder(run))
            else:
                readers = watched(self.progress, "ingest", "pairs", self.readers)
                dataset = ingest(run.data, dataset_folder(run), readers, run.runtime)
            self._bind(dataset)
        counts = ", ".join(
            f"{split} {n['pairs']} pairs ({n['captions']} captions)" for split, n in dataset.counts.items()
        )
        self.progress.say(f"data: {counts} at {dataset.path}")
        self._dataset = dataset
        return dataset

    def embed(self) -> Dataset:
        """Embed the captions of all splits, and decode the pictures that are scored."""
        dataset = self.ingest()
        with self._timed("embed"):
            for split in self.splits:
                if dataset.counts[split]["pairs"]:
                    self._embed(dataset, split)
                prepared_split(self._item(dataset), split)
        return dataset

    def experts(self) -> Store:
        """Train the experts that are missing."""
        dataset = self.embed()
        run, places = self.run, places_of(self.run, dataset)
        with self._timed("experts"):
            facts = {
                "protocol": protocol_of(run),
                "model": run.model.model_dump(mode="json"),
                "text_encoder": encoder_identity(run.model.text),
                "data_hash": dataset.hash,
                "config_hash": places.store.name,
            }
            self.storage.fetch(places.store, _records)
            store = begin_store(run, places.store, text_width(run.model.text), facts)
            missing = [e for e in range(run.experts.num) if not store.is_complete(e)]
            if missing:
                train = prepared_split(self._item(dataset), "train")
                feed.prepare(train, run.experts.augment, run.runtime.cache_gb)
            self._train([replace(self._item(dataset), number=e, stream=self.stream) for e in missing])
            self.storage.fetch(places.store, _records)
        self.progress.say(f"experts: {len(store.complete())} in {places.store} ({store.size() / 2**20:.0f} MiB)")
        return store

    def plan(self) -> config.Run:
        """The run with phases: its own, or those that it finds once its experts are there."""
        if not self.run.distill.phases:
            self.experts()
            with self._timed("plan"):
                self._map("plan", plan, [self._item(self.ingest())], {"plan": 1})
                self.storage.fetch(self.folder)
                found = read_json(self.folder / PLAN)
                self.run = with_phases(self.run, found["phases"])
            self.check_budget()
            for reason in found["reasons"]:
                self.progress.say(f"plan: {reason}")
        return self.run

    def begin_phases(self) -> Places:
        """Make what the phases start from, where it is not there."""
        self.check_budget()
        self.experts()
        self.plan()
        dataset = self.ingest()
        run, places = self.run, places_of(self.run, dataset)
        with self._timed("distill"):
            self.storage.fetch(places.phases, _no_curve)
            method = methods.method_of(run)
            for p in range(len(run.distill.phases)):
                method.begin(p, lambda: prepared_split(self._item(dataset), "train"), places.phase(p))
        return places

    def distill(self) -> list[Path]:
        """Distil the phases that are not finished; returns their folders."""
        places = self.begin_phases()
        run, dataset = self.run, self.ingest()
        with self._timed("distill"):
            todo = [p for p in range(len(run.distill.phases)) if not is_made(run, places, p)]
            items = [replace(self._item(dataset), number=p) for p in todo]
            totals = {f"phase {p}": run.distill.phases[p].iterations for p in todo}
            here = InTurn(run.runtime.threads)  # for what has others do its parts
            method = methods.method_of(run)
            if not method.iterates:
                make = functools.partial(generate, tools=Tools(self.executor, self.encoders, self.ranks, self.progress))
                self._map("phases", make, items, totals, here)
            elif method.draws > 1:
                shared = functools.partial(shared_phase, ranks=self.ranks, draws=method.draws, say=self.progress.say)
                self._map("phases", shared, items, totals, here)
            else:
                self._map("phases", phase, items, totals)
            self.storage.fetch(places.phases, _no_curve)
        return [places.phase(p) for p in range(len(run.distill.phases))]

    def evaluate(self) -> dict[str, Any]:
        """Choose on val, train students, read test once; returns and writes `evaluation.json`."""
        self.distill()
        dataset = self.ingest()
        run, rule = self.run, self.run.evaluate
        candidates = candidates_of(run)
        facts = self.probes()
        with self._timed("evaluate"):
            select = protocol.selection_jobs(run, len(candidates)) if len(candidates) > 1 else []
            tune = protocol.tuning_jobs(run)
            recipe = scores.choices(run) if rule.scores else []
            tried_all = self._students(dataset, "choices on val", select + tune + recipe, candidates)
            rates = scores.chosen_rates(list(zip(recipe, tried_all[len(select + tune) :], strict=True)))
            chosen = len(candidates) - 1
            curve: dict[int, float] = {}
            if select:
                best, curve = protocol.best_by_val([(j.snapshot, r) for j, r in zip(select, tried_all, strict=False)])
                chosen = best if rule.selection == "val_best" else chosen
            (loss, lr), tried = protocol.best_by_val(
                [((j.loss, j.lr), r) for j, r in zip(tune, tried_all[len(select) :], strict=False)]
            )
            experts = Store.open(places_of(run, dataset).store).complete()[: run.experts.num]
            final = protocol.final_jobs(run, loss, lr, experts)
            final += scores.finals(run, rates) if rule.scores else []
            taught = self._students(dataset, "students", final, [candidates[chosen]] * len(candidates))
            rows = list(zip(final, taught, strict=True))
            paths = {j: record(replace(self._item(dataset), job=j)) for j in final if j.kind != "reference"}
            ranks = {job: records.ranks_of(path, self.storage) for job, path in paths.items()}
        by_kind = summary.by_kind(rows)
        table = summary.table_of(run.distill.method_name, by_kind, facts)
        evaluation = {
            "table": table,
            **({"probes": facts} if facts else {}),
            "diverged": {kind: sum("diverged" in r for r in rs) for kind, rs in by_kind.items()},
            "galleries": {s: prepared_split(self._item(dataset), s).split.facts() for s in ("train", "val", "test")},
            "spread": "sample standard deviation over students (distilled), draws (random) and experts (full)",
            **summary.choices(run, candidates, chosen, curve, (loss, lr), tried),
            "student_curves": [r["curve"] for r in by_kind["student"]],
        }
        width = prepared_split(self._item(dataset), "val").texts.shape[1]
        evaluation |= summary.beside(run, table, rows, ranks, width)
        if rule.scores:
            evaluation["scores"] = scores.result(run, ranks, rates)
        write_json(self.folder / "evaluation.json", evaluation)
        self.cost()
        return evaluation

    def health(self) -> dict[str, Any]:
        """See the sets over the distillation through the first expert; returns and writes `health.json`."""
        self.distill()
        with self._timed("health"):
            self._map("health", checkup, [self._item(self.ingest())], {"health": 1})
            self.storage.fetch(self.folder / HEALTH)
        found = read_json(self.folder / HEALTH)
        for told in found["warnings"]:
            self.progress.say(f"warning: modality collapse? {told}")
        return found

    def cost(self) -> dict[str, Any]:
        """What the run has cost by the clock up to now; returns and writes `cost.json`.

        It lies apart from `evaluation.json`, which a run that was killed and resumed gives to the bit.
        """
        places = places_of(self.run, self.ingest())
        logs = [places.phase(p) / "metrics.jsonl" for p in range(len(self.run.distill.phases))]
        found = summary.clocks(self.run, logs, stored_bytes(places.store), self.all_seconds())
        write_json(self.folder / "cost.json", found)
        return found

    def probes(self) -> dict[str, dict[str, Any]]:
        """Ingest and embed what `evaluate.probes` ask of the final students; returns the facts about each."""
        facts: dict[str, dict[str, Any]] = {}
        for name in self.run.evaluate.probes:
            with self._timed("probes"):
                readers = watched(self.progress, f"ingest {name}", "pairs", self.readers)
                encoders = watched(self.progress, f"embed {name}", "captions", self.encoders)
                facts[name] = prepare(self.run, name, self.ingest(), readers, encoders)
            for line in remarks(name, facts[name]):
                self.progress.say(line)
        return facts

    def export(self) -> Path:
        """Write the distilled set with its numbers; returns its folder."""
        evaluation = self.evaluate()
        dataset = self.ingest()
        with self._timed("export"):
            item, iterations = self._item(dataset), evaluation["iterations"]
            distilled = assemble(
                self.run,
                prepared_split(item, "train"),
                [item.places.set(p, i) for p, i in enumerate(iterations)],
                experts=item.places.store.name,
                iterations=iterations,
                metrics=evaluation["table"],
                version=VERSION,
            )
            export(distilled, self.folder / "set", overwrite=True)
        return self.folder / "set"

    def report(self) -> Path:
        """Draw the page; returns its path."""
        from rmdd.report.page import write_report

        path, seen = self.export(), self.health()
        with self._timed("report"):
            page, places = self.folder / "report.html", places_of(self.run, self.ingest())
            found = read_json(self.folder / "evaluation.json")
            write_report(page, self.run, places, path, found, self.all_seconds(), seen)
        return page

    def all(self) -> Result:
        """Everything, in order."""
        page = self.report()
        return Result(self.folder / "set", page, read_json(self.folder / "evaluation.json"), self.all_seconds())

    def prepared_split(self, split: str) -> PreparedSplit:
        """A split with its embeddings."""
        return prepared_split(self.item(), split)

    def item(self) -> Item:
        """What a task of this run is given."""
        return self._item(self.ingest())

    def embedded(self, split: str) -> PreparedSplit:
        """Embed the captions of a split by the backend, where they are not; returns `prepared_split(split)`."""
        self._embed(self.ingest(), split)
        return self.prepared_split(split)

    # -- parts ---------------------------------------------------------------------------------------------------

    def check_budget(self) -> None:
        """Raise `ValueError` (or warn, as configured) when the phases cost more than the budget."""
        message = over_budget(self.run)
        if message and (self.run.distill.budget_check == "error" or not self.run.distill.phases):
            raise ValueError(message)
        if message:
            self.progress.say(f"warning: {message}")

    def all_seconds(self) -> dict[str, float]:
        """Wall seconds per step, added up over all sittings of this run."""
        return read_json(self.folder / "seconds.json") if (self.folder / "seconds.json").is_file() else {}

    def _item(self, dataset: Dataset) -> Item:
        places = places_of(self.run, dataset)
        return Item(self.run, places, places.phases.name)

    def _bind(self, dataset: Dataset) -> None:
        """Refuse a run folder that was begun with other data."""
        path = self.folder / "data.json"
        if path.is_file() and read_json(path)["data_hash"] != dataset.hash:
            raise ValueError(
                f"{self.folder} was begun with other data (hash {read_json(path)['data_hash']}, now {dataset.hash}); "
                "give the run another name"
            )
        write_json(path, {"data_hash": dataset.hash, "path": str(dataset.path)})

    def _embed(self, dataset: Dataset, split: str) -> None:
        """Embed the captions of a split into the cache, where they are not."""
        run = self.run
        embed(
            SplitCaptions(dataset, split, run.data),
            run.model.text,
            places_of(run, dataset).cache,
            device=str(device_of(run.runtime)),
            threads=run.runtime.threads,
            stream=watched(self.progress, f"embed {split}", "captions", self.encoders),
        )

    def _students(
        self, dataset: Dataset, title: str, jobs: list[Job], candidates: list[tuple[int, ...]]
    ) -> list[dict[str, Any]]:
        item = self._item(dataset)
        items = [replace(item, job=job, iterations=candidates[job.snapshot]) for job in jobs]
        return self._map(title, student, items, dict.fromkeys([job.name for job in jobs], 1))

    def _train(self, items: list[Item]) -> None:
        """Train experts, failed ones again after the others; raises `RuntimeError` naming all that are given up."""
        executor = self.fleet(items[0].places.store.name) if self.fleet and items else None
        given_up: dict[str, list[str]] = {}
        for left in reversed(range(self.run.runtime.max_restarts + 1)):
            totals = {f"expert {item.number}": self.run.experts.epochs for item in items}
            results = self._map("experts", Spared(expert), items, totals, executor)
            failed = [(item, r) for item, r in zip(items, results, strict=True) if isinstance(r, Failed)]
            items = [item for item, r in failed if r.again and left]
            for item, r in failed:
                if item not in items:
                    given_up.setdefault(f"on {r.host}: {r.reason}", []).append(str(item.number))
        if given_up:
            lines = "".join(f"\n  expert {', '.join(numbers)} {reason}" for reason, numbers in given_up.items())
            raise RuntimeError(
                f"{sum(map(len, given_up.values()))} expert(s) could not be trained; the others are:{lines}"
            )

    def _map(
        self, title: str, task: Task, items: list[Item], totals: dict[str, int], executor: Mapper | None = None
    ) -> list[Any]:
        """Results in order; `totals` names the items and says how much each has to do."""
        if not items:
            return []
        with self.progress.stage(title, totals) as update:
            results = (executor or self.executor).map(task, items, list(totals), update)
        if any(r is False for r in results):
            raise Interrupted
        return results

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            total = self.all_seconds()
            total[step] = round(total.get(step, 0.0) + time.perf_counter() - began, 2)
            write_json(self.folder / "seconds.json", total)


def _records(name: str) -> bool:
    """What the driver reads of a store: all but the experts' parameters."""
    return _no_curve(name) and (not name.endswith(".safetensors") or name.endswith("/theta-0.safetensors"))


def _no_curve(name: str) -> bool:
    return not is_curve(name)


@contextlib.contextmanager
def open_pipeline(run: config.Run, progress: Progress | None = None) -> Iterator[Pipeline]:
    """A pipeline with the backend that `runtime` describes."""
    progress = progress or Progress()
    folder = run_folder(run)
    with hold_folders(run.runtime, folder), open_backend(run.runtime, folder / "events.jsonl", progress) as backend:
        yield Pipeline.of(run, backend, progress)


def run(run: config.Run, progress: Progress | None = None) -> Result:
    """Do a whole run and return what it left. Going on after an interruption is calling it again."""
    with open_pipeline(run, progress) as pipeline:
        return pipeline.all()
