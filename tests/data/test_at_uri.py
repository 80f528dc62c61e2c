"""Check that an ingest into a storage at a URI resumes on a second machine, and transfers each shard once."""

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
def machine(uri, tmp_path):
    """Fixture: a function that simulates a machine `name` and returns its runtime, local mirror and dataset folder."""
    roots = []

    def machine(name):
        runtime = config.Runtime(storage=uri, scratch=str(tmp_path / name))
        mirror = open_storage(runtime)
        roots.append(mirror.root)
        return SimpleNamespace(runtime=runtime, mirror=mirror, out=mirror.root / "data" / "d")

    yield machine
    for root in roots:
        files._listeners.pop(root, None)


@pytest.mark.parametrize("last", (0, 2, 4))
def test_an_ingest_killed_during_the_final_move_resumes(machine, last, tmp_path, monkeypatch):
    a, b, moved = machine("a"), machine("b"), []

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

    dataset = ingest(SCENES, b.out, counted, b.runtime)
    dataset.verify()
    assert not any(fresh), "a finished part must not be written again"
    assert dataset.manifest["shards"] == ingest(SCENES, tmp_path / "plain").manifest["shards"]
    names = {p.relative_to(dataset.path).as_posix() for p in dataset.path.rglob("*") if p.is_file()}
    assert set(b.mirror.remote.list("")) == {f"data/d/{name}" for name in names}, (
        "the store must hold exactly the files of the dataset"
    )


def test_each_shard_is_uploaded_once_and_downloaded_once(machine, monkeypatch):
    driver, worker, transfers = machine("driver"), machine("worker"), []

    def record(method, real):
        def recorded(self, *arguments):
            name = Path(arguments[0]).name
            transfers.extend([(method, name)] if "-" in name and name.endswith(".parquet") else [])
            return real(self, *arguments)

        monkeypatch.setattr(ObjectStore, method, recorded)

    record("download", ObjectStore.download)
    record("upload", ObjectStore.upload)

    def on_worker(make, items):
        yield from map(PartWriter(SCENES, *make.args[1:3], worker.runtime), items)

    dataset = ingest(SCENES, driver.out, on_worker, driver.runtime)
    shards = [shard["file"] for shard in dataset.manifest["shards"]]
    assert sorted(transfers) == sorted((method, name) for method in ("download", "upload") for name in shards)


def test_files_of_an_ingest_killed_during_cleanup_are_deleted(machine, monkeypatch):
    a, b = machine("a"), machine("b")

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
