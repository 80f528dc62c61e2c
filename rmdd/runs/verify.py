"""`rmdd verify`: what in a folder that rmdd wrote is not as it was written.

Reads everything: schema versions, manifests, sizes, SHA-256, headers, whether numbers are finite, and whether what a
finished run was made from is still there. Work that is not finished is no fault. Touches nothing.
"""

import contextlib
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rmdd import config
from rmdd.artefact.distilled import DESCRIPTION, DistilledSet
from rmdd.core.files import is_temporary, read_json, sha256_file
from rmdd.core.storage import Mirror, Storage, is_uri
from rmdd.core.tensors import Damaged, load_checked
from rmdd.coresets.forgetting import FILE as FORGETTING
from rmdd.coresets.subset import DESCRIPTION as SUBSET
from rmdd.coresets.subset import Coreset
from rmdd.data.shards import MANIFEST, Dataset
from rmdd.distill.trajectory.matching import snapshot_iterations
from rmdd.distill.trajectory.planning import PLAN, with_phases
from rmdd.experts.store import Store

PHASE_FILES = ("start.safetensors", "state.safetensors", "records.json")


@dataclass(frozen=True)
class Fault:
    path: str
    wrong: str
    todo: str


@dataclass
class Findings:
    """What `verify` looked at, what is broken, and what is merely not finished."""

    checked: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(place: str) -> Findings:
    """Check a dataset, a store, a phase, a distilled set, a run, a sweep, a search, a coreset, a comparison, or a whole
    storage: a folder, or a URI, of which a copy is made in the temporary folder for the time being.

    Raises `ValueError` when there is nothing that rmdd writes.
    """
    if not is_uri(place):
        folder = Path(place).absolute()
        return Verifier(Storage(folder)).folder(folder)
    parent, _, name = place.rstrip("/").rpartition("/")
    with tempfile.TemporaryDirectory(prefix="rmdd-verify-") as scratch:
        if parent.endswith(("/", ":")):
            parent, name = place.rstrip("/"), ""
        for kind in ("sweeps", "searches", "comparisons"):
            if parent.endswith(f"/{kind}"):
                parent, name = parent.removesuffix(f"/{kind}"), f"{kind}/{name}"
        mirror = Mirror(parent, Path(scratch))
        mirror.fetch(mirror.root / name)
        return Verifier(mirror).folder(mirror.root / name)


class Verifier:
    """Looks at each folder once; those of a mirror are fetched first."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.found = Findings()
        self.seen: set[Path] = set()

    def folder(self, path: Path) -> Findings:
        """Check a folder of any kind."""
        if (path / MANIFEST).is_file():
            self.dataset(path)
        elif (path / "store.json").is_file():
            self.store(path)
        elif (path / DESCRIPTION).is_file():
            self.distilled(path)
        elif (path / SUBSET).is_file():
            self.subset(path)
        elif (path / "run.yaml").is_file():
            self.run(path)
        elif (path / "sweep.json").is_file():
            self.sweep(path)
        elif (path / "search.json").is_file():
            self.search(path)
        elif (path / "comparison.json").is_file():
            self.comparison(path)
        elif any((path / name).is_file() for name in PHASE_FILES):
            self.phase(path)
        elif phases := _folders(path, "phase-*"):
            for each in phases:
                self.phase(each)
        elif any((path / name).is_dir() for name in ("data", "experts", "phases")):
            self.whole(path)
        elif not path.exists():
            raise ValueError(f"there is no {self.storage.address(path)}; give a folder that rmdd wrote, or its URI")
        else:
            raise ValueError(
                f"{self.storage.address(path)} holds nothing that rmdd writes (no {MANIFEST}, store.json, "
                f"{DESCRIPTION}, run.yaml, sweep.json, search.json, phase or storage folders); give one of these"
            )
        return self.found

    def whole(self, path: Path) -> None:
        """A storage: all that lies in it."""
        for each in (*_folders(path, "data/*"), *_folders(path, "experts/*")):
            if (each / MANIFEST).is_file():
                self.dataset(each)
            elif (each / "store.json").is_file():
                self.store(each)
            else:
                self.found.unfinished.append(self.storage.address(each))
        for each in _folders(path, "phases/*/phase-*"):
            self.phase(each)
        for record in sorted(path.glob("baselines/*/*.json")):
            self._json(record, "delete it and run again: it is made anew")
        for file in sorted(path.glob("searches/*/search.json")):
            self.search(file.parent)
        for file in sorted(path.glob(f"coresets/*/{SUBSET}")):
            self.subset(file.parent)
        for file in sorted(path.glob("*/run.yaml")):
            self.run(file.parent)
        for file in sorted(path.glob("sweeps/*/sweep.json")):
            self.sweep(file.parent)
        for record in sorted(path.glob("comparisons/students/*/*.json")):
            self._json(record, "delete it and resume its comparison: it is made anew")
        for file in sorted(path.glob("comparisons/*/comparison.json")):
            self.comparison(file.parent)

    def dataset(self, path: Path) -> None:
        """Shards against the manifest, row by row."""
        if not self._begin(path):
            return
        before = len(self.found.faults)
        copy = "copy it again, or delete the dataset and ingest again"
        manifest = self._json(path / MANIFEST, copy)
        with self._told(path / MANIFEST, copy):
            for shard in manifest["shards"]:
                file = path / shard["file"]
                if not file.is_file():
                    self._fault(file, "is missing", copy)
                elif file.stat().st_size != shard["bytes"]:
                    self._fault(file, f"has {file.stat().st_size} bytes, the manifest says {shard['bytes']}", copy)
                elif sha256_file(file) != shard["sha256"]:
                    self._fault(file, "has another SHA-256 than the manifest says", copy)
        if len(self.found.faults) == before:
            with self._told(path, copy):
                Dataset.open(path).verify()

    def store(self, path: Path, experts: int | None = None) -> None:
        """Every kept epoch of every expert; `experts` are expected, else those up to the last that is there."""
        if not self._begin(path):
            return
        with self._told(path / "store.json", "delete the store and train again"):
            store = Store.open(path)
            shared = store.spec["shared"]
            if shared:
                listed, again = store.spec.get("shared_sha256"), "copy it again, or delete the store and train again"
                if listed and store.start.is_file() and sha256_file(store.start) != listed:
                    self._fault(store.start, "has another SHA-256 than store.json says", again)
                else:
                    self._tensors(store.start, {n: store.shapes[n] for n in shared}, again)
            there = [int(p.name.removeprefix("expert-")) for p in _folders(path, "expert-*")]
            for number in range(experts if experts is not None else max(there, default=-1) + 1):
                self._expert(store, number, finished=experts is not None)

    def _expert(self, store: Store, number: int, finished: bool) -> None:
        folder = store.folder(number)
        again = f"delete {self.storage.address(folder)} and train that expert again with `rmdd experts`"
        if not store.is_complete(number):
            if (running := folder / "running.safetensors").is_file():
                self._checked(running, "state", again)
            if finished or not folder.is_dir():
                self._fault(folder, "expert is missing or not finished", "train it with `rmdd experts`")
            else:
                self.found.unfinished.append(self.storage.address(folder))
            return
        with self._told(folder / "expert.json", again):
            record = store.record(number)
            for epoch in (e for e in range(store.epochs + 1) if store.kept(e)):
                file = folder / f"epoch-{epoch:04d}.safetensors"
                listed = record.get("files", {}).get(file.name)
                if not file.is_file():
                    self._fault(file, "is missing", again)
                elif listed and file.stat().st_size != listed["bytes"]:
                    self._fault(file, f"has {file.stat().st_size} bytes, expert.json says {listed['bytes']}", again)
                elif listed and sha256_file(file) != listed["sha256"]:
                    self._fault(file, "has another SHA-256 than expert.json says", again)
                else:
                    names = set(store.shapes) - (set(store.spec["shared"]) if epoch == 0 else set())
                    self._tensors(file, {n: store.shapes[n] for n in names}, again)
            if FORGETTING in record.get("files", {}):
                self._checked(folder / FORGETTING, "forgetting", again)

    def subset(self, path: Path) -> None:
        """A coreset can be read."""
        if self._begin(path):
            with self._told(path / SUBSET, f"delete {self.storage.address(path)} and choose it again"):
                Coreset.load(path)

    def phase(self, path: Path, phase: config.Phase | None = None, snapshots: int = 1) -> None:
        """Checkpoints, sets and logs; a finished `phase` must have all its snapshots."""
        if not self._begin(path):
            return
        again = f"delete {self.storage.address(path)} to distil that phase again"
        for file in sorted(path.glob("*.safetensors")):
            is_state = file.name in ("state.safetensors", "good.safetensors")
            todo = f"delete it and run again, or {again}" if is_state else again
            self._checked(file, "state" if is_state else "set", todo)
        if (path / "records.json").is_file():
            self._json(path / "records.json", again)
        for log in sorted(path.glob("*.jsonl")):
            self._lines(log)
        for iteration in snapshot_iterations(phase.iterations, snapshots) if phase else ():
            file = path / f"set-{iteration:06d}.safetensors"
            if not file.is_file():
                self._fault(file, "is missing", again)

    def distilled(self, path: Path) -> None:
        """The distilled set, as its reader finds it."""
        if not self._begin(path):
            return
        again = "get the set again, or write it again with `rmdd report`"
        before = len(self.found.faults)
        info = self._json(path / DESCRIPTION, again)
        for name, sha256 in (info or {}).get("sha256", {}).items():
            if not (path / name).is_file():
                self._fault(path / name, "is missing", again)
            elif sha256_file(path / name) != sha256:
                self._fault(path / name, f"has another SHA-256 than {DESCRIPTION} says", again)
        if len(self.found.faults) == before:
            with self._told(path, again):
                DistilledSet.load(path)

    def run(self, path: Path) -> None:
        """A run's own files and, where it is finished, all that it was made from."""
        if not self._begin(path):
            return
        for file in sorted((*path.glob("*.json"), *path.glob("students/*.json"))):
            self._json(file, "delete it and resume the run: it is made anew")
        for log in sorted(path.glob("*.jsonl")):
            self._lines(log)
        with self._told(path / "run.yaml", "write the run file anew with the values of before, or begin another run"):
            run = config.load(path / "run.yaml")
            if run.distill.plan.plans:
                run = self._planned(path / PLAN, run)
            if path.name != run.folder_name:
                self._fault(path / "run.yaml", "means another run than its folder is named after", "name it back")
            if not (path / "set" / DESCRIPTION).is_file():
                self.found.unfinished.append(self.storage.address(path))
                return
            self.distilled(path / "set")
            made_from = read_json(path / "set" / DESCRIPTION)["provenance"]
            self._sources(path.parent, run, made_from, read_json(path / "data.json"))

    def _planned(self, path: Path, run: config.Run) -> config.Run:
        """`run` with the phases of its plan, which is there once anything was distilled."""
        again = "delete it and resume the run: it is made anew"
        if not path.is_file():
            if (path.parent / "set" / DESCRIPTION).is_file():
                self._fault(path, "is missing", "resume the run: it is made anew")
            return run
        with self._told(path, again):
            return with_phases(run, read_json(path)["phases"])
        return run

    def sweep(self, path: Path) -> None:
        """A sweep's table and all its runs."""
        if not self._begin(path):
            return
        self._files(path, "sweep")
        with self._told(path / "sweep.json", "begin the sweep again: what its runs have is used"):
            root = path.parents[1]
            for member in read_json(path / "sweep.json")["members"]:
                folder = root / config.load(member["run"]).folder_name
                self.storage.fetch(folder)
                if (folder / "run.yaml").is_file():
                    self.run(folder)
                else:
                    self.found.unfinished.append(self.storage.address(folder))

    def search(self, path: Path) -> None:
        """A search's table, its database where that lies beside it, and the runs of its trials."""
        if not self._begin(path):
            return
        self._files(path, "search")
        with self._told(path / "search.json", "begin the search again: what its trials have is used"):
            config.load(read_json(path / "search.json")["run"])
        if (path / "study.db").is_file():
            self._database(path / "study.db")
        rows: dict[int, dict[str, Any]] = {}
        if (path / "results.json").is_file():
            with self._told(path / "results.json", "delete it and resume the search: it is made anew"):
                rows = {row["number"]: row for row in read_json(path / "results.json")["trials"]}
        for file in sorted(path.glob("trials/*/run.yaml")):
            with self._told(file, "resume the search: it is made anew"):
                self._trial(path.parents[1], config.load(file), rows.get(int(file.parent.name), {"state": "open"}))
        if (path / "best.yaml").is_file():
            with self._told(path / "best.yaml", "resume the search: it is made anew"):
                config.load(path / "best.yaml")

    def _trial(self, root: Path, run: config.Run, row: dict[str, Any]) -> None:
        """What a trial was made from, and the run that repeats it where that has been made."""
        folder = root / run.folder_name
        self.storage.fetch(folder)
        if (folder / "set" / DESCRIPTION).is_file():
            self.run(folder)
        elif row["state"] == "open":
            self.found.unfinished.append(self.storage.address(folder))
        if not self._begin(folder):
            return
        for file in sorted((*folder.glob("*.json"), *folder.glob("students/*.json"))):
            self._json(file, "delete it and resume the search: it is made anew")
        if "phases" not in row or not (folder / "data.json").is_file():
            return
        if run.distill.plan.plans:
            run = with_phases(run, read_json(folder / PLAN)["phases"])
        self._sources(root, run, row, read_json(folder / "data.json"), whole=row["state"] == "complete")

    def comparison(self, path: Path) -> None:
        """The table of a comparison or a transfer."""
        if not self._begin(path):
            return
        for file in sorted(path.glob("*.json")):
            self._json(file, "make the comparison again: students that are there are not trained again")
        if (path / "events.jsonl").is_file():
            self._lines(path / "events.jsonl")
        if not (path / "results.json").is_file():
            self.found.unfinished.append(self.storage.address(path))

    def _sources(
        self, root: Path, run: config.Run, made_from: dict[str, Any], data: dict[str, Any], whole: bool = True
    ) -> None:
        store, phases = root / "experts" / made_from["experts"], root / "phases" / made_from["phases"]
        dataset = Path(data["path"])
        if run.data.source != "dataset":
            dataset = root / "data" / dataset.name
        for each, what in ((dataset, "ingest"), (store, "experts"), (phases, "distill")):
            self.storage.fetch(each)
            if not each.is_dir():
                self._fault(each, "is missing, and the run was made from it", f"run `rmdd {what}` again")
        if dataset.is_dir():
            self.dataset(dataset)
        if store.is_dir():
            self.store(store, run.experts.num)
        for number, phase in enumerate(run.distill.phases) if phases.is_dir() else ():
            self.phase(phases / f"phase-{number}", phase if whole else None, run.distill.snapshots)

    def _files(self, path: Path, what: str) -> None:
        for file in sorted(path.glob("*.json")):
            self._json(file, f"delete it and resume the {what}: it is made anew")
        if (path / "events.jsonl").is_file():
            self._lines(path / "events.jsonl")

    # -- single files ------------------------------------------------------------------------------------------------

    def _begin(self, path: Path) -> bool:
        if path in self.seen:
            return False
        self.seen.add(path)
        self.found.checked.append(self.storage.address(path))
        return True

    def _fault(self, path: Path, wrong: str, todo: str) -> None:
        fault = Fault(self.storage.address(path), wrong, todo)
        if fault not in self.found.faults:
            self.found.faults.append(fault)

    @contextlib.contextmanager
    def _told(self, path: Path, todo: str) -> Iterator[None]:
        """Turn what a reader refuses into a fault."""
        try:
            yield
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            self._fault(path, str(error) if isinstance(error, ValueError | OSError) else repr(error), todo)

    def _json(self, path: Path, todo: str) -> Any:
        with self._told(path, todo):
            return read_json(path)

    def _database(self, path: Path) -> None:
        """SQLite's own check, by a connection that cannot write."""
        try:
            with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
                wrong = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
        except sqlite3.Error as error:
            wrong = str(error)
        if wrong != "ok":
            self._fault(path, f"is no sound database: {wrong}", "bring a copy back; without it a search begins anew")

    def _lines(self, path: Path) -> None:
        """A log may end in the middle of a line, if its writer was killed; no other line may be broken."""
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError:
                self._fault(path, f"line {number} is no JSON", "take the line out; nothing is computed from it")

    def _checked(self, path: Path, entry: str, todo: str) -> None:
        try:
            tensors, _ = load_checked(path, entry)
        except (Damaged, OSError) as error:
            self._fault(path, str(error), todo)
            return
        self._finite(path, tensors, todo)

    def _tensors(self, path: Path, shapes: dict[str, tuple[int, ...]], todo: str) -> None:
        try:
            tensors = load_file(path)
        except Exception as error:
            self._fault(path, f"cannot be read: {error}", todo)
            return
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        wrong = sorted(n for n in found.keys() | shapes.keys() if found.get(n) != shapes.get(n))
        if wrong:
            n = wrong[0]
            self._fault(path, f"{n} is {found.get(n, 'missing')}, store.json says {shapes.get(n, 'nothing')}", todo)
        self._finite(path, tensors, todo)

    def _finite(self, path: Path, tensors: dict[str, torch.Tensor], todo: str) -> None:
        bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
        if bad:
            self._fault(path, f"{len(bad)} tensors hold numbers that are not finite (first: {bad[0]})", todo)


def _folders(path: Path, pattern: str) -> list[Path]:
    return sorted(p for p in path.glob(pattern) if p.is_dir() and not is_temporary(p.name))
