"""Paths of a run's folders: each folder name ends in a hash of every setting that changes its content."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rmdd import config, methods
from rmdd.config.hashing import NUMBERS_VERSION as NUMBERS_VERSION
from rmdd.core.device import device_of
from rmdd.core.storage import root_of, run_folder
from rmdd.data.ingest import shaping
from rmdd.data.inputs import absolute
from rmdd.data.shards import Dataset
from rmdd.distill.chain import is_chained
from rmdd.distill.loop import snapshot_iterations
from rmdd.evaluate import protocol
from rmdd.experts.train import kept_epochs
from rmdd.models.image import image_identity
from rmdd.models.pretrained import obtain
from rmdd.models.text import encoder_identity

EXAMPLES = "examples.json"
"""Name of a file in the run folder: captions of test, and the images that students find for them."""
HEALTH = "health.json"
"""Name of a file in the run folder. The file says for each snapshot whether the embeddings have collapsed."""


@dataclass(frozen=True)
class RunPaths:
    """Paths of the folders of a run: dataset, cache, experts, phases, baselines and the run folder."""

    data: Path
    cache: Path
    store: Path
    phases: Path
    baseline: Path
    run: Path
    root: Path = Path()
    """Path of the storage folder, as mounted for the process that computed these paths."""

    def under(self, root: Path) -> "RunPaths":
        """Return a copy of these paths for a process that mounts the storage at `root`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return RunPaths(
            **{n: root / p.relative_to(self.root) if p.is_relative_to(self.root) else p for n, p in moved.items()}
        )

    def phase(self, number: int) -> Path:
        return self.phases / f"phase-{number}"

    def start(self, number: int) -> Path:
        """Return the path of the file with the initial distilled pairs of phase `number`."""
        return self.phase(number) / "start.safetensors"

    def set(self, number: int, iteration: int) -> Path:
        return self.phase(number) / f"set-{iteration:06d}.safetensors"

    def set_of(self, number: int, iteration: int) -> Path:
        """Return the path of the file with a phase's pairs at `iteration`; iteration 0 has the initial pairs."""
        return self.set(number, iteration) if iteration else self.start(number)


def dataset_folder(run: config.Run) -> Path:
    """Return the path of the dataset that a run uses; a dataset made by `ingest` is named by a hash of its settings."""
    if run.data.source == "dataset":
        return Path(str(run.data.root))
    root = absolute(run.data.root) if run.data.root else ""
    name = config.hash_value({"data": shaping(run.data), "root": root})
    return root_of(run.runtime) / "data" / name


def protocol_of(run: config.Run) -> dict[str, Any]:
    """Return the settings that change how one expert is trained; the number of experts is not among them."""
    value: dict[str, Any] = run.hashed("experts", "experts")
    return value


def model_settings(run: config.Run, dataset: Dataset) -> dict[str, Any]:
    """Return the settings that change every trained or scored model: the preprocessed data and the encoders."""
    return {
        "version": NUMBERS_VERSION,
        "device": device_of(run.runtime).type,
        "data": dataset.hash,
        "view": run.hashed("data", "view"),
        "model": run.hashed("model", "experts"),
        "image": image_identity(run.model.image),
        "text": encoder_identity(run.model.text),
    }


def paths_of(run: config.Run, dataset: Dataset) -> RunPaths:
    """Return the paths of a run; folders with equal settings have equal paths and are shared between runs."""
    trained = model_settings(run, dataset) | {
        "experts": protocol_of(run),
        "kept": kept_epochs(run.experts, run.endpoints) or "all",
    }
    recipe = run.hashed("distill", "phases")
    method = methods.method_of(run)
    recipe["version"] = method.version
    recipe["parts"] = [part.identity() for part in method.parts()]
    if is_chained(run.distill):  # paths start at students that are trained as the run says
        rule = training_of_path_starts(run)
        students = run.hashed("evaluate", "learned")
        students |= {"epochs": rule.epochs, "order": rule.order, "between": rule.between}
        unused = {"eval_every", "seed", *rule.not_hashed("phases")}
        if len(run.distill.phases) == 2:  # these students learn a single subset
            unused |= {"order", "between", "schedule", "lr"}
        recipe["students"] = {name: value for name, value in students.items() if name not in unused}
    distilled = {**trained, "num": run.experts.num, "distill": recipe}
    facts = {
        "budget": run.distill.budget,
        "updates": protocol.updates(run.evaluate, [p.pairs for p in run.distill.phases]),
    }
    baseline = {**trained, **facts, "evaluate": run.hashed("evaluate", "baseline")}
    storage = root_of(run.runtime)
    return RunPaths(
        data=dataset.path,
        cache=storage / "cache",
        store=storage / "experts" / config.hash_value(trained),
        phases=storage / "phases" / config.hash_value(distilled),
        baseline=storage / "baselines" / config.hash_value(baseline),
        run=run_folder(run),
        root=storage,
    )


def fetch_pretrained(run: config.Run) -> None:
    """Download the pretrained models that the distillation method needs.

    Raises a `ConfigError` that lists all models that are unavailable.
    """
    method = methods.method_of(run)
    if mistakes := method.faults():
        raise config.ConfigError(mistakes, run.name)
    obtain(method.parts())


def training_of_path_starts(run: config.Run) -> config.Evaluate:
    """Return how the students are trained from which the paths of chained phases start."""
    epochs, order = run.distill.path_epochs, run.distill.path_order
    return run.evaluate.model_copy(
        update={"epochs": epochs or run.evaluate.epochs, "order": order or run.evaluate.order}
    )


def is_finished(run: config.Run, paths: RunPaths, number: int) -> bool:
    """Return whether phase `number` is finished according to the distillation method."""
    return methods.method_of(run).is_finished(number, paths.phase(number))


def candidates_of(run: config.Run) -> list[tuple[int, ...]]:
    """Return the distilled sets that can be exported, one per snapshot; each lists an iteration for every phase."""
    snapshots = [snapshot_iterations(p.iterations, run.distill.snapshots) for p in run.distill.phases]
    return [tuple(s[min(i, len(s) - 1)] for s in snapshots) for i in range(max(map(len, snapshots)))]
