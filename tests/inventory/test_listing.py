"""Tests of `rmdd runs`: rows, stages, scores, disk use, storages at a URI, and run files that cannot be loaded."""

import json

import pytest
import works
from typer.testing import CliRunner

from rmdd.cli import app as cli
from rmdd.core.files import read_json
from rmdd.core.locks import hold_folder
from rmdd.core.storage import run_folder
from rmdd.inventory.contents import open_contents
from rmdd.inventory.listing import listed


def rows_of(address):
    """Return the rows by folder without the hash; of the two runs of the sweep, the one that changed first."""
    with open_contents(str(address)) as contents:
        return {row.folder.rpartition("-")[0]: row for row in listed(contents)}


def rmdd(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def rows(made):
    return rows_of(made)


def test_every_kind_of_work_has_a_row_with_its_stage(rows):
    assert {name: (row.kind, row.stage) for name, row in rows.items()} == {
        "swept": ("run", "finished"),
        "chained": ("run", "distilled"),
        "begun": ("run", "distilling 2 of 3"),
        "trained": ("run", "experts"),
        "ingested": ("run", "ingested"),
        "sweeps/swept": ("sweep", "2 of 2 runs"),
        "searches/searched": ("search", "2 of 2 trials"),
        "comparisons/swept": ("comparison", "finished"),
        "comparisons/swept-transfer": ("comparison", "finished"),
        "coresets/ingested-random": ("coreset", "finished"),
        "models/swept-set": ("model", "finished"),
        "models/swept-random": ("model", "finished"),
    }
    assert not any(row.problem or row.running for row in rows.values())


def test_scores_are_those_of_the_evaluation(rows, made):
    table = read_json(made / rows["swept"].folder / "evaluation.json")["table"]["ptm_st"]
    assert (rows["swept"].val, rows["swept"].test) == tuple(
        table[split]["R@mean"]["mean"] for split in ("val", "test_last")
    )
    trials = read_json(made / rows["searches/searched"].folder / "results.json")["trials"]
    assert rows["searches/searched"].val == max(trial["val"] for trial in trials)
    assert rows["begun"].val is None and rows["begun"].budget == 12


def test_disk_is_that_of_the_folder_and_of_what_it_needs(rows, made):
    size = lambda folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())  # noqa: E731
    assert rows["trained"].bytes == size(made / rows["trained"].folder)
    data = read_json(made / rows["trained"].folder / "data.json")["path"]
    (store,) = (p.parent for p in made.glob("experts/*/store.json") if read_json(p)["protocol"]["seed"] == 1)
    assert rows["trained"].shared_bytes == size(made / "data" / data.rpartition("/")[2]) + size(store)


def test_a_storage_at_a_uri_has_the_same_rows(rows, made):
    at_uri = rows_of(f"file://{made}")
    assert at_uri.keys() == rows.keys()
    for name, row in at_uri.items():
        assert (row.stage, row.val, row.bytes) == (rows[name].stage, rows[name].val, rows[name].bytes)


def test_a_run_in_which_a_process_works_is_marked(storage):
    with hold_folder(run_folder(works.run_of(storage, "trained", experts={"seed": 1})), wait=False):
        assert [name for name, row in rows_of(storage).items() if row.running] == ["trained"]


def test_a_run_file_of_another_version_is_reported_in_its_row(storage):
    (folder,) = storage.glob("begun-*")
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text() + "gone: 1\n")
    done = rmdd("runs", storage)
    assert done.exit_code == 0 and f"{folder.name}: cannot be loaded by this version of rmdd" in done.stdout
    (row,) = (row for row in json.loads(rmdd("runs", storage, "--json").stdout) if row["folder"] == folder.name)
    assert row["stage"] == "unknown" and "gone: unknown key" in row["problem"] and row["bytes"] > 0


def test_the_command_prints_a_line_per_row(made, rows):
    words = rmdd("runs", made).stdout
    assert all(row.folder[:30] in words and row.stage in words for row in rows.values())


def test_a_folder_that_is_no_storage_is_refused(made, tmp_path):
    for folder in (tmp_path, tmp_path / "absent", next(made.glob("begun-*"))):
        done = rmdd("runs", folder)
        assert done.exit_code == 1 and f"{folder} is no storage of rmdd" in done.stderr
