"""`rmdd check`: the steps, folders and estimated cost of a run before it starts. The check changes no file."""

import contextlib
import os
from pathlib import Path
from typing import Any

from rmdd import config, methods
from rmdd.config import budget
from rmdd.core.files import read_json
from rmdd.core.layout import check_layout
from rmdd.core.storage import open_storage, run_folder
from rmdd.data.carving import empty_splits
from rmdd.data.shards import MANIFEST, Dataset
from rmdd.distill.chain import is_chained
from rmdd.distill.trajectory.planning import (
    PLAN,
    budget_error,
    planned_budget_error,
    with_estimated_phases,
    with_plan,
)
from rmdd.evaluate.probes import of_run as probes
from rmdd.experts.store import Store
from rmdd.experts.train import kept_epochs
from rmdd.models import pretrained as parts
from rmdd.models.dual import DualEncoder
from rmdd.models.image import double_backward, matching_context, weights_file
from rmdd.models.text import encoder_identity
from rmdd.runs import cost as estimate
from rmdd.runs.gate import is_gated
from rmdd.runs.paths import RunPaths, dataset_folder, is_finished, paths_of
from rmdd.runs.recipe import recipe_of, remarks_of

EPOCH_FIELDS = ("start", "stop", "start_text", "stop_text", "endpoint")
"""Names of the fields of a phase whose values are epochs of an expert trajectory."""


def problems_of(run: config.Run) -> list[str]:
    """Return a message for each problem that would stop the run and that can be found before the run starts.

    Examples: an encoder is unavailable, phases exceed the budget, a split is empty, a file of a probe (extra
    evaluation) is unreadable.
    """
    mistakes = []
    try:
        _model(run, text_width=1)
    except ValueError as error:
        mistakes.append(str(error))
    try:
        if (run.distill.budget_check == "error" or not run.distill.phases) and (over := budget_error(run)):
            mistakes.append(over)
    except ValueError as error:
        mistakes.append(str(error))
    with contextlib.suppress(ValueError, OSError):  # the ingest reports what is unreadable or cannot be counted before
        if empty := empty_splits(*_counts(run, _dataset(run))):
            mistakes.append(empty)
    return mistakes + probes.faults(run.data, run.evaluate.probes) + methods.method_of(run).faults()


def storage_faults(run: config.Run) -> list[str]:
    """Return an error message if a different release of rmdd wrote the storage; none if the storage is unreachable."""
    with contextlib.suppress(OSError):
        try:
            check_layout(open_storage(run.runtime))
        except ValueError as error:
            return [str(error)]
    return []


def examine(run: config.Run, search: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return everything that `rmdd check` prints, as JSON values; the units are bytes, seconds and FLOPs.

    Raises `ValueError` if a tower or an annotation file is unavailable, or if a split is empty.
    """
    width, remark = estimate.text_features(run.model.text)
    model = _model(run, width)
    tower = run.model.image
    size = estimate.size_of(model, pretrained=tower.weights != "random")
    loaded = run
    run, planned = _with_phases(run, width)
    foreseen_only = bool(run.distill.plan.plans and not (run_folder(run) / PLAN).is_file())
    work = estimate.work_of(model, run, width)
    dataset = _dataset(run)
    paths = None if dataset is None else _paths(run, dataset)
    counts, origin = _counts(run, dataset)
    if empty := empty_splits(counts, origin):
        raise config.ConfigError([empty], run.name)
    similarity, sizes = run.distill.similarity, [p.pairs for p in run.distill.phases]
    unit = budget.pair_parameters(run.data.image_size, width)
    cost = budget.cost(sizes, run.stored_size, width, similarity.kind, similarity.rank)
    epochs_kept = len(kept_epochs(run.experts, run.endpoints) or range(run.experts.epochs))
    over = budget_error(run, width)
    sentences = probes.costs(run.data, run.evaluate.probes, width)
    return {
        "run": str(run_folder(run)),
        "hash": run.hash_of(),
        "family": methods.find(run.distill.method).family,
        "recipe": recipe_of(loaded),
        "data": {"counts": counts, "origin": origin, "ingested": dataset is not None},
        "model": {
            "image": size.image,
            "text": size.text,
            "frozen": size.frozen,
            "text_width": width,
            "double_backward": double_backward(tower.name).value if _matched(run) else "not needed",
        },
        "experts": {
            "num": run.experts.num,
            "complete": _complete(paths),
            "store": str(paths.store) if paths else None,
            "epochs_kept": [0, *(kept_epochs(run.experts, run.endpoints) or range(1, run.experts.epochs + 1))],
        },
        "phases": [_phase(run, paths, i, foreseen_only) for i in range(len(run.distill.phases))],
        "phases_foreseen": foreseen_only,
        "phases_folder": str(paths.phases) if paths else None,
        "budget": {
            "pairs": run.distill.budget,
            "used": cost / unit,
            "numbers": cost,
            "limit": run.distill.budget * unit,
            "over": over,
        },
        "disk": {
            "cache": estimate.cache_bytes(run, counts, width),
            "store": estimate.store_bytes(size, run.experts.num, epochs_kept, run.experts.dtype),
            "phases": estimate.phases_bytes(run, width, size),
        },
        "memory": _memory(run, counts, size, work, width),
        "time": time_of(run, estimate.operations(run, counts, work)),
        "search": search,
        "parts": [parts.summary(part) for part in _parts(run)],
        "gpus": _gpus(run),
        "remarks": [r for r in (remark, planned, *remarks_of(loaded), *_method_remarks(run), *sentences) if r]
        + ([] if dataset is None else dataset.remarks(run.data)),
    }


def _parts(run: config.Run) -> list[parts.PretrainedModel]:
    return methods.method_of(run).parts()


def _model(run: config.Run, text_width: int) -> DualEncoder:
    """Build the run's dual encoder on the meta device.

    Raises `ValueError` if the image tower is unavailable. The error is also raised if the run matches trajectories and
    the tower has no second derivatives.
    """
    tower = run.model.image
    if tower.weights != "pretrained" and not tower.is_random:
        weights_file(tower)
    with matching_context(tower.name) if _matched(run) else contextlib.nullcontext():
        return estimate.model_on_meta(run, text_width)


def _matched(run: config.Run) -> bool:
    """Return whether the distillation method differentiates through training steps of the image tower."""
    return run.model.image.trainable and methods.find(run.distill.method).unrolls


def _memory(
    run: config.Run, counts: estimate.Counts, size: estimate.Size, work: estimate.Work, text_width: int
) -> dict[str, int]:
    """Return the peak bytes of one distillation step; the mapping is empty for methods that do not iterate."""
    method = methods.find(run.distill.method)
    if method.unrolls:
        return {"matching_step": estimate.matching_bytes(run, size, work, text_width)}
    if method.iterates:
        return {"step": estimate.step_bytes(run, counts, size, work, text_width)}
    return {}


def _method_remarks(run: config.Run) -> list[str]:
    """Return remarks: costs that the estimate leaves out, and settings that have no effect with the run's method."""
    rule, method = run.distill, methods.method_of(run)
    remarks = method.uncounted()
    if idle := method.idle():
        remarks.append(f"no effect with method {rule.method}: distill.{', '.join(idle)}")
    if rule.path_start == "student" and not is_chained(rule):
        remarks.append("distill.path_start: student has no effect, because the run has a single phase")
    if run.search.pruner != "none" and (is_chained(rule) or not method.iterates):
        remarks.append(
            f"search.pruner: {run.search.pruner} saves no updates, because a trial "
            f"{'of chained phases' if is_chained(rule) else f'with method {rule.method}'} distils all snapshots before "
            "the first one is scored"
        )
    return remarks


def _with_phases(run: config.Run, text_width: int) -> tuple[config.Run, str | None]:
    """Return the run with its phases, and a remark on where the phases come from (None if the run lists them).

    Phases that the run does not list come from its plan or, before the plan exists, from a forecast.
    """
    if not run.distill.plan.plans:
        return run, None
    if (written := run_folder(run) / PLAN).is_file():
        return with_plan(run, read_json(written)), f"the phases are those of the plan {written}"
    if mistake := planned_budget_error(run, text_width):
        raise config.ConfigError([mistake], run.name)
    estimated = with_estimated_phases(run, text_width)
    remark = "the number and sizes of the phases are a forecast; the run plans its phases after the experts are trained"
    if is_gated(estimated.distill):
        remark += "; a phase that does not raise the val score is dropped, and its pairs and updates go to the others"
    return estimated, remark


def _dataset(run: config.Run) -> Dataset | None:
    """Return the run's dataset, or None if it is not ingested yet."""
    record = run_folder(run) / "data.json"
    path = Path(read_json(record)["path"]) if record.is_file() else dataset_folder(run)
    return Dataset.open(path) if (path / MANIFEST).is_file() else None


def _counts(run: config.Run, dataset: Dataset | None) -> tuple[estimate.Counts, str]:
    """Return the images and captions of each split, and where the numbers come from: the dataset or the annotations.

    Raises `ValueError` if the annotations are unreadable or if only an ingest can count the images.
    """
    if dataset is None:
        return estimate.known_counts(run.data)
    counts = {k: (c["pairs"], c["captions"]) for k, c in dataset.counts.items()}
    return estimate.limited(counts, run.data), f"from {dataset.path}"


def _paths(run: config.Run, dataset: Dataset) -> RunPaths | None:
    """Return the paths of the run's results; None if an encoder that their names depend on is not on this machine."""
    if not _encoder_is_local(run.model.text) or parts.missing(_parts(run)):
        return None
    return paths_of(run, dataset)


def _encoder_is_local(tower: config.TextTower) -> bool:
    """Return whether the text encoder is on this machine, so that it can be identified without a download."""
    if tower.name == "hashing" or tower.name.startswith("package:") or Path(tower.name).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(tower.name, "config.json"), str):
        return False
    return bool(encoder_identity(tower))


def _complete(paths: RunPaths | None) -> int:
    return len(Store.open(paths.store).complete()) if paths and (paths.store / "store.json").is_file() else 0


def _phase(run: config.Run, paths: RunPaths | None, number: int, foreseen_only: bool) -> dict[str, Any]:
    """Return the fields of phase `number` as JSON values; in a forecast, the fields in `EPOCH_FIELDS` are None."""
    phase = run.distill.phases[number]
    values = phase.model_dump(include=set(methods.find(run.distill.method).phase_fields))
    return (
        values
        | (dict.fromkeys(EPOCH_FIELDS) if foreseen_only else {})
        | {"done": not foreseen_only and paths is not None and is_finished(run, paths, number)}
    )


def _gpus(run: config.Run) -> dict[str, float]:
    """Return how many GPUs are used by one worker, by experts in parallel and by phases in parallel."""
    gpus, phases = run.runtime.gpus_per_worker, _parallel_workers(run)
    return {
        "each": gpus,
        "experts": gpus * min(run.experts.num, run.runtime.workers or run.experts.num),
        "phases": gpus * min(phases, run.runtime.workers or phases),
    }


def _parallel_workers(run: config.Run) -> int:
    """Return how many workers can distil in parallel: one per random draw if a step has several, else one per phase."""
    draws = methods.method_of(run).draws
    return draws if draws > 1 else len(run.distill.phases)


def time_of(run: config.Run, operations: dict[str, int]) -> dict[str, Any]:
    """Return an estimate of the seconds of each step with this many FLOPs, and the throughput that it assumes."""
    runtime = run.runtime
    if runtime.gpus_per_worker > 0:
        throughput, workers = estimate.GPU_FLOPS, 1
        assumed = f"one GPU at {estimate.GPU_FLOPS / 1e12:g} TFLOP/s"
    else:
        throughput = estimate.CPU_FLOPS * runtime.threads
        cpus = runtime.num_cpus or os.cpu_count() or 1
        workers = 1 if runtime.ray == "off" else runtime.workers or max(1, cpus // runtime.threads)
        assumed = f"{workers} worker(s) of {runtime.threads} CPU thread(s) at {estimate.CPU_FLOPS / 1e9:g} GFLOP/s each"
    items = {"experts": run.experts.num, "distill": _parallel_workers(run), "evaluate": workers}
    seconds = {step: n / (throughput * min(workers, items[step])) for step, n in operations.items()}
    return {"assumed": assumed, "operations": operations, "seconds": seconds}
