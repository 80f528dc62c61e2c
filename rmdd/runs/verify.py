"""`rmdd verify`: check that files written by rmdd are intact.

It checks schema versions, manifests, file sizes, SHA-256 hashes and headers, and that all numbers are finite. If a run
is finished, its dataset, experts and phases are checked too. Unfinished work is not a fault. No file is changed.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.artefact import distilled
from rmdd.core.checks import DiskCheck, Findings, Format
from rmdd.core.files import read_json
from rmdd.core.layout import ADVICE_FOR_COPIES, FILE, LAYOUT, layout_of
from rmdd.core.storage import Mirror, Storage, is_uri
from rmdd.coresets import subset
from rmdd.data import shards
from rmdd.distill import loop
from rmdd.distill.trajectory.planning import PLAN, with_plan
from rmdd.evaluate import records
from rmdd.experts import store

COLLECTIONS = ("sweeps", "searches", "comparisons")
"""Folders of a storage whose subfolders refer to other folders of the same storage."""
NEED_CURRENT_LAYOUT = ("*", "sweeps/*", "searches/*")
"""Patterns of the folders of runs, sweeps and searches; their run files can be read only in the current layout."""
RECREATE = "delete it and resume the {} to create it again"


def verify(address: str, formats: Sequence[Format]) -> Findings:
    """Check one folder of any format, or a whole storage. A URI is copied to a temporary folder first.

    Raises `ValueError` when `address` is missing or holds no files of rmdd.
    """
    if not is_uri(address):
        folder = Path(address).absolute()
        return _walk(folder, formats, DiskCheck(Storage(folder)))
    parent, _, name = address.rstrip("/").rpartition("/")
    with tempfile.TemporaryDirectory(prefix="rmdd-verify-") as scratch:
        if parent.endswith(("/", ":")):
            parent, name = address.rstrip("/"), ""
        for kind in COLLECTIONS:
            if parent.endswith(f"/{kind}"):
                parent, name = parent.removesuffix(f"/{kind}"), f"{kind}/{name}"
        mirror = Mirror(parent, Path(scratch))
        mirror.fetch(mirror.root / name)
        return _walk(mirror.root / name, formats, DiskCheck(mirror))


def _walk(path: Path, formats: Sequence[Format], check: DiskCheck) -> Findings:
    """Check all files in the folder `path`.

    A marker file in the folder tells the format. Without such a file, the folder must hold phases or be a storage.
    """
    fewest_markers_first = sorted(formats, key=lambda f: len(f.markers))
    match = next((f for f in fewest_markers_first if any((path / name).is_file() for name in f.markers)), None)
    if match is not None:
        if match.within not in NEED_CURRENT_LAYOUT or _has_current_layout(path.parents[match.within.count("/")], check):
            match.check(path, check)
    elif phases := folders(path, "phase-*"):
        for folder in phases:
            loop.verify(folder, check)
    elif any((path / name).is_dir() for name in ("data", "experts", "phases")):
        for form in formats if _has_current_layout(path, check) else ():
            _check_all(form, path, check)
    elif not path.exists():
        raise ValueError(f"{check.storage.address(path)} does not exist; give a folder that rmdd wrote, or its URI")
    else:
        markers = ", ".join(f.markers[0] for f in formats if len(f.markers) == 1)
        raise ValueError(
            f"{check.storage.address(path)} was not written by rmdd (no {markers}, phase or storage folders); "
            "give a folder that holds one of these"
        )
    return check.findings


def _has_current_layout(root: Path, check: DiskCheck) -> bool:
    """Return whether the storage has the layout of this release; report any other layout as a fault."""
    storage = check.storage if check.storage.root == root else Storage(root)
    try:
        layout = layout_of(storage)
    except ValueError as error:
        check.fault(root / FILE, "is damaged", str(error).partition("; ")[2])
        return True
    if layout in (None, LAYOUT):
        return True
    wrong = f"has layout {layout}, and this release of rmdd reads layout {LAYOUT}"
    advice = "verify it with the release that wrote it"
    check.fault(root, wrong, f"{advice}, {ADVICE_FOR_COPIES}" if layout == 1 else advice)
    return False


def _check_all(form: Format, storage: Path, check: DiskCheck) -> None:
    """Check every file or folder of one format in a storage."""
    if not form.within:
        return
    if not form.markers:
        for file in sorted(storage.glob(form.within)):
            form.check(file, check)
    for folder in folders(storage, form.within) if form.markers else ():
        if len(form.markers) > 1 or (folder / form.markers[0]).is_file():
            form.check(folder, check)
        elif not form.always_marked:
            check.unfinished(folder)


def folders(path: Path, pattern: str) -> list[Path]:
    return sorted(p for p in path.glob(pattern) if p.is_dir() and not p.name.startswith("."))


# -- a run -----------------------------------------------------------------------------------------------------------


def verify_run(path: Path, check: DiskCheck) -> None:
    """Check the files of a run folder; for a finished run also its dataset, experts and phases."""
    if not check.begin(path):
        return
    verify_records(path, check, "run")
    for log in sorted(path.glob("*.jsonl")):
        check.lines(log)
    rewrite = "restore the original values in the run file, or start a new run"
    with check.errors_as_faults(path / "run.yaml", rewrite):
        run = config.load(path / "run.yaml")
        if run.distill.plan.plans:
            run = _planned(path / PLAN, run, check)
        if path.name != run.folder_name:
            check.fault(path / "run.yaml", "describes a different run than the folder name", "restore the folder name")
        if not (path / "set" / distilled.DESCRIPTION).is_file():
            check.unfinished(path)
            return
        distilled.verify(path / "set", check)
        sources = read_json(path / "set" / distilled.DESCRIPTION)["provenance"]
        verify_sources(path.parent, run, sources, read_json(path / "data.json"), check)


def verify_records(path: Path, check: DiskCheck, kind: str) -> None:
    """Check the JSON files in a folder and its subfolder `students`; `kind` (run, trial ...) is used in messages."""
    for file in sorted((*path.glob("*.json"), *path.glob("students/*.json"))):
        check.json(file, RECREATE.format(kind))


def verify_sources(
    root: Path, run: config.Run, sources: dict[str, Any], data: dict[str, Any], check: DiskCheck, finished: bool = True
) -> None:
    """Check the dataset, experts and phases of a run; a `finished` run must have all snapshots of its phases."""
    experts, phases = root / "experts" / sources["experts"], root / "phases" / sources["phases"]
    dataset = Path(data["path"])
    if run.data.source != "dataset":
        dataset = root / "data" / dataset.name
    for folder, command in ((dataset, "ingest"), (experts, "experts"), (phases, "distill")):
        check.storage.fetch(folder)
        if not folder.is_dir():
            check.fault(folder, "is missing, but the run depends on it", f"run `rmdd {command}` again")
    if dataset.is_dir():
        shards.verify(dataset, check)
    if experts.is_dir():
        store.verify(experts, check, run.experts.num)
    for number, phase in enumerate(run.distill.phases) if phases.is_dir() else ():
        snapshots = loop.snapshot_iterations(phase.iterations, run.distill.snapshots) if finished else ()
        loop.verify(phases / f"phase-{number}", check, snapshots)


def _planned(path: Path, run: config.Run, check: DiskCheck) -> config.Run:
    """Return a copy of `run` with the phases of its plan; a missing plan is a fault only if a distilled set exists."""
    if not path.is_file():
        if (path.parent / "set" / distilled.DESCRIPTION).is_file():
            check.fault(path, "is missing", "resume the run to create it again")
        return run
    with check.errors_as_faults(path, RECREATE.format("run")):
        return with_plan(run, read_json(path))
    return run


DATASETS, STORES, PHASES, CORESETS = shards.FORMAT, store.FORMAT, loop.FORMAT, subset.FORMAT
SETS = distilled.FORMAT
BASELINES = records.BASELINES
RUNS = Format(("run.yaml",), "*", verify_run)
