"""Probe a distilled set without its run: train students with the protocol of the set and score them on probes.

This needs the text encoder of the set, but not its training data or the folder of its run.
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
from rmdd.core.storage import absolute_runtime, open_storage, run_folder
from rmdd.evaluate import protocol
from rmdd.evaluate.probes.of_run import StudentProbes, faults, prepare, remarks
from rmdd.evaluate.students import Diverged
from rmdd.evaluate.training_pairs import enlarged_to, pairs_of_set
from rmdd.execution.backend import hold_folders, open_backend
from rmdd.execution.tasks import Hooks, Interrupted, with_progress
from rmdd.models.dual import DualEncoder
from rmdd.models.text import encoder_identity
from rmdd.runs.absolute import with_absolute_paths


@dataclass(frozen=True)
class SetProbeItem:
    """Input of the task that probes one student of a distilled set."""

    run: config.Run
    set: Path
    index: int
    """Number of the student, from 0."""
    value: str
    """Hash of the tensors of the distilled set."""


def run_of(path: Path, probes: Mapping[str, Any], overrides: Sequence[str] = ()) -> config.Run:
    """Return the run of the set at `path`, with the settings that its students and `probes` need.

    Raises `ConfigError` for invalid settings, unreadable files of a probe, or a text encoder that is not the set's.
    """
    distilled = DistilledSet.load(path)
    source = distilled.config
    raw = {key: source[key] for key in ("seed", "model", "experts", "distill")}
    raw["data"] = {field: source["data"][field] for field in VIEW}
    raw["evaluate"] = source["evaluate"] | {
        "order": distilled.order,
        "between": distilled.between,
        "probes": dict(probes),
    }
    run = with_absolute_paths(config.load(raw | {"name": f"probes-of-{distilled.method}"}, overrides))
    if mistakes := faults(run.data, run.evaluate.probes) + encoder_mistakes(distilled, run.model.text):
        raise config.ConfigError(mistakes, str(path))
    return run


def encoder_mistakes(distilled: DistilledSet, tower: config.TextTower) -> list[str]:
    """Return a message if the text encoder `tower` on this machine is not the one that a set was made with."""
    encoder, local = distilled.model.get("text_encoder"), encoder_identity(tower)
    if not encoder or encoder == local:
        return []
    made = f"the set was made with text encoder {encoder}, but '{tower.name}' on this machine is {local}"
    return [f"{made}; install the encoder of the set"]


def probe_set(path: Path, run: config.Run, progress: Progress) -> dict[str, Any]:
    """Train and probe the students of the set at `path`; write the result to `probes.json` and return it."""
    value = sha256_file(path / TENSORS)[:16]
    run = run.model_copy(update={"runtime": absolute_runtime(run.runtime), "name": f"{run.name}-{value[:8]}"})
    folder = run_folder(run)
    with hold_folders(run.runtime, folder), open_backend(run.runtime, folder / "events.jsonl", progress) as backend:
        facts = {}
        for name in run.evaluate.probes:
            readers = with_progress(progress, f"ingest {name}", "pairs", backend.readers)
            encoders = with_progress(progress, f"embed {name}", "captions", backend.encoders)
            facts[name] = prepare(run, name, None, readers, encoders)
            for line in remarks(name, facts[name]):
                progress.say(line)
        items = [SetProbeItem(run, path.absolute(), i, value) for i in range(run.evaluate.students)]
        names = [f"student {item.index}" for item in items]
        with progress.stage("students", dict.fromkeys(names, 1)) as update:
            records = backend.executor.map(student, items, names, update)
        if any(r is False for r in records):
            raise Interrupted
        scores = {name: protocol.summary([r["probes"] for r in records], name) for name in facts}
        result = {"set": str(path), "table": {run.distill.method_name: {"probes": scores}}, "probes": facts}
        write_json(folder / "probes.json", result)
    return result | {"folder": str(folder)}


def student(item: SetProbeItem, hooks: Hooks) -> dict[str, Any]:
    """Score one student on the probes; load the weights that an earlier call saved, or train the student."""
    run, storage = item.run, open_storage(item.run.runtime)
    job = protocol.Job("student", item.index)
    probes = StudentProbes(run, job, run_folder(run) / "students" / f"{job.name}.json", item.value, storage)
    if probes.missing:
        probes.score_missing(
            probes.load_student() or _trained(item, probes, hooks), device_of(run.runtime), hooks.should_stop
        )
    hooks.report({"done": 1})
    return probes.added_to({"job": job.name})


def _trained(item: SetProbeItem, probes: StudentProbes, hooks: Hooks) -> DualEncoder | None:
    """Train the student and return the model; None if training diverged."""
    run, distilled = item.run, DistilledSet.load(item.set)
    job, rule = protocol.Job("student", item.index), protocol.StudentProtocol.of(run)
    subsets = enlarged_to(run.data.image_size, pairs_of_set(distilled))
    model = protocol.new_student(job, rule, subsets, device_of(run.runtime))

    def heartbeat(stage: int, passes: int) -> None:
        hooks.should_stop()

    try:
        protocol.training_of(job, rule, subsets, distilled.mean, distilled.std).train(model, heartbeat)
    except Diverged:
        return None
    probes.save_student(model)
    return model
