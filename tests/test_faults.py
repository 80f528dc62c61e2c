"""Check that damaged files, full disks and user errors give clear errors, and that finished files stay intact."""

import contextlib
import json
import os
import resource
import shutil
import subprocess

import pytest
import torch
import toy

from rmdd import config
from rmdd.core.locks import FolderInUse
from rmdd.core.storage import open_storage
from rmdd.data.ingest import ingest
from rmdd.data.shards import Dataset
from rmdd.distill.sets import load_set, save_set
from rmdd.experts.store import Store, Writer
from rmdd.models.text import embed
from rmdd.pipeline import open_pipeline


def mounted(folder, *options):
    """Mount a small separate file system at `folder`; return False if this process has no permission."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


class SmallDisk:
    """A folder that has no space for more data inside the context `full()`."""

    def __init__(self, folder, kind):
        self.folder, self.mounted = folder, kind == "disk" and mounted(folder, "size=4m")
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def full(self):
        if not self.mounted:  # the operating system limits the size of every file
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            return
        ballast = self.folder / "ballast"
        with open(ballast, "wb", buffering=0) as f, contextlib.suppress(OSError):
            while f.write(bytes(4096)):
                pass
        yield
        ballast.unlink()


@pytest.fixture(params=["disk", "limit"])
def disk(request, tmp_path):
    small = SmallDisk(tmp_path / "small", request.param)
    yield small
    if small.mounted:
        subprocess.run(["umount", "-l", str(small.folder)], check=True)


NO_ROOM = r"cannot write .*(no space left on device; free some space|file too large; .*ulimit)"


def test_an_expert_survives_a_full_disk(disk, tmp_path):
    theta = toy.encoder().trained()
    shapes = {n: tuple(p.shape) for n, p in theta.items()}
    walk = [{n: p + epoch for n, p in theta.items()} for epoch in range(3)]

    def begin(path):
        return Store.create(path, shapes, shared={}, epochs=2, keep=None, dtype="float32", facts={})

    store = begin(disk.folder / "store")
    writer = Writer(store, 0)
    writer.add(walk[0], {})
    with disk.full(), pytest.raises(OSError, match=NO_ROOM):
        writer.add(walk[1], {})
    assert not list(store.path.rglob("*.tmp"))
    writer = Writer(store, 0)
    assert writer.epoch == 0, "after the failed write, the previous epoch is intact"
    whole, unbroken = begin(tmp_path / "whole"), None
    unbroken = Writer(whole, 0)
    unbroken.add(walk[0], {})
    for each in (writer, unbroken):
        each.add(walk[1], {})
        each.add(walk[2], {})
        each.finish()
    assert store.record(0) == whole.record(0)
    assert all(toy.same_tensors(store.read(0, e), whole.read(0, e)) for e in range(3))


def test_a_phase_continues_after_a_full_disk(disk, store, tmp_path):
    run = toy.run_of(iterations=7)
    with contextlib.ExitStack() as stack:

        def fill(metrics):
            if metrics["iteration"] == 5:
                stack.enter_context(disk.full())

        with pytest.raises(OSError, match=NO_ROOM):
            toy.distil(run, store, disk.folder / "phase", on_step=fill)
    assert toy.distil(run, store, disk.folder / "phase")
    toy.distil(run, store, tmp_path / "unbroken")
    toy.assert_same_results(disk.folder / "phase", tmp_path / "unbroken")


def test_a_cache_that_does_not_fit_is_a_clear_error(disk, tmp_path):
    tower, captions = config.TextTower(name="hashing", width=2048), ["one", "two"] * 50
    with disk.full(), pytest.raises(OSError, match=NO_ROOM):
        embed(captions, tower, disk.folder / "cache")
    assert not [p for p in (disk.folder / "cache").rglob("*") if p.suffix in (".npy", ".tmp")]
    whole = embed(captions, tower, tmp_path / "whole")
    assert (embed(captions, tower, disk.folder / "cache") == whole).all()


@pytest.fixture
def read_only(tmp_path):
    """Fixture: a folder that cannot be written: mounted read-only, without write permission, or in /proc."""
    folder = tmp_path / "fixed"
    if mounted(folder, "ro"):
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
    elif os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
    else:
        yield folder.__class__("/proc/sys/kernel")


def test_a_storage_that_cannot_be_written_stops_a_run_before_it_starts(read_only):
    run = config.load({"runtime": {"storage": str(read_only / "runs"), "ray": "off"}})
    with pytest.raises(OSError, match=rf"cannot write {read_only}.*set runtime.storage to a folder"):
        open_storage(run.runtime).begin()
    with pytest.raises(OSError, match="cannot write"), open_pipeline(run):
        pass


def test_two_runs_on_one_folder(tmp_path):
    run = config.load({"runtime": {"storage": str(tmp_path), "ray": "off"}})
    with open_pipeline(run) as first:
        words = f"{first.folder.name} is in use by process {os.getpid()} on .*another name or another runtime.storage"
        with pytest.raises(FolderInUse, match=words), open_pipeline(run):
            pass
        other = run.model_copy(update={"name": "other"})
        with open_pipeline(other) as second:
            assert second.folder != first.folder, "another run can use the same storage"
    with open_pipeline(run):
        pass


# -- damaged files ---------------------------------------------------------------------------------------------------


def flip(path, back=7):
    data = bytearray(path.read_bytes())
    data[-back] ^= 1
    path.write_bytes(data)


def edit(path, **facts):
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.fixture
def own_store(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    return Store.open(tmp_path / "store")


def test_flipped_bytes_of_an_expert(own_store):
    flip(own_store.folder(1) / "epoch-0002.safetensors")
    own_store.read(0, 2)
    with pytest.raises(ValueError, match=r"epoch-0002.* is damaged .*SHA-256.*train that expert again"):
        own_store.read(1, 2)


def test_flipped_bytes_of_what_experts_start_from(tmp_path):
    theta = {"a": torch.zeros(3), "b": torch.ones(2)}
    spec = {"shared": {"a": theta["a"]}, "epochs": 1, "keep": None, "dtype": "float32", "facts": {}}
    store = Store.create(tmp_path, {name: tuple(t.shape) for name, t in theta.items()}, **spec)
    Writer(store, 0).add(theta, {})
    flip(tmp_path / "theta-0.safetensors", back=3)
    words = r"theta-0.* is damaged .*SHA-256.*delete the store and train the experts again"
    with pytest.raises(ValueError, match=words):
        Store.open(tmp_path).read(0, 0)
    with pytest.raises(ValueError, match=words):
        Writer(store, 1).add(theta, {})
    before = {k: v for k, v in store.spec.items() if k != "shared_sha256"}
    (tmp_path / "store.json").write_text(json.dumps(before))  # stores of earlier versions have no hash
    older = Store.create(tmp_path, store.shapes, **spec)
    assert older.read(0, 0).keys() == theta.keys()


def test_flipped_bytes_of_an_expert_in_training(store, tmp_path):
    spec = {"epochs": 2, "keep": None, "dtype": "float32", "facts": {}}
    half = Store.create(tmp_path / "half", store.shapes, shared={}, **spec)
    Writer(half, 0).add(toy.encoder().trained(), {})
    flip(half.folder(0) / "running.safetensors")
    with pytest.raises(ValueError, match=r"running.* is damaged .*delete its expert's folder and train"):
        Writer(half, 0)


def test_a_phase_resumes_from_the_good_state_if_its_checkpoint_is_damaged(store, tmp_path, caplog):
    run = toy.run_of(iterations=9, guard={"every": 2}, checkpoint_every=1)
    toy.distil(run, store, tmp_path / "unbroken")
    toy.distil(run, store, tmp_path / "flipped", **toy.stop_after(5))
    flip(tmp_path / "flipped" / "state.safetensors")
    assert toy.distil(run, store, tmp_path / "flipped")
    assert "is damaged" in caplog.text and "resuming from iteration 4" in caplog.text
    toy.assert_same_results(tmp_path / "flipped", tmp_path / "unbroken")


def test_a_damaged_checkpoint_without_a_good_one_says_what_to_delete(store, tmp_path):
    run = toy.run_of(iterations=9)
    toy.distil(run, store, tmp_path, **toy.stop_after(3))
    (tmp_path / "good.safetensors").unlink(missing_ok=True)
    flip(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"state.safetensors is damaged .*SHA-256.*delete it .* restart this phase"):
        toy.distil(run, store, tmp_path)


def test_flipped_bytes_of_a_set(tmp_path):
    save_set(toy.first_set(), tmp_path / "set.safetensors")
    flip(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match=r"the set .* is damaged .*delete .* to distil that phase again"):
        load_set(tmp_path / "set.safetensors")


def test_a_truncated_shard(tmp_path):
    scenes = config.Scenes(train=6, val=2, test=2, size=16)
    dataset = ingest(config.Data(scenes=scenes, image_size=16), tmp_path / "data")
    shard = dataset.path / dataset.manifest["shards"][0]["file"]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"bytes, the manifest says .*copy it again"):
        Dataset.open(dataset.path)


def test_a_missing_expert(own_store, tmp_path):
    shutil.rmtree(own_store.folder(1))
    with pytest.raises(ValueError, match=r"asks for 2 experts but the store .* holds 1 .*train the rest"):
        toy.distil(toy.run_of(), own_store, tmp_path / "phase")
    (own_store.folder(0) / "epoch-0003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"epoch-0003.* is missing from the store; train that expert again"):
        own_store.read(0, 3)


def test_another_schema_version(own_store):
    edit(own_store.folder(1) / "expert.json", schema_version=9)
    with pytest.raises(ValueError, match="schema version 9, this version of rmdd reads 1"):
        own_store.record(1)
    edit(own_store.path / "store.json", schema_version=9)
    with pytest.raises(ValueError, match="schema version 9, this version of rmdd reads 1"):
        Store.open(own_store.path)
