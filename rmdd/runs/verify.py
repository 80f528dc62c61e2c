"""`rmdd verify`: walk what rmdd wrote and ask each format whether it is as it was written.

Everything is read: schema versions, manifests, sizes, SHA-256, headers, whether numbers are finite, and whether what a
finished run was made from is still there. Work that is not finished is no fault. Nothing is changed.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.artefact import distilled
from rmdd.core.checks import DiskCheck, Findings, Format
from rmdd.core.files import is_temporary, read_json
from rmdd.core.layout import ADVICE_FOR_COPIES, FILE, LAYOUT, layout_of
from rmdd.core.storage import Mirror, Storage, is_uri
from rmdd.coresets import subset
from rmdd.data import shards
from rmdd.distill import loop
from rmdd.distill.trajectory.planning import PLAN, with_phases
from rmdd.evaluate import records
from rmdd.experts import store

COLLECTIONS = ("sweeps", "searches", "comparisons")
"""Folders of a storage whose members belong to other folders of it."""
READ_IN_OWN_LAYOUT = ("*", "sweeps/*", "searches/*")
"""Folders of runs, sweeps and searches: their checks read run files, which only this release's layout allows."""
REMADE = "delete it and resume the {}: it is made anew"


def verify(address: str, formats: Sequence[Format]) -> Findings:
    """Check a folder of any format, or a whole storage: a folder, or a URI, of which a copy is made in the temporary
    folder for the time being.

    Raises `ValueError` when there is nothing that rmdd writes.
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
    """The folder as the first format that knows it, else all of its phases, else a whole storage."""
    surest_first = sorted(formats, key=lambda f: len(f.markers))
    own = next((f for f in surest_first if any((path / name).is_file() for name in f.markers)), None)
    if own is not None:
        if own.within not in READ_IN_OWN_LAYOUT or _readable(path.parents[own.within.count("/")], check):
            own.check(path, check)
    elif phases := folders(path, "phase-*"):
        for each in phases:
            loop.verify(each, check)
    elif any((path / name).is_dir() for name in ("data", "experts", "phases")):
        for form in formats if _readable(path, check) else ():
            _ask(form, path, check)
    elif not path.exists():
        raise ValueError(f"there is no {check.storage.address(path)}; give a folder that rmdd wrote, or its URI")
    else:
        markers = ", ".join(f.markers[0] for f in formats if len(f.markers) == 1)
        raise ValueError(
            f"{check.storage.address(path)} holds nothing that rmdd writes (no {markers}, phase or storage folders); "
            "give one of these"
        )
    return check.findings


def _readable(root: Path, check: DiskCheck) -> bool:
    """Whether the storage has the layout of this release. If not, that becomes the only fault that is reported."""
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


def _ask(each: Format, storage: Path, check: DiskCheck) -> None:
    """One format, of all that a storage has of it."""
    if not each.within:
        return
    if not each.markers:
        for file in sorted(storage.glob(each.within)):
            each.check(file, check)
    for folder in folders(storage, each.within) if each.markers else ():
        if len(each.markers) > 1 or (folder / each.markers[0]).is_file():
            each.check(folder, check)
        elif not each.always_marked:
            check.unfinished(folder)


def folders(path: Path, pattern: str) -> list[Path]:
    return sorted(p for p in path.glob(pattern) if p.is_dir() and not is_temporary(p.name))


# -- a run -----------------------------------------------------------------------------------------------------------


def verify_run(path: Path, check: DiskCheck) -> None:
    """A run's own files and, where it is finished, all that it was made from."""
    if not check.begin(path):
        return
    verify_records(path, check, "run")
    for log in sorted(path.glob("*.jsonl")):
        check.lines(log)
    rewrite = "write the run file anew with the values of before, or begin another run"
    with check.errors_as_faults(path / "run.yaml", rewrite):
        run = config.load(path / "run.yaml")
        if run.distill.plan.plans:
            run = _planned(path / PLAN, run, check)
        if path.name != run.folder_name:
            check.fault(path / "run.yaml", "means another run than its folder is named after", "name it back")
        if not (path / "set" / distilled.DESCRIPTION).is_file():
            check.unfinished(path)
            return
        distilled.verify(path / "set", check)
        sources = read_json(path / "set" / distilled.DESCRIPTION)["provenance"]
        verify_sources(path.parent, run, sources, read_json(path / "data.json"), check)


def verify_records(path: Path, check: DiskCheck, what: str) -> None:
    """The records of a run and of its students."""
    for file in sorted((*path.glob("*.json"), *path.glob("students/*.json"))):
        check.json(file, REMADE.format(what))


def verify_sources(
    root: Path, run: config.Run, sources: dict[str, Any], data: dict[str, Any], check: DiskCheck, whole: bool = True
) -> None:
    """Dataset, experts and phases that a run was made from; `whole`: its phases are finished."""
    experts, phases = root / "experts" / sources["experts"], root / "phases" / sources["phases"]
    dataset = Path(data["path"])
    if run.data.source != "dataset":
        dataset = root / "data" / dataset.name
    for each, what in ((dataset, "ingest"), (experts, "experts"), (phases, "distill")):
        check.storage.fetch(each)
        if not each.is_dir():
            check.fault(each, "is missing, and the run was made from it", f"run `rmdd {what}` again")
    if dataset.is_dir():
        shards.verify(dataset, check)
    if experts.is_dir():
        store.verify(experts, check, run.experts.num)
    for number, phase in enumerate(run.distill.phases) if phases.is_dir() else ():
        snapshots = loop.snapshot_iterations(phase.iterations, run.distill.snapshots) if whole else ()
        loop.verify(phases / f"phase-{number}", check, snapshots)


def _planned(path: Path, run: config.Run, check: DiskCheck) -> config.Run:
    """`run` with the phases of its plan, which is there once anything was distilled."""
    if not path.is_file():
        if (path.parent / "set" / distilled.DESCRIPTION).is_file():
            check.fault(path, "is missing", "resume the run: it is made anew")
        return run
    with check.errors_as_faults(path, REMADE.format("run")):
        return with_phases(run, read_json(path)["phases"])
    return run


DATASETS, STORES, PHASES, CORESETS = shards.FORMAT, store.FORMAT, loop.FORMAT, subset.FORMAT
SETS = distilled.FORMAT
BASELINES = records.BASELINES
RUNS = Format(("run.yaml",), "*", verify_run)
