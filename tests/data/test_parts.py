"""Check that an ingest that is killed or damaged and then resumed writes the same bytes as an undisturbed ingest."""

import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import processes
import pytest
import yaml
from PIL import Image

from rmdd.config import Data, TableSource
from rmdd.data.ingest import ingest, quarantined
from rmdd.data.parts import IngestFolders, PartWriter
from rmdd.data.shards import Dataset
from rmdd.execution.tasks import sequential_stream

PAIRS = 60


@pytest.fixture
def data(root, put):
    """Fixture: config of sixty noise images, three of them unusable; an ingest divides them into about twenty parts."""
    draws = np.random.default_rng(0)
    lines = ["image,caption,split"]
    for i in range(PAIRS):
        noise = draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,picture {i},{'val' if i % 10 == 8 else 'test' if i % 10 == 9 else 'train'}")
    (root / "007.png").write_bytes(b"no picture")
    (root / "031.png").unlink()
    (root / "059.png").write_bytes((root / "058.png").read_bytes()[:99])
    put("captions.csv", "\n".join(lines))
    return Data(source="table", root=str(root), table=TableSource(), shard_mb=5000 / 2**20)


def files(folder):
    """Return the content of a dataset's files by name; leave out the manifest's command line, which differs per run."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(contents.pop("manifest.json"))
    manifest.pop("command")
    return contents | {"manifest": manifest}


@pytest.fixture
def undisturbed(data, tmp_path):
    return files(ingest(data, tmp_path / "undisturbed").path)


def shards_of(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("*-*.parquet")}


def test_parts_reach_the_configured_size(data, undisturbed, tmp_path):
    shards = undisturbed["manifest"]["shards"]
    assert len(shards) > 15 and sum(shard["rows"] for shard in shards) == PAIRS - 3
    assert [shard["split"] for shard in shards] == sorted(
        (s["split"] for s in shards), key=["train", "val", "test"].index
    )
    coarse = Dataset.open(ingest(data.model_copy(update={"shard_mb": 1.0}), tmp_path / "coarse").path)
    assert len(coarse.manifest["shards"]) == 3 and coarse.hash == undisturbed["manifest"]["data_hash"]
    coarse.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".locks", "coarse", "root", "undisturbed"]


def test_an_ingest_killed_in_the_middle_of_a_shard_resumes(data, undisturbed, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from rmdd.config import Data\n"
        "from rmdd.data.ingest import ingest\n"
        "from rmdd.data.shards import ShardWriter\n"
        "append, pairs = ShardWriter.append, []\n"
        "def append_or_die(self, pair):\n"
        "    pairs.append(pair)\n"
        "    append(self, pair)\n"
        "    if len(pairs) == 29: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ShardWriter.append = append_or_die\n"
        "ingest(Data.model_validate_json(sys.argv[1]), sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, data.model_dump_json(), tmp_path / "out"])
    assert done.returncode == -signal.SIGKILL
    work = tmp_path / ".out.parts" / "dataset"
    before = shards_of(work)
    assert len(before) > 5 and list(work.glob(".*.tmp")) and not (tmp_path / "out").exists()

    assert files(ingest(data, tmp_path / "out").path) == undisturbed
    after = shards_of(tmp_path / "out")
    assert {name: after[name] for name in before} == before, "a finished part must not be written again"
    assert not work.exists()


@pytest.mark.ray
def test_an_ingest_resumes_after_its_ray_driver_was_killed(root, draw, put, tmp_path):
    names = [f"{i:03d}.png" for i in range(60)]
    draw(*names, size=(240, 240))
    put("captions.csv", "image,caption\n" + "\n".join(f"{name},picture {name}" for name in names))
    runtime = {"storage": str(tmp_path / "runs"), "num_cpus": 2}
    data = {"source": "table", "root": str(root), "shard_mb": 0.2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "killed", "data": data, "runtime": runtime}))
    arguments = ["ingest", tmp_path / "run.yaml", "--quiet"]
    process = processes.Rmdd(*arguments)
    while len(records := list((tmp_path / "runs").glob("data/.*.parts/records/*.json"))) < 5:
        assert process.poll() is None, "the ingest ended before the test killed it"
        time.sleep(0.005)
    process.kill()
    time.sleep(4)  # Ray workers exit within 3 s after their driver is killed
    assert not list((tmp_path / "runs").glob("data/*/manifest.json"))
    before = shards_of(records[0].parent.parent / "dataset")

    processes.done(*arguments, "--set", "runtime.ray=off")
    (out,) = (path.parent for path in (tmp_path / "runs").glob("data/*/manifest.json"))
    after = shards_of(out)
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    assert files(out) == files(ingest(Data(**data), tmp_path / "undisturbed").path)


class MortalWriter(PartWriter):
    """A `PartWriter` that kills its own process once, in the middle of part 3 of the ingest."""

    def _pairs(self, part, counts):
        for pair in super()._pairs(part, counts):
            yield pair
            mark = self.folders.path.parent / "killed"
            if part.number == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_killed_worker_is_replaced(data, undisturbed, ray_local, tmp_path):
    from rmdd.execution.ray.stream import over_tasks

    def mortal(make, items):
        yield from over_tasks()(functools.partial(MortalWriter, *make.args), items)

    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        assert files(ingest(data, tmp_path / "out", mortal).path) == undisturbed
    finally:
        ray_local.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert (tmp_path / "killed").exists()


@pytest.mark.ray
def test_the_error_of_a_ray_worker_keeps_its_message(data, ray_local, tmp_path):
    from rmdd.execution.ray.stream import over_tasks

    def read_only(make, items):
        folder = tmp_path / ".out.parts" / "records"
        folder.write_text("in the way")
        yield from over_tasks()(make, items)

    with pytest.raises(OSError, match=r"part \d+ .*finished parts are kept in .*\.out\.parts, so fix this"):
        ingest(data, tmp_path / "out", read_only)


def test_damaged_shards_are_written_again(data, undisturbed, tmp_path):
    def stopped(make, items):
        yield from sequential_stream(make, items[:6])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(data, tmp_path / "out", stopped)
    work = tmp_path / ".out.parts" / "dataset"
    before = shards_of(work)
    cut, flipped = sorted(work.glob("*.parquet"))[:2]
    cut.write_bytes(cut.read_bytes()[:-9])
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    assert files(ingest(data, tmp_path / "out").path) == undisturbed
    after = shards_of(tmp_path / "out")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {cut.name, flipped.name}


def test_a_full_disk_is_reported_and_finished_parts_are_kept(data, undisturbed, tmp_path):
    """A limit on the size of the files that the process may write simulates a full disk."""
    big = data.model_copy(update={"shard_mb": 0.03})
    code = (
        "import resource, sys\n"
        "from rmdd.config import Data\n"
        "from rmdd.data.ingest import ingest\n"
        "from rmdd.execution.tasks import sequential_stream\n"
        "def filling(make, items):\n"
        "    yield from sequential_stream(make, items[:1])\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "    yield from sequential_stream(make, items[1:])\n"
        "ingest(Data.model_validate_json(sys.argv[1]), sys.argv[2], filling)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", code, big.model_dump_json(), tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "OSError: part 1" in done.stderr and "File too large" in done.stderr, done.stderr
    assert "finished parts are kept" in done.stderr
    assert not (tmp_path / "out").exists() and not list((tmp_path / ".out.parts" / "dataset").glob(".*.tmp"))
    before = shards_of(tmp_path / ".out.parts" / "dataset")
    after = ingest(big, tmp_path / "out")
    assert before and before.items() <= shards_of(after.path).items()
    assert after.hash == undisturbed["manifest"]["data_hash"]


def test_changed_annotations_restart_the_ingest(data, put, root, tmp_path):
    def stopped(make, items):
        yield from sequential_stream(make, items[:6])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(data, tmp_path / "out", stopped)
    put("captions.csv", "image,caption\n000.png,alone")
    dataset = ingest(data, tmp_path / "out")
    assert sum(count["pairs"] for count in dataset.counts.values()) == 1 and not quarantined(dataset)


def test_the_second_of_two_ingests_waits_for_the_first(data, tmp_path):
    started, resume, datasets = threading.Event(), threading.Event(), []

    def slow(make, items):
        started.set()
        assert resume.wait(60)
        yield from sequential_stream(make, items)

    def never(make, items):
        raise AssertionError("the second ingest must not write anything")

    first = threading.Thread(target=lambda: datasets.append(ingest(data, tmp_path / "out", slow)))
    second = threading.Thread(target=lambda: datasets.append(ingest(data, tmp_path / "out", never)))
    first.start()
    assert started.wait(60)
    second.start()
    resume.set()
    first.join()
    second.join()
    assert [dataset.hash for dataset in datasets] == [Dataset.open(tmp_path / "out").hash] * 2


def test_a_machine_that_cannot_reach_the_storage_is_named(data, tmp_path):
    def elsewhere(make, items):
        yield from map(PartWriter(data, IngestFolders(tmp_path / "not-mounted" / ".out.parts"), make.args[2]), items)

    with pytest.raises(OSError, match=rf"{socket.gethostname()} cannot reach the storage: .*not-mounted"):
        ingest(data, tmp_path / "out", elsewhere)
    assert not (tmp_path / "not-mounted").exists()


@pytest.mark.ray
def test_a_part_may_take_longer_than_the_progress_timeout_of_ray_data(ray_local, monkeypatch):
    from ray.data import DataContext

    from rmdd.execution.ray.stream import over_tasks

    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1)

    def make():
        return lambda item: time.sleep(4) or item

    assert list(over_tasks()(make, [{"number": 7}])) == [{"number": 7}]
