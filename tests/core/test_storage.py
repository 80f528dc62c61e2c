"""Tests of storages at a URI and in a folder: mirrors, locks and leases, and the files of killed processes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import toy
import toy_phase
from processes import Forked

from rmdd import config
from rmdd.core import files, remote
from rmdd.core import locks as lease
from rmdd.core.files import append_jsonl, atomic_path, read_json, remove, sweep, temporary_beside, write_json
from rmdd.core.locks import FolderInUse, held_in, hold_folder
from rmdd.core.storage import Mirror, open_storage
from rmdd.core.tensors import save_checked
from rmdd.data.ingest import ingest
from rmdd.distill.sets import load_set, save_set


@pytest.fixture
def node(uri, tmp_path):
    """Fixture: imitate machines that share one URI; `node("a")` returns the mirror (local folder) of machine a."""
    mirrors = {}
    yield lambda name: mirrors.setdefault(name, Mirror(uri, tmp_path / name))
    for mirror in mirrors.values():
        files._listeners.pop(mirror.root, None)


def names(mirror):
    return set(mirror.remote.list(""))


# -- mirrors ---------------------------------------------------------------------------------------------------------


def test_finished_files_are_published_and_can_be_fetched_on_another_machine(node):
    a, b = node("a"), node("b")
    write_json(a.root / "run" / "x.json", 1)
    with atomic_path(a.root / "set") as folder:
        folder.mkdir()
        write_json(folder / "set.json", {"v": 1})
        (folder / "tensors").write_bytes(b"12345")
    write_json(a.root / "cache" / "local.json", 1)
    assert names(a) == {"run/x.json", "set/set.json", "set/tensors"}
    b.fetch(b.root)
    assert read_json(b.root / "run" / "x.json") == 1 and (b.root / "set" / "tensors").read_bytes() == b"12345"
    assert not list(b.root.rglob("*.tmp"))


def test_a_fetched_folder_equals_the_storage(node):
    a, b = node("a"), node("b")
    for name in ("kept", "gone"):
        write_json(a.root / "phase" / f"{name}.json", 1)
    b.fetch(b.root / "phase")
    time.sleep(1.1)  # S3 stores modification times in whole seconds, so the next write must be a second later
    write_json(b.root / "phase" / "kept.json", 2)  # the file keeps its size, and only its time changes
    remove(b.root / "phase" / "gone.json")
    (a.root / "phase" / "never-published.json").write_text("3")
    a.fetch(a.root / "phase")
    assert {p.name for p in (a.root / "phase").iterdir()} == {"kept.json"}
    assert read_json(a.root / "phase" / "kept.json") == 2


def test_a_removed_folder_is_removed_from_the_storage_too(node):
    a = node("a")
    write_json(a.root / "expert-000" / "epoch.json", 1)
    write_json(a.root / "expert-001" / "epoch.json", 1)
    remove(a.root / "expert-000")
    assert names(a) == {"expert-001/epoch.json"}


def test_a_log_is_published_before_its_checkpoint(node):
    a = node("a")
    for i in range(3):
        append_jsonl(a.root / "phase" / "metrics.jsonl", {"iteration": i})
    assert "phase/metrics.jsonl" not in names(a)
    write_json(a.root / "phase" / "state.json", 3)
    assert (a.remote.read("phase/metrics.jsonl") or b"").count(b"\n") == 3


def test_a_fetch_does_not_overwrite_a_folder_that_a_process_of_this_machine_holds(node):
    a, b = node("a"), node("b")
    write_json(b.root / "store" / "expert-000" / "running.json", 1)
    a.fetch(a.root / "store")
    with hold_folder(a.root / "store" / "expert-000", wait=False):
        (a.root / "store" / "expert-000" / "running.json").write_text("22")  # this write is not published
        a.fetch(a.root / "store")
        assert read_json(a.root / "store" / "expert-000" / "running.json") == 22


def test_the_error_for_a_missing_bucket_names_it(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)  # do not wait between two attempts
    storage = open_storage(config.Runtime(storage="s3://no-such-bucket/runs", scratch=str(tmp_path)))
    words = r"cannot \w+ s3://no-such-bucket/runs.*credentials in the environment"
    with pytest.raises(OSError, match=words), hold_folder(storage.root / "run", wait=False):
        pass


@pytest.mark.parametrize(
    "uri", ["s3://me:secret@bucket/a", "s3://bucket/a?secret_key=secret", "abfs://:secret@account/a"]
)
def test_a_secret_in_the_uri_is_refused_and_not_repeated(uri):
    with pytest.raises(config.ConfigError, match="in the environment") as caught:
        config.load({"runtime": {"storage": uri}})
    assert "secret" not in str(caught.value)
    assert config.load({"runtime": {"storage": "abfs://container@account.dfs.core.windows.net/a"}})


FETCH = """
import os, signal, sys
from pathlib import Path
from rmdd.core.remote import ObjectStore
from rmdd.core.storage import Mirror

def download(self, name, path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

ObjectStore.download = download
root = Path(sys.argv[2])
Mirror(sys.argv[1], root).fetch(root)
"""


def test_the_half_written_file_of_a_killed_download_is_removed_at_once(tmp_path):
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "there" / "deep" / "x.json").write_text("1")
    command = [sys.executable, "-c", FETCH, f"file://{tmp_path}/there", str(tmp_path / "here")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    assert [p.parent.name for p in sweep(tmp_path / "here")] == ["deep"]


# -- a phase resumes from its published checkpoint -------------------------------------------------------------------


def test_a_killed_phase_resumes_on_another_node_with_an_empty_mirror(node, uri, store, tmp_path):
    a = node("a")
    shutil.copytree(store.path, a.root / "store")
    a.publish(a.root / "store")
    killed = Forked(toy_phase.go, uri, tmp_path / "b", 5)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    shutil.rmtree(tmp_path / "b")
    resumed, errors = Forked(toy_phase.go, uri, tmp_path / "c").communicate()
    assert resumed == "goes on with True\n", errors
    a.fetch(a.root / "phases")
    toy.distil(toy.run_of(iterations=toy_phase.ITERATIONS), store, tmp_path / "uninterrupted")
    toy.assert_same_results(a.root / "phases" / "phase-0", tmp_path / "uninterrupted")


# -- leases ----------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from rmdd.core.locks import hold_folder
with hold_folder(sys.argv[1], wait=False):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_can_be_held_while_another_process_looks_whether_it_is(tmp_path, monkeypatch):
    lock = lease.lock_of(tmp_path / "run")
    lock.parent.mkdir()
    lock.touch()
    with open(lock) as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        monkeypatch.setattr(lease.time, "sleep", lambda seconds: probe.close())
        with hold_folder(tmp_path / "run", wait=False):
            assert probe.closed and held_in(tmp_path) == [tmp_path / "run"]


def test_lock_files_that_cannot_be_read_count_as_held_while_there_is_a_lease(tmp_path, monkeypatch):
    (tmp_path / "folder.lock").mkdir()
    (tmp_path / "broken.lock").symlink_to("absent")
    (tmp_path / ".locks").mkdir()
    for name in (".locks/mine.lock", ".locks/other.lock", "other.lease"):
        (tmp_path / name).touch()
    assert held_in(tmp_path) == []

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "folder.lock").rmdir()
    monkeypatch.setattr(lease, "open", refuse, raising=False)  # the tests may run as root, who can read all files
    assert held_in(tmp_path) == [tmp_path / "other"]


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_error_for_a_folder_in_use_names_the_process_that_holds_it(holder, tmp_path):
    words = rf"run is in use by process {holder.pid} on .*wait .*end it, or give .*another"
    with pytest.raises(FolderInUse, match=words), hold_folder(tmp_path / "run", wait=False):
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert read_json(tmp_path / "run.lease")["pid"] == holder.pid
    with hold_folder(tmp_path / "run", wait=False):
        assert read_json(tmp_path / "run.lease")["pid"] == os.getpid()
    assert not (tmp_path / "run.lease").exists()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "EXPIRES", 1.5)
    monkeypatch.setattr(lease, "SETTLE", 0.3)
    monkeypatch.setattr(lease, "POLL", 0.05)


def foreign_lease(beats=0):
    """Return the content of a lease that a (made-up) process on another machine holds."""
    return {"id": "f" * 32, "beats": beats, "machine": "another", "host": "node-7", "pid": 12, "seen": "now"}


def test_a_lease_of_another_machine_is_respected_until_it_no_longer_changes(quick, node, monkeypatch):
    a = node("a")
    folder = a.root / "run"
    cell = a.cell(folder)
    cell.write(foreign_lease())
    beats = iter(range(1, 100))
    monkeypatch.setattr(
        lease.time, "sleep", lambda s, sleep=time.sleep: (cell.write(foreign_lease(next(beats))), sleep(s))
    )
    with pytest.raises(FolderInUse, match="process 12 on node-7"), hold_folder(folder, wait=False):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(lease, "EXPIRES", 0.5)
    with hold_folder(folder, wait=False) as mine:
        assert mine.owned()
    assert cell.read() is None


def test_lock_files_do_not_lie_among_the_folders(tmp_path):
    for name in ("a", "b"):
        with hold_folder(tmp_path / name, wait=False):
            (tmp_path / name).mkdir()
            assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".lock") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".locks", "a", "b"]


def old_lease(pid, beats=0):
    """Return the lease of an older version on this machine, which puts its lock file beside the folder."""
    return foreign_lease(beats) | {"machine": files.machine(), "pid": pid}


def test_processes_of_an_older_version_on_this_machine_are_respected(quick, tmp_path, monkeypatch):
    write_json(tmp_path / "run.lease", old_lease(os.getppid()))
    beats = iter(range(1, 100))
    beat = lambda: write_json(tmp_path / "run.lease", old_lease(os.getppid(), next(beats)))  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(lease.time, "sleep", lambda s, sleep=time.sleep: (beat(), sleep(s)))
        with (
            pytest.raises(FolderInUse, match=f"process {os.getppid()} on node-7"),
            hold_folder(tmp_path / "run", wait=False),
        ):
            pass
    write_json(tmp_path / "run.lease", old_lease(pid=2**22 + 1))  # no process can have this id
    began = time.monotonic()
    with hold_folder(tmp_path / "run", wait=False):
        assert time.monotonic() - began < lease.EXPIRES, "the lease of a dead process is taken over at once"
        assert read_json(tmp_path / "run.lease")["machine"] != files.machine(), "older versions must wait too"


def test_a_paused_holder_notices_that_another_process_took_over(quick, node):
    a = node("a")
    with hold_folder(a.root / "run", wait=False) as mine:
        deadline = time.monotonic() + 60
        while not mine.lost and time.monotonic() < deadline:
            a.cell(a.root / "run").write(foreign_lease())  # repeated, as the holder may overwrite the file
            time.sleep(0.3)
        with pytest.raises(FolderInUse, match="was taken over by process 12 on node-7"):
            mine.check()
    assert a.cell(a.root / "run").read() == foreign_lease(), "the lease of the other process stays"


def test_a_paused_holder_notices_a_process_that_took_over_and_ended(quick, node):
    cell = node("a").cell(node("a").root / "run")
    with hold_folder(node("a").root / "run", wait=False) as mine:
        deadline = time.monotonic() + 60
        while not mine.lost and time.monotonic() < deadline:
            cell.remove()  # a process that took over removes its lease when it ends
            time.sleep(0.3)
        with pytest.raises(FolderInUse, match="was taken over by a process that has since ended"):
            mine.check()
    assert cell.read() is None, "the lost lease is not written again"


def test_an_ingest_that_lost_its_lease_leaves_the_dataset_to_the_other_process(quick, tmp_path):
    out = tmp_path / "out"

    def slow(make, items):
        yield from map(make(), items)
        deadline = time.monotonic() + 60
        while read_json(tmp_path / ".out.lease")["id"] != "f" * 32 and time.monotonic() < deadline:
            write_json(tmp_path / ".out.lease", foreign_lease())
            time.sleep(0.5)

    with pytest.raises(FolderInUse, match="was taken over by process 12 on node-7"):
        scenes = config.Scenes(train=6, val=2, test=2, size=16)
        ingest(config.Data(scenes=scenes, image_size=16), out, slow)
    assert not out.exists()


def test_a_lease_is_not_lost_while_it_cannot_be_read(quick, tmp_path, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    with hold_folder(tmp_path / "run", wait=False) as mine:
        monkeypatch.setattr(lease, "read_json", broken)
        time.sleep(0.5)
        monkeypatch.undo()
        mine.check()
        assert mine.owned()


# -- half-written files ----------------------------------------------------------------------------------------------

WRITE = """
import os, signal, sys
from rmdd.core.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.mkdir()
    (temporary / "half").write_text("half")
    print("writing", flush=True)
    signal.pause()
"""


def test_only_temporary_files_without_a_living_writer_are_removed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path / "deep" / "set")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    mine = temporary_beside(tmp_path / "mine")
    mine.touch()
    foreign, old = tmp_path / ".x.0123abcd-1-abcdef.tmp", tmp_path / ".y.0123abcd-1-abcdef.tmp"
    foreign.touch()
    old.touch()
    os.utime(old, (time.time() - 2 * files.ABANDONED_SECONDS,) * 2)
    not_ours = tmp_path / "letter.tmp"
    not_ours.touch()
    assert sweep(tmp_path) == [old]
    process.kill()
    process.communicate()
    assert [p.parent.name for p in sweep(tmp_path)] == ["deep"]
    assert mine.exists() and foreign.exists() and not_ours.exists() and not list((tmp_path / "deep").iterdir())


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"what": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_set_that_another_version_wrote_is_refused(tmp_path):
    first = toy.first_set()
    save_checked(tmp_path / "set.safetensors", first.tensors(), "set", {"alpha": 3.0})
    with pytest.raises(ValueError, match="another version of rmdd wrote the file.*to distil that phase again"):
        load_set(tmp_path / "set.safetensors")
    save_set(first, tmp_path / "set.safetensors")
    assert torch.equal(load_set(tmp_path / "set.safetensors").images, first.images)
    assert (tmp_path / "set.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    """Return the umask of this process, which can be read only by setting it."""
    before = os.umask(0)
    os.umask(before)
    return before
