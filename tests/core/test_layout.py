"""A storage of another layout is refused before anything in it is touched."""

import json

import pytest
import tiny

from rmdd import config
from rmdd.core.files import write_json
from rmdd.core.layout import LAYOUT, require_layout
from rmdd.core.storage import open_storage

OLD = ("experts/0123abcd/store.json", "phases/0123abcd/phase-0/start.safetensors", "tiny-0123abcd/run.yaml")


def storage_of(tmp_path, where):
    folder = tmp_path / "runs"
    folder.mkdir(exist_ok=True)
    address = f"file://{folder}" if where == "uri" else str(folder)
    return folder, open_storage(config.Runtime(storage=address, scratch=str(tmp_path / "scratch")))


def test_the_number_is_written_at_the_first_use(tmp_path):
    tiny.go(config.load(tiny.stored(tmp_path)), "ingest")
    assert json.loads((tmp_path / "storage.json").read_text()) == {"layout": LAYOUT}
    tiny.go(config.load(tiny.stored(tmp_path)), "ingest")


@pytest.mark.parametrize("where", ["folder", "uri"])
@pytest.mark.parametrize("file", OLD)
def test_a_storage_of_the_release_before_is_refused(tmp_path, file, where):
    folder, storage = storage_of(tmp_path, where)
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("{}")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=rf"layout {LAYOUT}, and .*runs has layout 1; set runtime.storage to another"):
        require_layout(storage)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("where", ["folder", "uri"])
def test_a_storage_of_another_number_is_refused(tmp_path, where):
    folder, storage = storage_of(tmp_path, where)
    write_json(folder / "storage.json", {"layout": LAYOUT + 1})
    with pytest.raises(ValueError, match=rf"has layout {LAYOUT + 1}; .* sets in it still load with rmdd.load"):
        require_layout(storage)


def test_a_run_stops_at_an_old_storage(tmp_path):
    (tmp_path / OLD[0]).parent.mkdir(parents=True)
    (tmp_path / OLD[0]).write_text("{}")
    with pytest.raises(ValueError, match="has layout 1"):
        tiny.go(config.load(tiny.stored(tmp_path)))
    assert not list(tmp_path.glob("tiny-*"))
