"""What a run needs of its storage besides its own folder, so that it can be verified, and resumed without new work."""

from collections.abc import Iterator
from pathlib import Path

from rmdd import config, methods
from rmdd.artefact.distilled import DESCRIPTION
from rmdd.core.files import read_json
from rmdd.core.storage import root_of
from rmdd.data.shards import MANIFEST, Dataset
from rmdd.distill.trajectory.planning import PLAN, with_plan
from rmdd.evaluate.probes.of_run import probe_dataset
from rmdd.methods.tuned import TunedMethod
from rmdd.runs.paths import RunPaths, dataset_folder, paths_of


def planned(run: config.Run, folder: Path) -> config.Run:
    """Return a run with the phases of the plan in its folder; without phases if they are not planned yet."""
    if not run.distill.plan.plans:
        return run
    plan = folder / PLAN
    return with_plan(run, read_json(plan) if plan.is_file() else {"phases": []})


def dataset_of(run: config.Run, folder: Path) -> Dataset | None:
    """Return the dataset of the results in `folder`, without checking its shards; None if it is not ingested yet."""
    path, facts = dataset_folder(run), folder / "data.json"
    if facts.is_file():
        return Dataset(path, {"data_hash": read_json(facts)["data_hash"]})
    return Dataset(path, read_json(path / MANIFEST)) if (path / MANIFEST).is_file() else None


def paths_in(run: config.Run, folder: Path) -> RunPaths | None:
    """Return the paths of a run whose results are in `folder`; None if its data is not ingested yet."""
    dataset = dataset_of(run, folder)
    return None if dataset is None else paths_of(planned(run, folder), dataset)


def needs_of_run(run: config.Run, folder: Path) -> Iterator[Path]:
    """Yield the dataset, experts, phases, baselines and tuned models of a run, and the datasets of its probes.

    `folder` has the results of the run. The folders that are yielded may be missing.
    """
    root = root_of(run.runtime)
    yield from datasets_of(run, folder)
    yield from needs_of_probes(folder)
    if (folder / "set" / DESCRIPTION).is_file():
        made_from = read_json(folder / "set" / DESCRIPTION)["provenance"]
        yield from (root / kind / made_from[kind] for kind in ("experts", "phases"))
    dataset = dataset_of(run, folder)
    if dataset is None:
        return
    paths = paths_of(planned(run, folder), dataset)
    yield from (paths.store, paths.phases, paths.baseline)
    if (folder / PLAN).is_file():
        yield from (paths.phases.with_name(d["folder"]) for d in read_json(folder / PLAN).get("decisions", []))
    method = methods.method_of(run)
    if isinstance(method, TunedMethod):
        tuned = method.tuned_folder(root, dataset.hash)
        yield from (tuned, tuned.with_name(f"fused-{tuned.name}"))


def datasets_of(run: config.Run, folder: Path) -> Iterator[Path]:
    """Yield the paths that the datasets of a run and of its probes may have; `folder` has the results of the run."""
    root = root_of(run.runtime)
    paths = [dataset_folder(run), *(probe_dataset(run.data, probe, root) for probe in run.evaluate.probes.values())]
    if (folder / "data.json").is_file():  # `data.root` may be relative to the folder in which the run was started
        paths.append(Path(read_json(folder / "data.json")["path"]))
    for path in paths:
        yield from (path, root / "data" / path.name)  # the storage may have been moved since the run


def needs_of_probes(folder: Path) -> Iterator[Path]:
    """Yield the datasets of the probes that were prepared in the folder of a run or of a probed set."""
    for file in folder.glob("probes/*.json"):
        yield folder.parent / read_json(file)["dataset"]
