"""Tests that a storage with a different layout number raises an error before any of its files is read or changed."""

import json

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from rmdd import config
from rmdd.cli.app import app
from rmdd.cli.loading import load_folder
from rmdd.comparisons import resume as comparisons
from rmdd.comparisons.entries import open_entry, source_run
from rmdd.core.files import write_json
from rmdd.core.layout import LAYOUT, require_layout
from rmdd.core.remote import ObjectStore
from rmdd.core.storage import open_storage, run_folder
from rmdd.execution.backend import hold_folders
from rmdd.searches import base_run_in
from rmdd.searches.formats import verify
from rmdd.searches.sweeps import members_in
from rmdd.searches.warm_start import earlier_trials

OLD = ("experts/0123abcd/store.json", "phases/0123abcd/phase-0/start.safetensors", "tiny-0123abcd/run.yaml")


def storage_of(tmp_path, where):
    folder = tmp_path / "runs"
    folder.mkdir(exist_ok=True)
    address = f"file://{folder}" if where == "uri" else str(folder)
    return folder, open_storage(config.Runtime(storage=address, scratch=str(tmp_path / "scratch")))


def test_the_layout_number_is_written_at_the_first_use(tmp_path):
    tiny.go(config.load(tiny.stored(tmp_path)), "ingest")
    assert json.loads((tmp_path / "storage.json").read_text()) == {"layout": LAYOUT}
    tiny.go(config.load(tiny.stored(tmp_path)), "ingest")


@pytest.mark.parametrize("where", ["folder", "uri"])
@pytest.mark.parametrize("file", OLD)
def test_a_storage_of_the_previous_release_is_refused(tmp_path, file, where):
    folder, storage = storage_of(tmp_path, where)
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("{}")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=rf"layout {LAYOUT}, and .*runs has layout 1; set runtime.storage to another"):
        require_layout(storage)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("where", ["folder", "uri"])
def test_a_storage_with_another_layout_number_is_refused(tmp_path, where):
    folder, storage = storage_of(tmp_path, where)
    write_json(folder / "storage.json", {"layout": LAYOUT + 1})
    with pytest.raises(ValueError, match=rf"has layout {LAYOUT + 1}; .* sets in it still load with rmdd.load"):
        require_layout(storage)


@pytest.mark.parametrize("text", ["", "{", "[2]"])
def test_a_damaged_storage_json_is_reported(tmp_path, text):
    folder, storage = storage_of(tmp_path, "folder")
    (folder / "storage.json").write_text(text)
    with pytest.raises(
        ValueError,
        match='storage.json is damaged; if this release of rmdd created the storage, write {"layout": 2} into the file',
    ):
        require_layout(storage)


def test_verify_reports_a_damaged_storage_json_beside_other_faults(tmp_path):
    tiny.go(config.load(tiny.stored(tmp_path)), "ingest")
    (tmp_path / "storage.json").write_text("{")
    faults = {fault.path: fault for fault in verify(str(tmp_path)).faults}
    assert faults[str(tmp_path / "storage.json")].wrong == "is damaged"


def test_a_folder_of_run_files_is_no_storage(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text(config.dump(config.load(tiny.stored(tmp_path / "runs"))))
    done = CliRunner().invoke(app, ["resume", str(tmp_path / "mine")])
    assert done.exit_code == 2 and "start it with `rmdd run" in done.stderr
    require_layout(open_storage(config.Runtime(storage=str(tmp_path))))


def test_a_run_stops_at_an_old_storage(tmp_path):
    (tmp_path / OLD[0]).parent.mkdir(parents=True)
    (tmp_path / OLD[0]).write_text("{}")
    with pytest.raises(ValueError, match="has layout 1"):
        tiny.go(config.load(tiny.stored(tmp_path)))
    assert not list(tmp_path.glob("tiny-*"))


BEGUN = [
    ("tiny-0123abcd/run.yaml", load_folder),
    ("sweeps/tiny-0123abcd/sweep.json", members_in),
    ("searches/tiny-0123abcd/search.json", base_run_in),
    ("comparisons/tiny-0123abcd/comparison.json", comparisons.comparison_in),
]
"""Files whose fields were different in the previous release, each with the function that reads it."""


def old(tmp_path, file):
    """Create a storage of the previous release; `file` in it contains a run with a field that no longer exists."""
    write_json(tmp_path / "runs" / OLD[0], {})
    path = tmp_path / "runs" / file
    path.parent.mkdir(parents=True)
    run = {"name": "tiny", "gone": {"field": 1}}
    path.write_text(json.dumps({**run, "run": run, "members": [{"run": run, "settings": {}}], "trials": []}))
    return path.parent


@pytest.mark.parametrize("where", ["folder", "uri"])
@pytest.mark.parametrize(("file", "read"), BEGUN)
def test_files_of_the_previous_release_are_refused_before_they_are_parsed(tmp_path, monkeypatch, where, file, read):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = old(tmp_path, file)
    with pytest.raises(ValueError, match="runs has layout 1; .* if you copied folders of a newer storage, copy its"):
        read(str(folder) if where == "folder" else f"file://{folder}")


@pytest.mark.parametrize("command", [["resume"], ["probe", "--probes", "p.yaml"], ["search", "--resume"]])
def test_commands_on_a_folder_of_an_old_storage_say_what_to_do(tmp_path, command):
    folder = old(tmp_path, BEGUN[2][0] if command[0] == "search" else BEGUN[0][0])
    done = CliRunner().invoke(app, [*command, str(folder)])
    assert done.exit_code == 1 and done.stderr.startswith("error: this release of rmdd reads storages of layout 2")


def test_a_comparison_of_sets_in_an_old_storage_is_refused(tmp_path):
    run = config.load(tiny.stored(tmp_path))
    tiny.go(run)
    (tmp_path / "storage.json").unlink()
    with pytest.raises(ValueError, match="has layout 1"):
        source_run(open_entry(str(run_folder(run) / "set")))


def test_a_warm_start_from_a_search_of_the_previous_release_is_refused(tmp_path):
    folder = old(tmp_path, "searches/tiny-0123abcd/results.json")
    with pytest.raises(
        config.ConfigError, match=f"warm_start: cannot use {folder}, remove it: this release .* has layout 1"
    ):
        earlier_trials(config.Search(warm_start=[str(folder)]), {}, "tiny")


@pytest.mark.parametrize("where", ["folder", "uri"])
@pytest.mark.parametrize("part", ["", *(f"/{file}" for file, _ in BEGUN[:3])])
def test_verify_of_an_old_storage_reports_only_the_layout(tmp_path, where, part):
    folder = old(tmp_path, part[1:] or BEGUN[0][0])
    write_json(tmp_path / "runs" / OLD[0], {})
    path = tmp_path / "runs" if not part else folder
    (fault,) = verify(f"file://{path}" if where == "uri" else str(path)).faults
    assert fault.path == ("file://" if where == "uri" else "") + str(tmp_path / "runs")
    assert fault.wrong.startswith("has layout 1") and fault.todo.startswith("verify it with the release that wrote it")


@pytest.mark.parametrize("where", ["folder", "uri"])
def test_check_reports_an_old_storage_and_writes_nothing(tmp_path, where):
    folder = old(tmp_path, BEGUN[0][0]).parent
    run = tiny.stored(f"file://{folder}" if where == "uri" else folder)
    run["runtime"]["scratch"] = str(tmp_path / "scratch")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")])
    assert done.exit_code == 2 and "has layout 1; set runtime.storage to another" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_no_temporary_file_is_removed_from_an_old_storage(tmp_path, monkeypatch):
    folder = old(tmp_path, BEGUN[0][0]).parent
    monkeypatch.setattr("rmdd.core.storage.Storage.begin", lambda self: pytest.fail("written to"))
    runtime = config.Runtime(storage=str(folder))
    with pytest.raises(ValueError, match="has layout 1"), hold_folders(runtime):
        pass


def test_a_bucket_with_a_layout_number_is_not_listed(tmp_path, monkeypatch):
    _, storage = storage_of(tmp_path, "uri")
    require_layout(storage)
    monkeypatch.setattr(ObjectStore, "list", lambda self, name: pytest.fail(f"listed {name}"))
    require_layout(storage)


@pytest.mark.parametrize("where", ["folder", "uri"])
@pytest.mark.parametrize("file", OLD)
def test_an_old_storage_inside_a_new_one_does_not_count_as_its_results(tmp_path, file, where):
    folder, storage = storage_of(tmp_path, where)
    (folder / "inner" / file).parent.mkdir(parents=True)
    (folder / "inner" / file).write_text("{}")
    require_layout(storage)
    assert json.loads((folder / "storage.json").read_text()) == {"layout": LAYOUT}
