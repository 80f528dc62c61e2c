"""An ingest whose storage is a URI: killed, begun anew on another machine, and what goes over the network."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rmdd import config
from rmdd.core import files
from rmdd.core.files import remove
from rmdd.core.remote import ObjectStore
from rmdd.core.storage import open_storage
from rmdd.data.ingest import ingest
from rmdd.data.parts import PartWriter

SCENES = config.Data(scenes=config.Scenes(train=6, val=2, test=2, size=16), image_size=16)


@pytest.fixture
def at(uri, tmp_path):
    """`at("a")`: the storage for machine a, its mirror, and the folder of the dataset there."""
    roots = []

    def at(name):
        runtime = config.Runtime(storage=uri, scratch=str(tmp_path / name))
        mirror = open_storage(runtime)
        roots.append(mirror.root)
        return SimpleNamespace(runtime=runtime, mirror=mirror, out=mirror.root / "data" / "d")

    yield at
    for root in roots:
        files._listeners.pop(root, None)


@pytest.mark.parametrize("last", (0, 2, 4))
def test_an_ingest_that_was_killed_while_its_dataset_moved_goes_on(at, last, tmp_path, monkeypatch):
    a, b, moved = at("a"), at("b"), []

    def copy(self, name, to, real=ObjectStore.copy):
        if len(moved) == last:
            raise KeyboardInterrupt
        moved.append(real(self, name, to))
        return moved[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ObjectStore, "copy", copy)
        ingest(SCENES, a.out, runtime=a.runtime)
    fresh = []

    def counted(make, items):
        for result in map(make(), items):
            fresh.append(result["fresh"])
            yield result

    found = ingest(SCENES, b.out, counted, b.runtime)
    found.verify()
    assert not any(fresh), "a finished part was written again"
    assert found.manifest["shards"] == ingest(SCENES, tmp_path / "plain").manifest["shards"]
    inside = {p.relative_to(found.path).as_posix() for p in found.path.rglob("*") if p.is_file()}
    assert set(b.mirror.remote.list("")) == {f"data/d/{name}" for name in inside}, (
        "all of it is there, and nothing else"
    )


def test_what_workers_wrote_is_moved_on_the_store_and_fetched_once(at, monkeypatch):
    driver, worker, seen = at("driver"), at("worker"), []

    def watch(what, real):
        def told(self, *words):
            name = Path(words[0]).name
            seen.extend([(what, name)] if "-" in name and name.endswith(".parquet") else [])
            return real(self, *words)

        monkeypatch.setattr(ObjectStore, what, told)

    watch("download", ObjectStore.download)
    watch("upload", ObjectStore.upload)

    def elsewhere(make, items):
        yield from map(PartWriter(SCENES, make.args[1], worker.runtime), items)

    found = ingest(SCENES, driver.out, elsewhere, driver.runtime)
    shards = [shard["file"] for shard in found.manifest["shards"]]
    assert sorted(seen) == sorted((what, name) for what in ("download", "upload") for name in shards)


def test_what_an_ingest_killed_at_its_end_left_is_cleared(at, monkeypatch):
    a, b = at("a"), at("b")

    def stopped(path):
        if path.name == "records":
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rmdd.data.ingest.remove", stopped)
        ingest(SCENES, a.out, runtime=a.runtime)
    assert any("/.d.parts/" in name for name in set(a.mirror.remote.list("")))
    ingest(SCENES, b.out, runtime=b.runtime).verify()
    assert not any("/.d.parts/" in name for name in set(b.mirror.remote.list("")))
