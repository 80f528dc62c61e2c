"""The runs, sweeps, searches, comparisons, coresets and models of a storage, and what each of them needs.

What is needed follows from the run files by the functions that name the folders of results. A folder is needed if its
owner could not be verified, or would compute something again when it is resumed, without that folder.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rmdd import config
from rmdd.artefact import distilled
from rmdd.comparisons import transfer
from rmdd.core.files import is_temporary, read_json
from rmdd.inventory.contents import Contents
from rmdd.runs.needs import datasets_of, needs_of_probes, needs_of_run, paths_in

ERRORS = (ValueError, OSError, KeyError, TypeError, AttributeError, yaml.YAMLError)
"""Errors of reading files of another version, or damaged ones."""
KINDS = {
    "run": ("*/run.yaml", "*/probes/*.json"),
    "sweep": ("sweeps/*/sweep.json",),
    "search": ("searches/*/search.json",),
    "comparison": ("comparisons/*/comparison.json",),
    "coreset": ("coresets/*/subset.json",),
    "model": ("models/*/model.json",),
    "training": ("comparisons/*-train/protocol/run.yaml",),
}
"""Patterns of the files by which the folders of each kind are recognised."""


@dataclass
class StoredWork:
    """A run, sweep, search, comparison (or transfer), coreset, model, or training of a model on real pairs."""

    contents: Contents
    kind: str
    folder: str
    """Name of its folder, relative to the storage."""

    @property
    def path(self) -> Path:
        return self.contents.root / self.folder

    @property
    def results_path(self) -> Path:
        """The folder with the run file and the results of the run."""
        return self.path / "protocol" if self.kind == "training" else self.path

    @cached_property
    def run(self) -> config.Run:
        """The run, or the run with the data and the protocol of a search or comparison. Raises one of `ERRORS`."""
        if self.kind in ("run", "training"):
            return self.load(yaml.safe_load((self.results_path / "run.yaml").read_text(encoding="utf-8")))
        return self.load(read_json(self.path / f"{self.kind}.json")["run"])

    def load(self, raw: Mapping[str, Any]) -> config.Run:
        """Load a run file that lies in this storage, wherever the storage was when the file was written."""
        return config.load({**raw, "runtime": {**raw["runtime"], "storage": str(self.contents.root)}})

    @cached_property
    def members(self) -> dict[str, config.Run]:
        """The runs of a sweep, and the trials of a search, by the name of their folder."""
        if self.kind == "sweep":
            runs = [self.load(m["run"]) for m in read_json(self.path / "sweep.json")["members"]]
        elif self.kind == "search":
            files = [self.contents.root / file for file in self.contents.find(f"{self.folder}/trials/*/run.yaml")]
            runs = [self.load(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files]
        else:
            runs = []
        return {run.folder_name: run for run in runs}

    def results(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file in the folder; empty if it is missing or damaged."""
        with contextlib.suppress(*ERRORS):
            content: dict[str, Any] = read_json(self.path / name)
            return content
        return {}

    def needs(self) -> set[str]:
        """Return the files and folders that this work needs besides its own. Raises one of `ERRORS` if one is unknown.

        Each is relative to the storage, and may be missing.
        """
        return {name for path in self._needed() for name in self.contents.names_in(path)}

    def _needed(self) -> Iterator[Path]:
        root = self.contents.root
        if self.kind == "coreset":
            yield from _of_coreset(self.path, self.contents)
        elif self.kind == "comparison":
            yield from _of_comparison(self)
        elif self.kind == "run" and not (self.path / "run.yaml").is_file():
            yield from needs_of_probes(self.path)  # the probes of a set without its run
        elif self.kind in ("run", "training"):
            yield from needs_of_run(self.run, self.results_path)
        if self.kind == "search":
            yield root / self.run.folder_name
            yield from needs_of_run(self.run, root / self.run.folder_name)
            for address in self.run.search.warm_start:
                yield from (Path(address).absolute(), root / "searches" / Path(address).name)
        for name, run in self.members.items():
            yield root / name
            yield from needs_of_run(run, root / name)


def works_in(contents: Contents) -> list[StoredWork]:
    """Return all work in a storage, by kind and name."""
    found = {}
    for kind, patterns in KINDS.items():
        for pattern in patterns:
            for file in contents.find(pattern):
                folder = "/".join(file.split("/")[: 1 if kind == "run" else 2])
                if not any(map(is_temporary, folder.split("/"))):
                    found[folder] = StoredWork(contents, kind, folder)
    return list(found.values())


def finished_trainings(works: Sequence[StoredWork]) -> set[str]:
    """Return the folders in which models were trained on real pairs that are finished."""
    models = {f"comparisons/{work.path.name}-train" for work in works if work.kind == "model"}
    return {work.folder for work in works if work.kind == "training"} & models


def _of_coreset(folder: Path, contents: Contents) -> Iterator[Path]:
    subset = read_json(folder / "subset.json")
    for manifest in contents.find("data/*/manifest.json"):
        file = contents.root / manifest
        if read_json(file)["data_hash"] == subset["data_hash"]:
            yield file.parent
    if "store" in subset["features"]:
        yield contents.root / "experts" / subset["features"]["store"]


def _of_comparison(work: StoredWork) -> Iterator[Path]:
    """Yield the compared sets and coresets, the phases that they were made from, and the baselines of the students."""
    raw, run = read_json(work.path / "comparison.json"), work.run
    root, old = work.contents.root, raw["run"]["runtime"]["storage"].rstrip("/")
    for address in filter(None, (word.partition("=")[2] for word in raw["words"])):
        for path in (Path(address), root / address.rpartition(f"{old}/")[2]):  # the storage may have been moved
            yield path
            for folder in (path, path / "set"):
                if (folder / distilled.DESCRIPTION).is_file():
                    made_from = read_json(folder / distilled.DESCRIPTION)["provenance"]
                    yield root / "phases" / str(made_from.get("phases", ""))
    runs = [(run, work.path / "protocol")]
    if raw["verb"] == "transfer":
        runs = [(run, work.path / "towers" / "00")]
        runs += [(transfer.target(run, to), work.path / "towers" / f"{k:02d}") for k, to in enumerate(raw["to"], 1)]
    budgets = [int(w.partition(":")[2]) for w in raw["words"] if w.startswith("random:")]
    for one, folder in runs:
        yield from datasets_of(one, folder)
        for budget in (one.distill.budget, *budgets):
            changed = one.model_copy(update={"distill": one.distill.model_copy(update={"budget": budget})})
            if (paths := paths_in(changed, folder)) is not None:
                yield from (paths.store, paths.baseline)
