"""Probes of a run: extra evaluation tasks, prepared once by the main process and then scored for all final students.

Preparing a probe writes a description to `probes/NAME.json` in the run's folder, the probe's images to a dataset, and
its embedded sentences to the cache. A student's scores are saved next to its record, in a file named by the probe's
hash. The student's weights are saved there too, so that probes added later need no training.
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
"""Version of the probe code, part of each probe's hash. Increase it when a change of the code changes scores."""

PROBED_KINDS = ("student", "baseline", "full")
"""Kinds of jobs whose students are scored on probes; students that only serve to choose a setting on val are not."""

PROBE_MODULES: dict[str, ModuleType] = {"zero_shot": zero_shot, "vqa": vqa}
RECALLS = [f"{side}R@{k}" for side in "IT" for k in (1, 5, 10)] + ["R@mean"]
CHECKED_IMAGES = 64
"""Number of image files per probe whose existence is checked before a run starts; at least one must exist."""

_UNCHANGED = config.Captions(lowercase=False, strip_punctuation=False, max_words=None)


def data_of(data: config.Data, probe: Probe) -> Any:
    """Return the data settings of `probe`, with the image size and preprocessing of the run's `data`.

    Captions of labelled images are class names and are not cleaned.
    """
    view = {field: getattr(data, field) for field in VIEW}
    if probe.kind != "retrieval":
        view["captions"] = _UNCHANGED
    root = absolute(probe.data.root) if probe.data.root else None
    return probe.data.model_copy(update=view | {"root": root})


def probe_dataset(run_data: config.Data, probe: Probe, storage: Path) -> Path:
    """Return the folder of the dataset of a probe; a dataset made by `ingest` is named by a hash of its settings."""
    data = data_of(run_data, probe)
    if data.source == "dataset":
        return Path(data.root)
    return storage / "data" / config.hash_value({"data": shaping(data), "root": data.root or ""})


def faults(data: config.Data, probes: Mapping[str, Probe]) -> list[str]:
    """Return an error message for each probe whose data files are missing, empty or invalid; no image is opened."""
    mistakes = []
    for name, probe in probes.items():
        try:
            _check_files(data, probe)
        except (ValueError, OSError) as error:
            mistakes.append(prefix_data_fields(name, str(error)))
    return mistakes


def _check_files(run_data: config.Data, probe: Probe) -> None:
    """Raise `ValueError` or `OSError` if the data files of `probe` are missing, invalid or empty."""
    data = data_of(run_data, probe)
    if isinstance(probe, config.ZeroShot):
        zero_shot.templates(probe.templates)
    if data.source == "dataset":
        if not Dataset.open(data.root).counts[probe.split]["pairs"]:  # type: ignore[union-attr]
            raise ValueError(
                f"split '{probe.split}' of the dataset at {data.root} has no pairs; set another split"  # type: ignore[union-attr]
            )
        return
    source = sources.find(data)
    if isinstance(source, SampleSource):
        if not source.files(data):
            raise ValueError(f"{data.root} has no file that matches data.{data.source}.files; correct either")
        return
    rows, _ = source.rows(data)
    if isinstance(probe, config.Vqa):
        cocoqa.read(data, "train")
    names = itertools.islice((row.image for row in rows if row.drawing is None), CHECKED_IMAGES)
    first = list(dict.fromkeys(names))
    paths = (input_path(data.root) / path for image in first for path in alternatives(str(image), data.layout))
    if first and not is_remote(data.root) and not any(path.is_file() for path in paths):
        raise ValueError(
            f"the first {len(first)} images are all missing, for example {first[0]}; set data.root to their folder"
        )


def costs(data: config.Data, probes: Mapping[str, Probe], width: int) -> list[str]:
    """Return one line of text per VQA probe: how many sentences it embeds, and the size of their embeddings in GiB."""
    lines = []
    for name, probe in probes.items():
        if isinstance(probe, config.Vqa):
            probe_data = data_of(data, probe)
            answers = {q.answer for split in ("train", "test") for q in cocoqa.read(probe_data, split)}
            total = len({q.question for q in cocoqa.sampled_questions(probe_data)}) * len(answers)
            lines.append(
                f"probe {name} embeds {total:,} sentences, {4 * width * total / 2**30:.1f} GiB in the cache; "
                f"set evaluate.probes.{name}.data.cocoqa.questions to use fewer questions"
            )
    return lines


def prepare(
    run: config.Run,
    name: str,
    train: Dataset | None,
    readers: Stream = sequential_stream,
    encoders: Stream = sequential_stream,
) -> dict[str, Any]:
    """Ingest the images and embed the sentences of probe `name`; return the facts that are reported with its scores.

    `train` is the dataset that was distilled, if known; probe images that are also in its train split are counted.
    Raise `ValueError` if the probe's files cannot be read or none of its images can be used.
    """
    probe, storage = run.evaluate.probes[name], open_storage(run.runtime)
    data = data_of(run.data, probe)
    try:
        if data.source == "dataset":
            dataset = Dataset.open(data.root)
        else:
            dataset = ingest(data, probe_dataset(run.data, probe, storage.root), readers, run.runtime)
        split = load_split(dataset, _split(probe), data, storage.root / "cache")
        if not len(split):
            reasons = f"{dataset.path / 'quarantine.jsonl'} says why; count by reason: {dataset.manifest['quarantine']}"
            raise ValueError(f"no image of split '{_split(probe)}' can be used; {reasons}")
        trained_on = None if train is None else frozenset(vqa.picture(p) for (p,) in train.columns("train", "pair_id"))
        questions, facts = _questions(run.data.captions, probe, data, split, trained_on)
    except ValueError as error:
        raise ValueError(prefix_data_fields(name, str(error))) from error
    split.images  # noqa: B018  # decoded here once, so that the workers need not
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
    """Return the scores of `model` in percent on the prepared probe `name`; all 0 if the model's embeddings collapsed.

    `alive` is called regularly, so that the backend sees that this worker is alive. The train or eval mode of the model
    is restored.
    """
    rule, storage = run.evaluate.probes[name], open_storage(run.runtime)
    prepared_probe = _prepared(run_folder(run), name, storage)
    path, questions = storage.root / prepared_probe["dataset"], prepared_probe["asked"]
    storage.fetch(path)
    data, cache = data_of(run.data, rule), storage.root / "cache"
    split = load_split(Dataset.open(path), _split(rule), data, cache)
    constants = (
        normalisation_of(run.model.image) if run.data.normalise == "tower" else normalisation(run.data.normalise)
    )

    def embedded(texts: list[str]) -> Any:
        return embed(texts, run.model.text, cache, device=str(device))

    was_training, chunk = model.training, run.evaluate.chunk
    model.eval()
    try:
        if isinstance(rule, config.Retrieval):
            prepared = PreparedSplit(split, embedded(split.captions), *constants)
            return students.score(model, prepared, device, chunk).as_dict()
        score = PROBE_MODULES[rule.kind].score
        scores: dict[str, float] = score(model, questions, split, constants, embedded, device, chunk, alive)
        return scores
    except Diverged:
        return dict.fromkeys(_metrics(rule, questions), 0.0)
    finally:
        model.train(was_training)


class StudentProbes:
    """The probe scores of one student: read from disk if saved, otherwise computed by `score_missing`.

    `record` is the path of the student's record and `value` the hash of the student's settings. Students that only
    serve to choose a setting on val have no probe scores.
    """

    def __init__(self, run: config.Run, job: Job, record: Path, value: str, storage: Storage):
        self.run, self.index, self.value = run, job.index, value
        self.scores: dict[str, dict[str, float]] = {}
        self.files: dict[str, Path] = {}
        self.weights = record.with_name(f"{record.stem}.trained.safetensors")
        for name in run.evaluate.probes if job.kind in PROBED_KINDS else ():
            key = _prepared(run_folder(run), name, storage)["key"]
            file = self.files[name] = record.with_name(f"{record.stem}.probe-{key}.json")
            storage.fetch(file)
            if file.is_file() and (saved := read_json(file))["value"] == value:
                self.scores[name] = saved["scores"]
        if self.missing:
            storage.fetch(self.weights)

    @property
    def missing(self) -> list[str]:
        """Names of the probes on which this student has no saved scores."""
        return [name for name in self.files if name not in self.scores]

    def load_student(self) -> DualEncoder | None:
        """Return the student with its saved weights, or None if the file is missing, damaged or has a wrong hash."""
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

    def save_student(self, model: DualEncoder) -> None:
        """Save the weights of the student, so that probes added later need no training."""
        if self.files:
            save_checked(self.weights, model.trained(), "student", {"value": self.value})

    def score_missing(self, model: DualEncoder | None, device: torch.device, alive: Callable[[], object]) -> None:
        """Compute and save the missing probe scores; all are 0 if `model` is None, because the student diverged."""
        for name in self.missing:
            if model is None:
                questions = read_json(_file(run_folder(self.run), name))["asked"]
                scores = dict.fromkeys(_metrics(self.run.evaluate.probes[name], questions), 0.0)
            else:
                scores = probe(model.to(device), self.run, name, device, alive)
            self.scores[name] = scores
            write_json(self.files[name], {"value": self.value, "name": name, "scores": scores})

    def added_to(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the student's record `record` with the probe scores added."""
        return record | {"probes": {name: self.scores[name] for name in self.files}} if self.files else record


def remarks(name: str, facts: dict[str, Any]) -> list[str]:
    """Return lines of text about a probe's data: images used, images left out, overlap with train, and warnings."""
    lines = [f"probe {name}: {facts['pictures']} images"]
    if rejected := facts["quarantine"]:
        lines.append(f"probe {name}: left out {', '.join(f'{n} {reason}' for reason, n in rejected.items())}")
    if (overlap := facts.get("overlap")) and overlap["pictures"]:
        lines.append(f"probe {name}: {overlap['pictures']} of its images are in the train split, which was distilled")
    if facts.get("duplicate_names"):
        lines.append(
            f"probe {name}: {facts['duplicate_names']} classes share a name with another class; their images count as "
            "misses"
        )
    if "note" in facts:
        lines.append(f"probe {name}: {facts['note']}")
    return lines


def _questions(
    captions: config.Captions, probe: Probe, data: Any, split: Split, trained_on: frozenset[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data that affect the scores of a probe (such as classes and prompts), and the facts to report."""
    if isinstance(probe, config.ZeroShot):
        questions = zero_shot.task_of(probe, data, captions, split)
        return questions, zero_shot.facts(questions)
    if isinstance(probe, config.Vqa):
        questions = vqa.task_of(probe, data, captions, split, trained_on)
        return questions, vqa.facts(questions)
    facts: dict[str, Any] = {
        "split": probe.split,
        "gallery": split.facts(),
        "caption_rule": data.captions.model_dump(),
        "chance": chance(torch.from_numpy(split.image_of)).as_dict(),
    }
    if trained_on is not None:
        shared = sum(vqa.picture(pair_id) in trained_on for pair_id in split.pair_ids)
        facts["overlap"] = {"pictures": shared, "share": shared / len(split)}
    if "textcaps" in (data.source, data.layout) and data.annotations is None and probe.split == "test":
        facts["note"] = textcaps.NOTE
    return {"split": probe.split, "captions": data.captions.model_dump(), "limit": data.eval_limit}, facts


def _sentences(probe: Probe, questions: dict[str, Any], split: Split) -> Any:
    return [split.captions] if probe.kind == "retrieval" else PROBE_MODULES[probe.kind].sentences(questions)


def _metrics(probe: Probe, questions: dict[str, Any]) -> list[str]:
    return RECALLS if probe.kind == "retrieval" else PROBE_MODULES[probe.kind].metrics(questions)


def _split(probe: Probe) -> str:
    return probe.split if isinstance(probe, config.Retrieval) else "test"


def _file(folder: Path, name: str) -> Path:
    """Return the path of the file that describes the prepared probe `name` in the run folder `folder`."""
    return folder / "probes" / f"{name}.json"


def _prepared(folder: Path, name: str, storage: Storage) -> dict[str, Any]:
    file = _file(folder, name)
    storage.fetch(file)
    questions: dict[str, Any] = read_json(file)
    return questions
