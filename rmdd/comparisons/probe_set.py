"""Probes of a distilled set that came alone: its students are trained by the protocol it was made with, and asked.

Neither the data it was distilled from nor a run folder is needed, only its text encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.artefact.distilled import TENSORS, DistilledSet
from rmdd.config.probes import VIEW
from rmdd.core.device import device_of
from rmdd.core.files import sha256_file, write_json
from rmdd.core.progress import Progress
from rmdd.core.storage import anchored, open_storage, run_folder
from rmdd.evaluate import protocol
from rmdd.evaluate.lessons import enlarged_to, lessons_of
from rmdd.evaluate.probes.of_run import Probing, faults, prepare, remarks
from rmdd.evaluate.students import Course, Diverged, train_student
from rmdd.execution.backend import hold_folders, open_backend
from rmdd.execution.tasks import Hooks, Interrupted, watched
from rmdd.models.dual import DualEncoder, build
from rmdd.models.text import encoder_identity
from rmdd.runs.absolute import with_absolute_paths


@dataclass(frozen=True)
class Item:
    run: config.Run
    set: Path
    index: int
    value: str
    """Hash of the set."""


def run_of(path: Path, probes: Mapping[str, Any], overrides: Sequence[str] = ()) -> config.Run:
    """The run that the set at `path` came from, as far as its students and `probes` need it.

    Raises `ConfigError`, also for files of a probe that cannot be read and when the text encoder is another.
    """
    distilled = DistilledSet.load(path)
    made = distilled.config
    raw = {key: made[key] for key in ("seed", "model", "experts", "distill")}
    raw["data"] = {field: made["data"][field] for field in VIEW}
    raw["evaluate"] = made["evaluate"] | {"probes": dict(probes)}
    run = with_absolute_paths(config.load(raw | {"name": f"probes-of-{distilled.method}"}, overrides))
    mistakes = faults(run)
    known, here = distilled.model.get("text_encoder"), encoder_identity(run.model.text)
    if known and known != here:
        mistakes.append(f"the set's texts are of text encoder {known}, but '{run.model.text.name}' here is {here}")
    if mistakes:
        raise config.ConfigError(mistakes, str(path))
    return run


def probe_set(path: Path, run: config.Run, progress: Progress) -> dict[str, Any]:
    """Train and ask the students of the set at `path`; returns, and writes into the run folder, what came out."""
    run = run.model_copy(update={"runtime": anchored(run.runtime)})
    value = sha256_file(path / TENSORS)[:16]
    run = run.model_copy(update={"name": f"{run.name}-{value[:8]}"})
    folder = run_folder(run)
    with hold_folders(run.runtime, folder), open_backend(run.runtime, folder / "events.jsonl", progress) as backend:
        facts = {}
        for name in run.evaluate.probes:
            readers = watched(progress, f"ingest {name}", "pairs", backend.readers)
            encoders = watched(progress, f"embed {name}", "captions", backend.encoders)
            facts[name] = prepare(run, name, None, readers, encoders)
            for line in remarks(name, facts[name]):
                progress.say(line)
        items = [Item(run, path.absolute(), i, value) for i in range(run.evaluate.students)]
        names = [f"student {item.index}" for item in items]
        with progress.stage("students", dict.fromkeys(names, 1)) as update:
            records = backend.executor.map(student, items, names, update)
        if any(r is False for r in records):
            raise Interrupted
        scores = {name: protocol.summary([r["probes"] for r in records], name) for name in facts}
        found = {"set": str(path), "table": {run.distill.method_name: {"probes": scores}}, "probes": facts}
        write_json(folder / "probes.json", found)
    return found | {"folder": str(folder)}


def student(item: Item, hooks: Hooks) -> dict[str, Any]:
    """Train one student as a run would, or take the one that was kept, and ask it."""
    run, storage = item.run, open_storage(item.run.runtime)
    job = protocol.Job("student", item.index)
    asked = Probing(run, job, run_folder(run) / "students" / f"{job.name}.json", item.value, storage)
    if asked.missing:
        asked.ask(asked.restored() or _trained(item, asked, hooks), device_of(run.runtime), hooks.should_stop)
    hooks.report({"done": 1})
    return asked.added_to({"job": job.name})


def _trained(item: Item, asked: Probing, hooks: Hooks) -> DualEncoder | None:
    """None if it diverged."""
    run, distilled = item.run, DistilledSet.load(item.set)
    size, seed = run.data.image_size, run.seed_of("evaluate")
    lessons = enlarged_to(size, lessons_of(distilled))
    course = Course.of(run.evaluate).on(distilled.mean, distilled.std)
    model = build(run.model, lessons[0].texts.shape[1], size, seed, "student", item.index).to(device_of(run.runtime))
    model.temperature = run.student_temperature

    def alive(subset: int, passes: int) -> None:
        hooks.should_stop()

    try:
        train_student(model, lessons, course, run.distill.loss, seed, item.index, alive)
    except Diverged:
        return None
    asked.keep(model)
    return model
