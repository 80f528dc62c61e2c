"""`rmdd train`: train one student on a distilled set, random pairs, a coreset or all pairs, and keep it as a model.

Student i of a set has the same weights as student i of the evaluation of its run. For random pairs and coresets, loss
and learning rate are chosen on val, as in `rmdd compare`. The model of all pairs is an expert after its last epoch.
Test is never read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rmdd import config
from rmdd.comparisons.compare import Load
from rmdd.comparisons.engine import FOLDER, ComparedRun, choose
from rmdd.comparisons.entries import Entry, open_entry, source_run, with_planned_phases
from rmdd.comparisons.probe_set import encoder_mistakes
from rmdd.config.probes import VIEW
from rmdd.core.device import device_of, local_device
from rmdd.core.layout import locate_file
from rmdd.core.progress import Progress
from rmdd.core.storage import is_uri, root_of, run_folder
from rmdd.core.threads import torch_threads
from rmdd.data.shards import MANIFEST, Dataset
from rmdd.evaluate.protocol import Job, StudentProtocol, new_student, training_of
from rmdd.evaluate.students import TrainingPairs, score
from rmdd.evaluate.training_pairs import enlarged_to, pairs_of_set
from rmdd.execution.backend import Backend, hold_folders, open_backend
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit, SplitSource
from rmdd.models.text import encoder_identity, text_width
from rmdd.retrieval.model import RetrievalModel, check_replaceable
from rmdd.runs.items import trained_expert
from rmdd.runs.paths import dataset_folder
from rmdd.runs.students import training_pairs

KINDS = {"set": "distilled set", "random": "random pairs", "subset": "coreset", "full": "all training pairs"}


@dataclass(frozen=True)
class Training:
    """The training of one model; its arguments were checked."""

    run: config.Run
    """Run whose data, towers and student protocol are used."""
    entry: Entry
    """The training pairs."""
    student: int
    """Number of the student, random draw or expert, from 0."""

    @property
    def folder(self) -> Path:
        """The folder of the model if the user names none; its name ends in a hash of all that shapes the model."""
        kind, entry = {"full": "all", "subset": self.entry.method}.get(self.entry.kind, self.entry.kind), self.entry
        value = config.hash_value([entry.kind, entry.value, entry.pairs, self.run.hash_of(), self.student])[:8]
        return root_of(self.run.runtime) / "models" / f"{self.run.name}-{kind}-{value}"

    def execute(self, out: Path | None = None, progress: Progress | None = None) -> RetrievalModel:
        """Train the model, score it on val if the data of the run is there, and save it; return the saved model."""
        progress, out = progress or Progress(), out or self.folder
        check_replaceable(out)
        if device_of(self.run.runtime) != local_device(self.run.runtime):
            progress.say("this machine has no GPU, so the student trains on the CPU")
        if self.entry.kind == "set":
            return self._on_set(progress).save(out)
        work = self.run.runtime, root_of(self.run.runtime) / FOLDER / f"{self.folder.name}-train"
        with hold_folders(*work), open_backend(work[0], work[1] / "events.jsonl", progress) as backend:
            return self._on_real_pairs(work[1], backend, progress).save(out)

    def _on_set(self, progress: Progress) -> RetrievalModel:
        set_ = self.entry.distilled
        assert set_ is not None
        subsets, constants = enlarged_to(self.run.data.image_size, pairs_of_set(set_)), (set_.mean, set_.std)
        rule, job = StudentProtocol.of(self.run), Job("student", self.student)
        data = set_.provenance.get("data")
        facts = {"pairs": set_.num_pairs, "method": set_.method, "loss": rule.loss, "set": self.entry.value}
        facts["data_hash"] = data_hash = data.get("hash") if isinstance(data, Mapping) else None
        encoder = self._student(job, rule, subsets, constants, progress)
        return self._model(encoder, constants, facts, self._val_of(data_hash))

    def _on_real_pairs(self, work: Path, backend: Backend, progress: Progress) -> RetrievalModel:
        pipeline = ComparedRun(self.run, backend, progress, work / "protocol", splits=("train", "val"))
        if wrong := pipeline.check([self.entry]):
            raise config.ConfigError(wrong, "train")
        pipeline.embed()
        val, data_hash = pipeline.prepared_split("val"), pipeline.ingest().hash
        if self.entry.kind == "full":
            pipeline.experts()
            encoder = trained_expert(pipeline.item(), self.student, pipeline.storage)
            pairs = pipeline.ingest().counts["train"]["pairs"]
            pairs = min(pairs, self.run.data.limit_of("train") or pairs)
            facts: dict[str, Any] = {"pairs": pairs, "loss": "infonce", "epochs": self.run.experts.epochs}
            return self._model(encoder, (val.mean, val.std), facts | {"data_hash": data_hash}, val)
        row = pipeline.row(self.entry.name, self.entry)
        chosen, errors = choose([row], backend, progress)
        if errors:
            raise RuntimeError(f"no loss and rate could be chosen on val: {errors[id(row)]}")
        rule = chosen[id(row)]
        job = Job("baseline", self.student, loss=rule["loss"], lr=rule["lr"])
        subsets = training_pairs(replace(row.item(job), job=job), pipeline.storage)
        encoder = self._student(job, StudentProtocol.of(row.run), subsets, (val.mean, val.std), progress)
        facts = {"pairs": len(subsets[0].images), "method": self.entry.method, "loss": job.loss, "lr": job.lr}
        return self._model(encoder, (val.mean, val.std), facts | {"data_hash": data_hash}, val)

    def _student(
        self,
        job: Job,
        rule: StudentProtocol,
        subsets: Sequence[TrainingPairs],
        constants: tuple[Sequence[float], Sequence[float]],
        progress: Progress,
    ) -> DualEncoder:
        """Train the student of `job` in this process, with the threads and the device of the run; return the model."""
        training, runtime = training_of(job, rule, subsets, *constants), self.run.runtime
        model = new_student(job, rule, subsets, local_device(runtime))
        name, epochs = f"student {job.index}", training.schedule.epochs
        with torch_threads(runtime.threads), progress.stage("training", {name: training.passes}) as update:
            training.train(model, lambda stage, passes: update(name, {"done": stage * epochs + passes}))
        return model

    def _model(
        self,
        encoder: DualEncoder,
        constants: tuple[Sequence[float], Sequence[float]],
        facts: dict[str, Any],
        val: PreparedSplit | None,
    ) -> RetrievalModel:
        run, scores = self.run, {}
        device = local_device(run.runtime)
        if val is not None:
            with torch_threads(run.runtime.threads):
                scores["val"] = score(encoder.to(device), val, device, run.evaluate.chunk).as_dict()
        facts = {"kind": KINDS[self.entry.kind], **facts, "student": self.student}
        width, identity = text_width(run.model.text), encoder_identity(run.model.text)
        return RetrievalModel(encoder.to(device), run.model, run.data, *constants, width, identity, facts, scores)

    def _val_of(self, data_hash: str | None) -> PreparedSplit | None:
        """Return the val split of the set's source data; None if this machine has not ingested that data."""
        run, folder = self.run, dataset_folder(self.run)
        if not (folder / MANIFEST).is_file():
            return None
        dataset = Dataset.open(folder)
        if dataset.hash != data_hash or not dataset.counts["val"]["pairs"]:
            return None
        cache = root_of(run.runtime) / "cache"
        return SplitSource(folder, cache, run.data, run.model, local_device(run.runtime)).open("val")


def train(
    source: config.Source,
    on: str | Path = "set",
    overrides: Iterable[str] = (),
    *,
    student: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> RetrievalModel:
    """Train a retrieval model and save it in the folder `out` (default: a folder below `models` of the storage).

    `source` is the folder of a distilled set or of a run, or a run as `rmdd.load_config` accepts it. `on` names the
    training pairs: `set`, `random`, `random:N`, `all`, or the folder of a coreset. `student` is the number of the
    student: student i of a set has the same weights as student i of the evaluation of its run.

    >>> rmdd.train("runs/demo-0123abcd")  # doctest: +SKIP

    A set can be trained on without its data. If the data is there, `scores` of the model has its recalls on val.
    """
    training = prepare_training(source, str(on), list(overrides), student)
    return training.execute(None if out is None else Path(out), progress)


def prepare_training(
    source: config.Source, on: str, overrides: list[str], student: int = 0, load: Load = config.load
) -> Training:
    """Open the training pairs of a model and load its run. Raises `ConfigError` for a mistake in the arguments."""
    entry, raw = _opened(source, overrides, load)
    if on != "set":
        run = load(raw, overrides)
        if on == "all":
            run = run.model_copy(update={"experts": run.experts.model_copy(update={"num": student + 1})})
            return Training(run, Entry("all", "full", "all"), student)
        pairs = _entry(on)
        if pairs.kind not in ("random", "subset"):
            raise config.ConfigError(
                [f"--on {on}: give set, random, random:N, all or the folder of a coreset"], "train"
            )
        return Training(with_planned_phases(run, "train"), pairs, student)
    if entry is None or entry.distilled is None:
        mistake = (
            f"{run_folder(load(raw, overrides))} has no distilled set yet; start its run, or give --on random or all"
        )
        raise config.ConfigError([mistake], "train")
    if wrong := [o for o in overrides if o.startswith(("model.", "data.image_size"))]:
        mistake = (
            f"--set {wrong[0]}: a set fits the towers that it was made for; `rmdd transfer` trains other towers. "
            "To use the set of a run that was started with this option, give the run's folder instead of its run file"
        )
        raise config.ConfigError([mistake], "train")
    assert isinstance(raw, Mapping)
    unknown = raw["data"].get("root") is None and raw["data"]["source"] != "scenes"
    if unknown and not any(o.startswith("data.") for o in overrides):  # the set came alone, and needs no data
        raw = {**raw, "data": {name: raw["data"][name] for name in VIEW}}
    run = load(raw, overrides)
    if mistakes := encoder_mistakes(entry.distilled, run.model.text):
        raise config.ConfigError(mistakes, "train")
    return Training(run, entry, student)


def _opened(source: config.Source, overrides: list[str], load: Load) -> tuple[Entry | None, config.Source]:
    """Return the distilled set at `source` (None without a set), and the run file, folder or mapping of its run."""
    if not isinstance(source, str | Path) or not (is_uri(str(source)) or Path(source).expanduser().is_dir()):
        run = load(source, overrides)
        if not (run_folder(run) / "set" / "set.json").is_file():
            return None, source
        source = run_folder(run)
    storage, file = locate_file(str(source), "run.yaml", depth=1)
    try:
        entry = _entry(str(source))
    except config.ConfigError:
        if not file.is_file() or (file.parent / "set" / "set.json").is_file():
            raise
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))  # the run has no set yet
        return None, raw | {"runtime": raw["runtime"] | {"storage": storage}}
    described = source_run(entry)
    if described is None:
        raise config.ConfigError([f"{source} is no run or distilled set of rmdd; give the folder of one"], "train")
    return entry, described


def _entry(word: str) -> Entry:
    try:
        return open_entry(word)
    except (ValueError, OSError) as error:
        raise config.ConfigError([f"{word}: {error}"], "train") from error
