"""Probes of a run: prepared once by the driver, then answered by every final student.

What a probe asks lies in `probes/NAME.json` of the run's folder, its pictures in a dataset that `ingest` wrote, its
embedded sentences in the cache. The scores of a student lie beside its record under the hash of what was asked, and its
weights beside them: other probes ask it again without training it anew.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rmdd import config
from rmdd.config.probes import VIEW, Probe, prefix_data_fields
from rmdd.core.device import device_of
from rmdd.core.files import read_json, write_json
from rmdd.core.storage import Storage, open_storage, run_folder
from rmdd.core.tensors import Damaged, load_checked, save_checked
from rmdd.data import sources
from rmdd.data.images import normalisation
from rmdd.data.ingest import ingest, shaping
from rmdd.data.inputs import absolute, input_path, is_remote
from rmdd.data.layouts import alternatives
from rmdd.data.shards import Dataset
from rmdd.data.source import SampleSource
from rmdd.data.sources import cocoqa, textcaps
from rmdd.data.splits import Split, load_split
from rmdd.evaluate import students
from rmdd.evaluate.probes import vqa, zero_shot
from rmdd.evaluate.protocol import Job
from rmdd.evaluate.retrieval import chance
from rmdd.evaluate.students import Diverged
from rmdd.execution.tasks import Stream, sequential_stream
from rmdd.models.dual import DualEncoder, build
from rmdd.models.image import normalisation_of
from rmdd.models.prepared import PreparedSplit
from rmdd.models.text import embed, text_width

VERSION = 1
"""Part of the hash of what is asked; raised when a change of the code moves the scores of an unchanged probe."""

PROBED = ("student", "baseline", "full")
"""Kinds of jobs that are probed: those that choose nothing."""

ASKING: dict[str, ModuleType] = {"zero_shot": zero_shot, "vqa": vqa}
RECALLS = [f"{side}R@{k}" for side in "IT" for k in (1, 5, 10)] + ["R@mean"]
LOOKED_AT = 64
"""Pictures that are looked for before anything starts."""

_AS_WRITTEN = config.Captions(lowercase=False, strip_punctuation=False, max_words=None)


def data_of(data: config.Data, probe: Probe) -> Any:
    """The probe's data as a run with `data` sees it.

    The captions of labelled pictures are their classes, kept as they are.
    """
    view = {field: getattr(data, field) for field in VIEW}
    if probe.kind != "retrieval":
        view["captions"] = _AS_WRITTEN
    root = absolute(probe.data.root) if probe.data.root else None
    return probe.data.model_copy(update=view | {"root": root})


def faults(data: config.Data, probes: Mapping[str, Probe]) -> list[str]:
    """What stops a probe of a run with `data`, as far as its files show without opening a picture."""
    mistakes = []
    for name, probe in probes.items():
        try:
            _look(data, probe)
        except (ValueError, OSError) as error:
            mistakes.append(prefix_data_fields(name, str(error)))
    return mistakes


def _look(of_run: config.Data, probe: Probe) -> None:
    data = data_of(of_run, probe)
    if isinstance(probe, config.ZeroShot):
        zero_shot.templates(probe.templates)
    if data.source == "dataset":
        if not Dataset.open(data.root).counts[probe.split]["pairs"]:  # type: ignore[union-attr]
            raise ValueError(f"the dataset at {data.root} has no pair in the split that is asked for")
        return
    source = sources.find(data)
    if isinstance(source, SampleSource):
        if not source.files(data):
            raise ValueError(f"{data.root} holds no file that data.{data.source}.files names")
        return
    rows, _ = source.rows(data)
    if isinstance(probe, config.Vqa):
        cocoqa.read(data, "train")
    first = list(dict.fromkeys(itertools.islice((row.image for row in rows if row.drawing is None), LOOKED_AT)))
    there = (input_path(data.root) / path for image in first for path in alternatives(str(image), data.layout))
    if first and not is_remote(data.root) and not any(path.is_file() for path in there):
        raise ValueError(f"of the first {len(first)} pictures none is there, such as {first[0]}; correct data.root")


def costs(data: config.Data, probes: Mapping[str, Probe], width: int) -> list[str]:
    """What embedding the sentences of large probes takes."""
    lines = []
    for name, probe in probes.items():
        if isinstance(probe, config.Vqa):
            own = data_of(data, probe)
            answers = {q.answer for split in ("train", "test") for q in cocoqa.read(own, split)}
            total = len({q.question for q in cocoqa.sampled_questions(own)}) * len(answers)
            lines.append(
                f"probe {name} embeds {total:,} sentences, {4 * width * total / 2**30:.1f} GiB in the cache; "
                f"evaluate.probes.{name}.data.cocoqa.questions takes fewer"
            )
    return lines


def prepare(
    run: config.Run,
    name: str,
    train: Dataset | None,
    readers: Stream = sequential_stream,
    encoders: Stream = sequential_stream,
) -> dict[str, Any]:
    """Ingest and embed what probe `name` asks, and write it down for the students; returns the facts about it.

    `train` is the dataset of the distillation, if known, whose train pictures are looked for among the probe's. Raises
    `ValueError` for files that cannot be read, and when no picture is left.
    """
    probe, storage = run.evaluate.probes[name], open_storage(run.runtime)
    data = data_of(run.data, probe)
    try:
        if data.source == "dataset":
            dataset = Dataset.open(data.root)
        else:
            value = config.hash_value({"data": shaping(data), "root": data.root or ""})
            dataset = ingest(data, storage.root / "data" / value, readers, run.runtime)
        split = load_split(dataset, _split(probe), data, storage.root / "cache")
        if not len(split):
            why = f"{dataset.path / 'quarantine.jsonl'} says why: {dataset.manifest['quarantine']}"
            raise ValueError(f"no picture of split '{_split(probe)}' can be used; {why}")
        trained_on = None if train is None else frozenset(vqa.picture(p) for (p,) in train.columns("train", "pair_id"))
        questions, facts = _questions(run.data.captions, probe, data, split, trained_on)
    except ValueError as error:
        raise ValueError(prefix_data_fields(name, str(error))) from error
    split.images  # noqa: B018  # decoded once here, before every worker would
    for block in _sentences(probe, questions, split):
        cache, device = storage.root / "cache", str(device_of(run.runtime))
        embed(block, run.model.text, cache, device=device, threads=run.runtime.threads, stream=encoders)
    facts = {
        "kind": probe.kind,
        "pictures": len(split),
        "data_hash": dataset.hash,
        "quarantine": dataset.manifest["quarantine"],
    } | facts
    key = config.hash_value({"version": VERSION, "kind": probe.kind, "data": dataset.hash, "asked": questions})
    inside = dataset.path.is_relative_to(storage.root)
    path = dataset.path.relative_to(storage.root) if inside else dataset.path
    prepared = {"key": key, "dataset": str(path), "asked": questions, "facts": facts}
    write_json(_file(run_folder(run), name), {"schema_version": 1, **prepared})
    return facts


def probe(
    model: DualEncoder,
    run: config.Run,
    name: str,
    device: torch.device,
    alive: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """What `model` scores in probe `name`, which `prepare` prepared, in percent; 0 where its embeddings collapsed.

    `alive` is called now and then. The model is left in the mode it was in.
    """
    wanted, storage = run.evaluate.probes[name], open_storage(run.runtime)
    prepared_probe = _prepared(run_folder(run), name, storage)
    path, questions = storage.root / prepared_probe["dataset"], prepared_probe["asked"]
    storage.fetch(path)
    data, cache = data_of(run.data, wanted), storage.root / "cache"
    split = load_split(Dataset.open(path), _split(wanted), data, cache)
    constants = (
        normalisation_of(run.model.image) if run.data.normalise == "tower" else normalisation(run.data.normalise)
    )

    def embedded(texts: list[str]) -> Any:
        return embed(texts, run.model.text, cache, device=str(device))

    was_training, chunk = model.training, run.evaluate.chunk
    model.eval()
    try:
        if isinstance(wanted, config.Retrieval):
            prepared = PreparedSplit(split, embedded(split.captions), *constants)
            return students.score(model, prepared, device, chunk).as_dict()
        score = ASKING[wanted.kind].score
        scores: dict[str, float] = score(model, questions, split, constants, embedded, device, chunk, alive)
        return scores
    except Diverged:
        return dict.fromkeys(_metrics(wanted, questions), 0.0)
    finally:
        model.train(was_training)


class Probing:
    """The probes of one student, whose record lies at `record` and is of `value`; none for one that chooses."""

    def __init__(self, run: config.Run, job: Job, record: Path, value: str, storage: Storage):
        self.run, self.index, self.value = run, job.index, value
        self.scores: dict[str, dict[str, float]] = {}
        self.files: dict[str, Path] = {}
        self.weights = record.with_name(f"{record.stem}.trained.safetensors")
        for name in run.evaluate.probes if job.kind in PROBED else ():
            key = _prepared(run_folder(run), name, storage)["key"]
            file = self.files[name] = record.with_name(f"{record.stem}.probe-{key}.json")
            storage.fetch(file)
            if file.is_file() and (answers := read_json(file))["value"] == value:
                self.scores[name] = answers["scores"]
        if self.missing:
            storage.fetch(self.weights)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.files if name not in self.scores]

    def restored(self) -> DualEncoder | None:
        """The student as it was kept."""
        if not self.weights.is_file():
            return None
        try:
            params, facts = load_checked(self.weights, "student")
        except Damaged:
            return None
        if facts["value"] != self.value:
            return None
        run = self.run
        width, seed = text_width(run.model.text), run.seed_of("evaluate")
        model = build(run.model, width, run.data.image_size, seed, "student", self.index)
        model.load_trained({name: params[name] for name in model.trained() if name in params})
        return model

    def keep(self, model: DualEncoder) -> None:
        """Write the student down for probes to come."""
        if self.files:
            save_checked(self.weights, model.trained(), "student", {"value": self.value})

    def ask(self, model: DualEncoder | None, device: torch.device, alive: Callable[[], object]) -> None:
        """Score what is missing; a student that diverged in training, None, scores 0."""
        for name in self.missing:
            if model is None:
                questions = read_json(_file(run_folder(self.run), name))["asked"]
                scores = dict.fromkeys(_metrics(self.run.evaluate.probes[name], questions), 0.0)
            else:
                scores = probe(model.to(device), self.run, name, device, alive)
            self.scores[name] = scores
            write_json(self.files[name], {"value": self.value, "name": name, "scores": scores})

    def added_to(self, record: dict[str, Any]) -> dict[str, Any]:
        return record | {"probes": {name: self.scores[name] for name in self.files}} if self.files else record


def remarks(name: str, facts: dict[str, Any]) -> list[str]:
    """What a person should know before reading the scores."""
    lines = [f"probe {name}: {facts['pictures']} pictures"]
    if lost := facts["quarantine"]:
        lines.append(f"probe {name}: left out {', '.join(f'{n} {reason}' for reason, n in lost.items())}")
    if (both := facts.get("overlap")) and both["pictures"]:
        lines.append(f"probe {name}: {both['pictures']} of its pictures are in the train split, which was distilled")
    if facts.get("duplicate_names"):
        lines.append(f"probe {name}: {facts['duplicate_names']} classes share a name with another; they tie and miss")
    if "note" in facts:
        lines.append(f"probe {name}: {facts['note']}")
    return lines


def _questions(
    captions: config.Captions, probe: Probe, data: Any, split: Split, trained_on: frozenset[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked, and what stands beside the scores."""
    if isinstance(probe, config.ZeroShot):
        questions = zero_shot.ask(probe, data, captions, split)
        return questions, zero_shot.facts(questions)
    if isinstance(probe, config.Vqa):
        questions = vqa.ask(probe, data, captions, split, trained_on)
        return questions, vqa.facts(questions)
    facts: dict[str, Any] = {
        "split": probe.split,
        "gallery": split.facts(),
        "caption_rule": data.captions.model_dump(),
        "chance": chance(torch.from_numpy(split.image_of)).as_dict(),
    }
    if trained_on is not None:
        both = sum(vqa.picture(pair_id) in trained_on for pair_id in split.pair_ids)
        facts["overlap"] = {"pictures": both, "share": both / len(split)}
    if "textcaps" in (data.source, data.layout) and data.annotations is None and probe.split == "test":
        facts["note"] = textcaps.NOTE
    return {"split": probe.split, "captions": data.captions.model_dump(), "limit": data.eval_limit}, facts


def _sentences(probe: Probe, questions: dict[str, Any], split: Split) -> Any:
    return [split.captions] if probe.kind == "retrieval" else ASKING[probe.kind].sentences(questions)


def _metrics(probe: Probe, questions: dict[str, Any]) -> list[str]:
    return RECALLS if probe.kind == "retrieval" else ASKING[probe.kind].metrics(questions)


def _split(probe: Probe) -> str:
    return probe.split if isinstance(probe, config.Retrieval) else "test"


def _file(folder: Path, name: str) -> Path:
    """What probe `name` asks, in the folder of a run."""
    return folder / "probes" / f"{name}.json"


def _prepared(folder: Path, name: str, storage: Storage) -> dict[str, Any]:
    file = _file(folder, name)
    storage.fetch(file)
    questions: dict[str, Any] = read_json(file)
    return questions
