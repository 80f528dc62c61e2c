"""Ingest in parts: killed, broken and resumed, it ends with the bytes of one that nobody touched."""

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
    """Sixty noisy pictures, three of them bad, in some twenty parts."""
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
    """All bytes of a dataset, but for the command line that the manifest tells."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found.pop("manifest.json"))
    manifest.pop("command")
    return found | {"manifest": manifest}


@pytest.fixture
def whole(data, tmp_path):
    return files(ingest(data, tmp_path / "whole").path)


def shards_of(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("*-*.parquet")}


def test_parts_reach_the_asked_size(data, whole, tmp_path):
    shards = whole["manifest"]["shards"]
    assert len(shards) > 15 and sum(shard["rows"] for shard in shards) == PAIRS - 3
    assert [shard["split"] for shard in shards] == sorted(
        (s["split"] for s in shards), key=["train", "val", "test"].index
    )
    coarse = Dataset.open(ingest(data.model_copy(update={"shard_mb": 1.0}), tmp_path / "coarse").path)
    assert len(coarse.manifest["shards"]) == 3 and coarse.hash == whole["manifest"]["data_hash"]
    coarse.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".coarse.lock", ".whole.lock", "coarse", "root", "whole"]


def test_a_driver_killed_in_the_middle_of_a_shard_goes_on(data, whole, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from rmdd.config import Data\n"
        "from rmdd.data.ingest import ingest\n"
        "from rmdd.data.shards import ShardWriter\n"
        "append, seen = ShardWriter.append, []\n"
        "def mortal(self, pair):\n"
        "    seen.append(pair)\n"
        "    append(self, pair)\n"
        "    if len(seen) == 29: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ShardWriter.append = mortal\n"
        "ingest(Data.model_validate_json(sys.argv[1]), sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, data.model_dump_json(), tmp_path / "out"])
    assert done.returncode == -signal.SIGKILL
    work = tmp_path / ".out.parts" / "dataset"
    before = shards_of(work)
    assert len(before) > 5 and list(work.glob(".*.tmp")) and not (tmp_path / "out").exists()

    assert files(ingest(data, tmp_path / "out").path) == whole
    after = shards_of(tmp_path / "out")
    assert {name: after[name] for name in before} == before, "a finished part was written again"
    assert not work.exists()


@pytest.mark.ray
def test_a_killed_ray_driver_goes_on(root, draw, put, tmp_path):
    names = [f"{i:03d}.png" for i in range(60)]
    draw(*names, size=(240, 240))
    put("captions.csv", "image,caption\n" + "\n".join(f"{name},picture {name}" for name in names))
    runtime = {"storage": str(tmp_path / "runs"), "num_cpus": 2}
    data = {"source": "table", "root": str(root), "shard_mb": 0.2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "killed", "data": data, "runtime": runtime}))
    words = ["ingest", tmp_path / "run.yaml", "--quiet"]
    process = processes.Rmdd(*words)
    while len(records := list((tmp_path / "runs").glob("data/.*.parts/records/*.json"))) < 5:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.kill()
    time.sleep(4)  # the workers of a killed driver end within 3 s
    assert not list((tmp_path / "runs").glob("data/*/manifest.json"))
    before = shards_of(records[0].parent.parent / "dataset")

    processes.done(*words, "--set", "runtime.ray=off")
    (out,) = (path.parent for path in (tmp_path / "runs").glob("data/*/manifest.json"))
    after = shards_of(out)
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    assert files(out) == files(ingest(Data(**data), tmp_path / "whole").path)


class MortalWriter(PartWriter):
    """Kills its process in the middle of part 3, once."""

    def _pairs(self, part, counts):
        for pair in super()._pairs(part, counts):
            yield pair
            mark = self.folders.path.parent / "killed"
            if part.number == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_killed_worker_is_replaced(data, whole, ray_local, tmp_path):
    from rmdd.execution.ray.stream import over_tasks

    def mortal(make, items):
        yield from over_tasks()(functools.partial(MortalWriter, *make.args), items)

    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        assert files(ingest(data, tmp_path / "out", mortal).path) == whole
    finally:
        ray_local.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert (tmp_path / "killed").exists()


@pytest.mark.ray
def test_a_workers_own_error_keeps_its_words(data, ray_local, tmp_path):
    from rmdd.execution.ray.stream import over_tasks

    def read_only(make, items):
        folder = tmp_path / ".out.parts" / "records"
        folder.write_text("in the way")
        yield from over_tasks()(make, items)

    with pytest.raises(OSError, match=r"part \d+ .*finished parts are kept in .*\.out\.parts, so mend this"):
        ingest(data, tmp_path / "out", read_only)


def test_a_shard_that_was_cut_short_is_written_again(data, whole, tmp_path):
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
    assert files(ingest(data, tmp_path / "out").path) == whole
    after = shards_of(tmp_path / "out")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {cut.name, flipped.name}


def test_a_full_disk_is_told_and_loses_nothing(data, whole, tmp_path):
    """A limit on the size of a file stands for the disk."""
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
    words = [sys.executable, "-c", code, big.model_dump_json(), tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "OSError: part 1" in done.stderr and "File too large" in done.stderr, done.stderr
    assert "finished parts are kept" in done.stderr
    assert not (tmp_path / "out").exists() and not list((tmp_path / ".out.parts" / "dataset").glob(".*.tmp"))
    before = shards_of(tmp_path / ".out.parts" / "dataset")
    after = ingest(big, tmp_path / "out")
    assert before and before.items() <= shards_of(after.path).items()
    assert after.hash == whole["manifest"]["data_hash"]


def test_other_annotations_begin_anew(data, put, root, tmp_path):
    def stopped(make, items):
        yield from sequential_stream(make, items[:6])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(data, tmp_path / "out", stopped)
    put("captions.csv", "image,caption\n000.png,alone")
    dataset = ingest(data, tmp_path / "out")
    assert sum(count["pairs"] for count in dataset.counts.values()) == 1 and not quarantined(dataset)


def test_the_second_of_two_ingests_waits_for_the_first(data, tmp_path):
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def slow(make, items):
        begun.set()
        assert go_on.wait(60)
        yield from sequential_stream(make, items)

    def never(make, items):
        raise AssertionError("the second has nothing to do")

    first = threading.Thread(target=lambda: seen.append(ingest(data, tmp_path / "out", slow)))
    second = threading.Thread(target=lambda: seen.append(ingest(data, tmp_path / "out", never)))
    first.start()
    assert begun.wait(60)
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert [dataset.hash for dataset in seen] == [Dataset.open(tmp_path / "out").hash] * 2


def test_a_machine_that_does_not_see_the_storage_is_named(data, tmp_path):
    def elsewhere(make, items):
        yield from map(PartWriter(data, IngestFolders(tmp_path / "not-mounted" / ".out.parts")), items)

    with pytest.raises(OSError, match=rf"{socket.gethostname()} does not see the storage: .*not-mounted"):
        ingest(data, tmp_path / "out", elsewhere)
    assert not (tmp_path / "not-mounted").exists()


@pytest.mark.ray
def test_a_part_may_take_longer_than_ray_data_waits(ray_local, monkeypatch):
    from ray.data import DataContext

    from rmdd.execution.ray.stream import over_tasks

    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1)

    def make():
        return lambda item: time.sleep(4) or item

    assert list(over_tasks()(make, [{"number": 7}])) == [{"number": 7}]
