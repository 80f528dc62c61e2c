"""`rmdd clean`: find what nothing in a storage needs any more, and remove it.

Only folders and files that rmdd names itself are considered; all others stay. What is kept decides what is needed: each
run, sweep, search, comparison, transfer, coreset and model that is not dropped. If this version of rmdd cannot tell
what one of them needs, everything that it may need stays too.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from rmdd.artefact.distilled import DESCRIPTION
from rmdd.core.files import ABANDONED_SECONDS, abandoned_in, is_temporary, read_json, remove, temporary_beside
from rmdd.core.remote import Stamp
from rmdd.distill.chain import is_chained, segment_ends
from rmdd.inventory.cached import unused_cache
from rmdd.inventory.contents import Contents
from rmdd.inventory.work import ERRORS, KINDS, StoredWork, finished_trainings, works_in
from rmdd.runs.needs import paths_in, planned
from rmdd.runs.paths import is_finished

HEX, SHORT = "[0-9a-f]" * 16, "[0-9a-f]" * 8
SHARED_PATTERNS = {
    "experts": (f"experts/{HEX}",),
    "phases": (f"phases/{HEX}",),
    "baselines": (f"baselines/{HEX}",),
    "data": (f"data/{HEX}",),
    "tuned": (f"tuned/{HEX}", f"tuned/fused-{HEX}"),
}
"""Patterns of the folders that runs share, by kind."""
OLD_LOCKS = (
    f"*-{SHORT}.lock",
    f"experts/{HEX}/expert-*.lock",
    f"phases/{HEX}/phase-*.lock",
    f"phases/{HEX}/phase-*/path-starts/expert-*.lock",
    f"data/.{HEX}.lock",
    "cache/*.lock",
    *(f"{kind}/*-{SHORT}.lock" for kind in ("sweeps", "searches", "comparisons", "coresets")),
    f"searches/*-{SHORT}/shared.lock",
    f"searches/*-{SHORT}/asking.lock",
    f"searches/*-{SHORT}/trials/*.lock",
    f"tuned/*{HEX}.lock",
)
"""Patterns of lock files that older versions put beside the folders."""
UNNEEDED = "nothing in this storage needs it"


@dataclass(frozen=True)
class Removal:
    """A file or folder that can be removed."""

    name: str
    """Its name, relative to the storage."""
    bytes: int
    why: str


@dataclass
class Cleaning:
    """What can be removed from a storage, and what stays because too little is known."""

    contents: Contents
    removals: list[Removal]
    unclear: dict[str, str] = field(default_factory=dict)
    """Why it is not known what a run, sweep, search or comparison needs, by its folder."""
    working: list[str] = field(default_factory=list)
    """Folders in which a process works, or worked within a day on another machine."""

    @property
    def bytes(self) -> int:
        return sum(removal.bytes for removal in self.removals)

    def as_json(self) -> dict[str, Any]:
        removals = [asdict(removal) for removal in self.removals]
        return {"removals": removals, "bytes": self.bytes, "unclear": self.unclear, "working": self.working}

    def remove(self) -> None:
        """Remove what can be removed. Raises `RuntimeError`, and changes nothing, if a process works in the storage."""
        root = self.contents.root
        if self.working:
            raise RuntimeError(
                f"nothing was removed: a process works in {', '.join(self.working)}; wait until it ends, or end it"
            )
        trash: list[tuple[Path, Path]] = []
        try:
            for removal in self.removals:
                path = root / removal.name
                if path.exists() and not self.contents.is_linked(removal.name):
                    trash.append((path, temporary_beside(path, "old")))
                    os.replace(*trash[-1])
            now = self.contents.again()
            if _descriptions(now) - _descriptions(self.contents) or now.held(ABANDONED_SECONDS):
                # a process started, and may need what was moved away
                raise RuntimeError("nothing was removed: another process began to work in the storage; try again later")
        except BaseException:
            for path, moved in trash:
                if moved.exists() and not path.exists():
                    with contextlib.suppress(OSError):  # the others can still be put back
                        os.replace(moved, path)
            raise
        for _, moved in trash:
            remove(moved)


def _descriptions(contents: Contents) -> set[tuple[str, Stamp]]:
    """Return the files that describe the work in a storage, with their sizes and times."""
    names = (name for patterns in KINDS.values() for pattern in patterns for name in contents.find(pattern))
    files = (name for name in names if name in contents.files and not any(map(is_temporary, name.split("/"))))
    return {(name, contents.files[name]) for name in files}


def plan_cleaning(
    contents: Contents,
    drop: Sequence[str] = (),
    older_than: float = 0.0,
    keep_experts: bool = False,
) -> Cleaning:
    """Return what can be removed from a storage; changes nothing.

    `drop` names runs and other work to remove, by their folders or by patterns with `*`. Only what has not changed for
    `older_than` seconds is removed. Raises `ValueError` for an unknown name, and for work that others need or may need.
    """
    works, old = works_in(contents), time.time() - older_than if older_than else math.inf
    dropped = _dropped(contents, works, drop, old)
    kept = [work for work in works if work.folder not in dropped]
    needed: dict[str, str] = {}
    unclear: dict[str, str] = {}
    other_baselines = False  # whether some baselines have names that cannot be computed
    for work in kept:
        try:
            needed |= dict.fromkeys(work.needs(), work.folder)
            other_baselines |= _is_of_another_version(work) or work.kind == "training"
        except ERRORS as error:
            unclear[work.folder] = str(error) or type(error).__name__
            others = [w.folder for w in works if w.folder in dropped and w.kind in ("run", "coreset", "search")]
            if others and work.kind in ("sweep", "search", "comparison"):
                raise ValueError(
                    f"this version of rmdd cannot tell whether {work.folder} needs {others[0]}; drop it too with --run "
                    f"{work.folder}, or keep {others[0]}. {work.folder}: {unclear[work.folder]}"
                ) from error
    for name, owner in needed.items():
        for folder in (name, *map(str, PurePosixPath(name).parents)):
            if folder in dropped:
                raise ValueError(f"{owner} needs {folder}; drop it too with --run {owner}, or keep {folder}")
    removals = dict(dropped)
    if not unclear:
        kinds = SHARED_PATTERNS.keys() - ({"experts"} if keep_experts else set())
        kinds -= {"baselines"} if other_baselines else set()
        found = dict.fromkeys((*_unneeded(contents, kinds, needed), *_of_comparisons(contents, kept)), UNNEEDED)
        found |= dict.fromkeys(_path_starts(contents, kept), "its phase is finished")
        found |= dict.fromkeys(unused_cache(contents, kept), "nothing in this storage would read it again")
        removals |= {name: why for name, why in found.items() if contents.usage(name).changed <= old}
    removals |= dict.fromkeys(_locks(contents), "lock of an older version, which nobody holds")
    removals |= {contents.name(p): "left by a process that was killed" for p in abandoned_in(contents.root)}
    outermost = [n for n in sorted(removals) if not any(str(p) in removals for p in PurePosixPath(n).parents)]
    own = [name for name in outermost if not contents.is_linked(name)]
    listed = [Removal(name, contents.usage(name).bytes, removals[name]) for name in own]
    return Cleaning(contents, listed, unclear, sorted(contents.held(ABANDONED_SECONDS)))


def _dropped(contents: Contents, works: Sequence[StoredWork], names: Sequence[str], old: float) -> dict[str, str]:
    """Return the folders of the work that `names` match, with reasons; of a search, also its trials.

    Work that changed after the time `old` is kept. So are trials that were evaluated as runs, or belong to another
    search too, and base runs of searches. The folders in which finished models were trained are dropped in any case.
    """
    dropped: dict[str, str] = {}
    for name in names:
        patterns = {name.rstrip("/"), *contents.names_in(Path(name))}
        matches = [
            w for w in works if w.path.name in patterns or any(fnmatchcase(w.folder, pattern) for pattern in patterns)
        ]
        if not matches:
            near = get_close_matches(min(patterns, key=len), [w.folder for w in works], 1)
            hint = f"did you mean {near[0]}?" if near else "`rmdd runs` lists all names"
            raise ValueError(f"--run {name}: no {', '.join(KINDS)} has this folder; {hint}")
        if linked := [work.folder for work in matches if contents.is_linked(work.folder)]:
            raise ValueError(f"--run {name}: {linked[0]} is a link or lies in a linked folder; remove it by hand")
        dropped |= {w.folder: f"named by --run {name}" for w in matches if contents.usage(w.folder).changed <= old}
    for folder in finished_trainings(works):
        if contents.usage(folder).changed <= old and not contents.is_linked(folder):
            dropped.setdefault(folder, "its model is finished")
    searches = [(work, *_trials(work)) for work in works if work.kind == "search"]
    others = {base for _, base, _ in searches}
    others |= {trial for work, _, trials in searches if work.folder not in dropped for trial in trials}
    for work, _, trials in searches:
        for trial in trials - others if work.folder in dropped else ():
            evaluated = f"{trial}/evaluation.json" in contents.files
            if not evaluated and 0 < contents.usage(trial).changed <= old and not contents.is_linked(trial):
                dropped.setdefault(trial, f"a trial of {work.folder}")
    return dropped


def _trials(search: StoredWork) -> tuple[str, set[str]]:
    """Return the folder of a search's base run, and those of its trials; none if they cannot be read."""
    try:
        return search.run.folder_name, set(search.members)
    except ERRORS:
        return "", set()


def _is_of_another_version(work: StoredWork) -> bool:
    """Return whether a finished run has other experts than this version would give it.

    Raises `ValueError` if a run that is not finished has worked on experts or phases that are not where this version
    looks for them: it is not known which of those in the storage are its own.
    """
    if work.kind != "run" or not (work.path / "run.yaml").is_file():
        return False
    paths = paths_in(work.run, work.path)
    if paths is None:
        return False
    if (work.path / "set" / DESCRIPTION).is_file():
        made_from = read_json(work.path / "set" / DESCRIPTION)["provenance"]
        return bool(made_from["experts"] != paths.store.name)
    seconds = work.results("seconds.json")
    for step, path in (("experts", paths.store), ("distill", paths.phases)):
        if seconds.get(step) and not path.is_dir():
            raise ValueError(
                f"it has worked on {work.contents.name(path.parent)} that this version of rmdd does not find: another "
                "version wrote them, or they were deleted"
            )
    return False


def _unneeded(contents: Contents, kinds: set[str], needed: dict[str, str]) -> Iterator[str]:
    """Yield the shared folders that no kept work needs, and what unfinished work left for them."""
    for kind in sorted(kinds):
        for name in (name for pattern in SHARED_PATTERNS[kind] for name in contents.find(pattern)):
            if name not in needed and (kind != "data" or f"{name}/manifest.json" in contents.files):
                yield name
    parts = [(n, f"data/{n[len('data/.') : -len('.parts')]}") for n in contents.find(f"data/.{HEX}.parts")]
    fleets = [(n, f"experts/{n.rpartition('-')[2]}") for n in contents.find(f"fleets/experts-{HEX}")]
    for name, result in [*parts, *fleets]:
        if result not in needed and time.time() - contents.usage(name).changed > ABANDONED_SECONDS:
            yield name


def _of_comparisons(contents: Contents, kept: Sequence[StoredWork]) -> list[str]:
    """Return the students and pairs of comparisons if no comparison and no analysis is left that may need them."""
    if any(work.kind in ("comparison", "training") for work in kept) or contents.find("*/analyse"):
        return []
    return [*contents.find("comparisons/pairs/*"), *contents.find(f"comparisons/students/{HEX}")]


def _path_starts(contents: Contents, kept: Sequence[StoredWork]) -> set[str]:
    """Return the folders with the students from which paths of finished phases started."""
    unused: set[str] = set()
    used: set[str] = set()
    for work in kept:
        if work.kind != "run" or not (work.path / "run.yaml").is_file():
            continue
        run, paths = planned(work.run, work.path), paths_in(work.run, work.path)
        if paths is None or not is_chained(run.distill):
            continue
        for p in range(1, len(run.distill.phases)):
            sets = [paths.set(p, iteration) for iteration in segment_ends(run.distill, p)]
            name = contents.name(paths.phase(p) / "path-starts")
            done = all(file.is_file() for file in sets) and is_finished(run, paths, p)
            (unused if done else used).add(name)
    return {name for name in unused - used if contents.usage(name).changed}


def _locks(contents: Contents) -> list[str]:
    """Return the lock files of older versions that no process of this machine holds."""
    held = contents.held()
    found = {name for pattern in OLD_LOCKS for name in contents.find(pattern) if name in contents.files}
    return [n for n in found if contents.usage(n).bytes == 0 and n.removesuffix(".lock") not in held]
