"""Checks of `rmdd verify` for sweeps and searches."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.artefact import distilled
from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import read_json
from rmdd.distill.trajectory.planning import PLAN, with_plan
from rmdd.runs.verify import RECREATE, verify_records, verify_run, verify_sources


def verify_sweep(path: Path, check: DiskCheck) -> None:
    """Check the files of a sweep and all its runs."""
    if not check.begin(path):
        return
    _json_files(path, "sweep", check)
    with check.errors_as_faults(path / "sweep.json", "start the sweep again; finished runs are not repeated"):
        root = path.parents[1]
        for member in read_json(path / "sweep.json")["members"]:
            folder = root / config.load(member["run"]).folder_name
            check.storage.fetch(folder)
            if (folder / "run.yaml").is_file():
                verify_run(folder, check)
            else:
                check.unfinished(folder)


def verify_search(path: Path, check: DiskCheck) -> None:
    """Check the files of a search and the runs of its trials. If the folder contains a database, check it too."""
    if not check.begin(path):
        return
    _json_files(path, "search", check)
    with check.errors_as_faults(path / "search.json", "start the search again; finished trials are not repeated"):
        config.load(read_json(path / "search.json")["run"])
    if (path / "study.db").is_file():
        _database(path / "study.db", check)
    rows: dict[int, dict[str, Any]] = {}
    if (path / "results.json").is_file():
        with check.errors_as_faults(path / "results.json", RECREATE.format("search")):
            rows = {row["number"]: row for row in read_json(path / "results.json")["trials"]}
    for file in sorted(path.glob("trials/*/run.yaml")):
        with check.errors_as_faults(file, "resume the search, which writes the file again"):
            _trial(path.parents[1], config.load(file), rows.get(int(file.parent.name), {"state": "open"}), check)
    if (path / "best.yaml").is_file():
        with check.errors_as_faults(path / "best.yaml", "resume the search, which writes the file again"):
            config.load(path / "best.yaml")


def _trial(root: Path, run: config.Run, row: dict[str, Any], check: DiskCheck) -> None:
    """Check the experts and phases that a trial uses. If a full run with the same values exists, check that run too."""
    folder = root / run.folder_name
    check.storage.fetch(folder)
    if (folder / "set" / distilled.DESCRIPTION).is_file():
        verify_run(folder, check)
    elif row["state"] == "open":
        check.unfinished(folder)
    if not check.begin(folder):
        return
    verify_records(folder, check, "search")
    if "phases" not in row or not (folder / "data.json").is_file():
        return
    if run.distill.plan.plans:
        run = with_plan(run, read_json(folder / PLAN))
    verify_sources(root, run, row, read_json(folder / "data.json"), check, finished=row["state"] == "complete")


def _json_files(path: Path, kind: str, check: DiskCheck) -> None:
    for file in sorted(path.glob("*.json")):
        check.json(file, RECREATE.format(kind))
    check.lines(path / "events.jsonl")


def _database(path: Path, check: DiskCheck) -> None:
    """Check a SQLite file with `PRAGMA integrity_check`, without changing the file."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            wrong = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        wrong = str(error)
    if wrong != "ok":
        check.fault(path, f"is a damaged database: {wrong}", "restore a copy, or delete it to search from zero")


SWEEPS = Format(("sweep.json",), "sweeps/*", verify_sweep)
SEARCHES = Format(("search.json",), "searches/*", verify_search)
