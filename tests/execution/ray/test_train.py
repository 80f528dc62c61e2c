"""Test the training of experts in one run of Ray Train on a local Ray cluster, and its work queue without Ray."""

import copy
import functools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from tiny_killed import TINY

from rmdd import config
from rmdd.config import Runtime
from rmdd.core.files import sweep
from rmdd.core.progress import Progress
from rmdd.execution.backend import Backend
from rmdd.execution.executor import Mapper
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.ray import train
from rmdd.execution.ray.cluster import ENVIRONMENT, Resources, connected
from rmdd.execution.ray.feed import ray_stream
from rmdd.execution.ray.train import ExpertPool, WorkerDeaths, WorkQueue
from rmdd.execution.ray.worker import StorageNotVisible
from rmdd.execution.tasks import Failed, Interrupted, ReturnFailures
from rmdd.experts.store import Store
from rmdd.pipeline import Pipeline

pytestmark = pytest.mark.ray


@pytest.fixture
def fleet(ray_local, tmp_path, monkeypatch):
    """Fixture: a function that builds an `ExpertPool` for four CPUs. Functions of this file are pickled by value,
    because workers cannot import a test file."""
    for name, value in ENVIRONMENT.items():
        if name.startswith(("RAY_TRAIN", "RAY_CHDIR")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def build(size=1, nodes=((4.0, 0.0),), **rule):
        runtime = Runtime(**{"workers": 2, "min_workers": 2, **rule})
        return ExpertPool(runtime, Resources(nodes), tmp_path / "events.jsonl", "experts-0", tmp_path / "train", size)

    yield build
    ray_local.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def events(path, *kinds):
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if not kinds or line["event"] in kinds]


def run_of(folder, num, **experts):
    raw = copy.deepcopy(TINY)
    raw["experts"] |= {"num": num, "epochs": 4, **experts}
    raw["model"]["dropout"] = 0.0  # with dropout, each worker would draw different masks
    raw["runtime"] = {"storage": str(folder), "track": "none"}
    return config.load(raw)


def trained(run, executor=None, stream=None):
    """Train the experts of a run with `executor` or, if it is None, one after another; return their store."""
    if executor is not None:  # `fleet: train` always uses Ray Train
        run = run.model_copy(update={"runtime": run.runtime.model_copy(update={"fleet": "train"})})
    pool = None if executor is None else lambda store, size: executor
    backend = Backend(SequentialExecutor(), expert_pool=pool, pictures=stream)
    return Pipeline(run, backend, Progress(quiet=True)).experts()


def files(store):
    return {
        p.relative_to(store.path): p.read_bytes() for p in store.path.rglob("*") if p.is_file() and p.suffix != ".lock"
    }


@dataclass
class HeldUp(Mapper):
    """An executor that lets a test kill a worker after the first epoch of the expert with the number `expert`.

    The worker that trains this expert waits after that epoch until `kill` kills it. When the expert starts again, its
    worker does not wait. In a worker group, rank 0 returns `late` seconds later than the other workers.
    """

    executor: ExpertPool
    expert: int
    mark: Path
    late: float = 0.0

    def map(self, task, items, names, on_report):
        return self.executor.map(functools.partial(self.work, task), items, names, on_report)

    def work(self, task, item, hooks):
        def report(metrics):
            hooks.report(metrics)
            if item.number == self.expert and not self.mark.exists():
                self.mark.touch()
                time.sleep(60)

        done = task(item, replace(hooks, report=report))
        time.sleep(self.late * (hooks.member is not None and hooks.member.rank == 0))
        return done

    def kill(self, store):
        """Start a thread that kills the waiting worker. Return a list, to which the thread adds the worker's pid."""
        name, log = f"expert {self.expert}", self.executor.events

        def strike():
            while not self.mark.exists() or not (
                pids := [e["pid"] for e in events(log, "started") if e["item"] == name]
            ):
                time.sleep(0.02)
            assert list(store.glob(f"experts/*/expert-{self.expert:03d}/running.safetensors"))
            os.kill(pids[-1], signal.SIGKILL)
            struck.append(pids[-1])

        struck = []
        threading.Thread(target=strike, daemon=True).start()
        return struck


def test_after_the_kill_of_a_worker_experts_equal_those_of_one_process_and_later_runs_train_only_new_ones(
    fleet, tmp_path
):
    alone = files(trained(run_of(tmp_path / "alone", 4)))
    log = tmp_path / "events.jsonl"
    held_up = HeldUp(fleet(), 1, tmp_path / "mark")
    killed = held_up.kill(tmp_path / "fleet")
    store = trained(run_of(tmp_path / "fleet", 3), held_up)
    assert [(e["item"], e["pid"]) for e in events(log, "died")] == [("expert 1", *killed)]
    assert sorted(e["item"] for e in events(log, "finished")) == ["expert 0", "expert 1", "expert 2"]
    sweep(store.path)  # as every run does at its start: Ray Train also ends the other workers, perhaps while they write
    assert {k: v for k, v in alone.items() if "expert-003" not in str(k)} == files(store)
    assert all({"pid", "host", "attempt"} <= e.keys() for e in events(log, "started", "died"))

    log.unlink()
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*.safetensors")}
    store = trained(run_of(tmp_path / "fleet", 4), fleet())
    assert [e["item"] for e in events(log, "started")] == ["expert 3"]
    assert files(store) == alone
    assert {p: p.stat().st_mtime_ns for p in before} == before


def flaky(item, hooks):
    """Task that always fails on item 1 and fails once on item 2; otherwise it returns the number of the item."""
    place, folder = item
    if place == 1:
        raise ValueError("item one fails always")
    if place == 2 and not (folder / "tried").exists():
        (folder / "tried").touch()
        raise RuntimeError("out of memory once")
    hooks.report({"done": 1})
    return place


def test_an_item_that_fails_is_tried_again_and_does_not_stop_the_others(fleet, tmp_path):
    executor, reports = fleet(), {}
    assert isinstance(executor, Mapper)
    names = [f"item {i}" for i in range(5)]
    results = executor.map(ReturnFailures(flaky), [(i, tmp_path) for i in range(5)], names, reports.__setitem__)
    assert [r for r in results if not isinstance(r, Failed)] == [0, 2, 3, 4]
    assert results[1].reason == "ValueError: item one fails always" and not results[1].again
    assert reports == {n: {} if n == "item 1" else {"done": 1} for n in names}
    log = tmp_path / "events.jsonl"
    by_item = {n: [e["event"] for e in events(log) if e["item"] == n] for n in names}
    assert by_item["item 1"] == ["started", "failed"]
    assert by_item["item 2"] == ["started", "failed", "started", "finished"]
    assert [e["attempt"] for e in events(log, "started") if e["item"] == "item 2"] == [1, 2]


def wait_to_be_stopped(item, hooks):
    hooks.report({"done": 1})
    while not hooks.should_stop():
        time.sleep(0.02)
    (item / "saved").touch()
    return False


def test_an_interrupt_lets_every_worker_save(fleet, tmp_path):
    items = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for item in items:
        item.mkdir()
    reports = set()

    def interrupt(name, metrics):
        reports.add(name)
        if len(reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        fleet().map(wait_to_be_stopped, items, ["a", "b", "c"], interrupt)
    assert [(item / "saved").exists() for item in items] == [True, True, False], "no item may start after a stop"


def test_a_worker_group_with_a_killed_member_trains_the_same_experts_as_an_uninterrupted_one(fleet, tmp_path):
    one, unbroken = (trained(run_of(tmp_path / f"{n}", 2, keep="all", worker_group={"workers": n})) for n in (1, 2))
    log = tmp_path / "events.jsonl"
    held_up = HeldUp(fleet(size=2), 0, tmp_path / "mark", late=0.5)
    killed = held_up.kill(tmp_path / "group")
    store = trained(run_of(tmp_path / "group", 2, keep="all", worker_group={"workers": 2}), held_up)
    assert killed and files(store) == files(unbroken)
    (ended,) = [e["event"] for e in events(log, "died", "failed")]
    expected = [("started", "expert 0"), (ended, "expert 0")]
    expected += [(kind, f"expert {i}") for i in (1, 0) for kind in ("started", "finished")]
    assert [(e["event"], e["item"]) for e in events(log)] == expected
    assert store.path.name != one.path.name, "the hash in the name of the store must depend on the worker group"
    a, b = (Store.open(s.path).read(0, 2) for s in (one, store))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5)


def test_a_worker_group_that_does_not_fit_on_the_cluster_is_an_error(fleet):
    with pytest.raises(ValueError, match=r"needs 5 workers at the same time, but the cluster has room for 4"):
        fleet(size=5).map(flaky, [(0, None)], ["item"], lambda name, metrics: None)


def test_more_minimum_workers_than_fit_on_the_cluster_are_an_error(fleet):
    """Two nodes with three CPUs each have room for two workers with two CPUs each; three do not fit."""
    executor = fleet(size=3, nodes=((3.0, 0.0), (3.0, 0.0)), threads=2)
    with pytest.raises(ValueError, match=r"worker_group.workers needs 3 .* room for 2 with 0 GPU\(s\) and 2 CPU\(s\)"):
        executor.map(flaky, [(0, None)], ["item"], lambda name, metrics: None)
    with pytest.raises(ValueError, match=r"runtime.min_workers needs 8 .* room for 4"):
        fleet(workers=8, min_workers=8).map(flaky, [(0, None)] * 9, list("abcdefghi"), lambda name, metrics: None)


def test_a_message_is_printed_while_no_worker_is_running(fleet, monkeypatch):
    monkeypatch.setattr(train, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(ExpertPool, "_fit", lambda self, *arguments: time.sleep(2))
    executor, messages = fleet(), []
    executor.say = messages.append
    executor.map(flaky, [(0, None)] * 3, list("abc"), lambda name, metrics: None)
    assert messages[0].startswith(
        "experts: no worker is running; Ray Train waits for room for 2 worker(s) with {'CPU': 1.0}"
    )


def test_the_loss_of_the_work_queue_is_an_error_that_says_that_finished_work_is_kept(fleet, monkeypatch):
    def lose(self, queue, *arguments):
        ray.kill(queue)
        time.sleep(2)

    monkeypatch.setattr(ExpertPool, "_fit", lose)
    words = r"Ray failed \(ActorDiedError: .*finished work is kept"
    with pytest.raises(RuntimeError, match=words), connected(Runtime()):
        fleet().map(flaky, [(0, None)], ["item"], lambda name, metrics: None)


def test_a_worker_that_does_not_see_the_storage_starts_no_item(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "folder_to_check", lambda runtime, events: tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match=r"^node .* does not see .*elsewhere; .* finished epochs are kept"):
        fleet().map(ReturnFailures(flaky), [(0, tmp_path)] * 2, ["a", "b"], lambda name, metrics: None)
    assert events(tmp_path / "events.jsonl") == []


def test_a_member_of_a_worker_group_that_does_not_see_the_storage_stops_the_others(ray_local, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "1")
    member = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: member)
    queue = ray_local.remote(WorkQueue).options(num_cpus=0).remote(["expert 0"], 2, 0)
    with pytest.raises(StorageNotVisible):
        train.work(queue, flaky, [(0, tmp_path)], 2, 1, tmp_path / "elsewhere")
    _, refusal = ray_local.get(queue.outcome.remote())
    assert "does not see" in refusal and ray_local.get(queue.take.remote("here:1", 0, 0)) == [None]
    ray_local.kill(queue)


def test_images_streamed_by_ray_data_train_the_same_expert_as_cached_images(ray_local, tmp_path):
    cached = trained(run_of(tmp_path / "cache", 1, epochs=3, keep="all"))
    run = run_of(tmp_path / "stream", 1, epochs=3, keep="all")
    run = run.model_copy(update={"runtime": run.runtime.model_copy(update={"cache_gb": 0.0})})
    used = []

    def stream(look, parts, width):
        used.append(len(parts))
        yield from ray_stream(look, parts, 2, cpus=0)

    assert files(trained(run, stream=stream)) == files(cached) and len(used) == 3


# -- the work queue without Ray --------------------------------------------------------------------------------------


def new_queue(items=3, size=1, tries=1):
    queue = WorkQueue([f"expert {i}" for i in range(items)], size, tries)
    for rank in range(2 * size):
        queue.register("first", rank, {"pid": rank, "host": f"node-{rank}"})
    return queue


def test_the_death_of_a_worker_counts_only_against_its_own_item():
    queue = new_queue()
    assert [queue.take("first", group, 0) for group in (0, 1)] == [[0], [1]]
    queue.lost({1: "killed"})
    for rank in (0, 1):
        queue.register("second", rank, {"pid": 10 + rank, "host": "node"})
    assert queue.faults == [0, 1, 0]
    assert [queue.take("second", group, 0) for group in (0, 1)] == [[0], [2]], "a lost item must start first"
    queue.settle("second", 0, 0, True)
    assert queue.take("second", 0, 1) == [1]
    queue.lost({0: "killed"})
    queue.settle("second", 1, 0, True)
    assert queue.results == {0: True, 1: Failed("its worker died (killed), 2 times", "node", False), 2: True}
    kinds = [(e["event"], e["item"]) for e in queue.news()[0]]
    assert kinds.count(("died", "expert 1")) == 2 and queue.news()[:2] == ([], {})


def test_the_loss_of_a_node_does_not_count_against_its_item():
    queue = new_queue(size=2)
    queue.take("first", 0, 0)
    queue.lost({0: None, 1: "the node has died"}, away={1})
    queue.register("second", 0, {"pid": 9, "host": "node"})
    assert queue.faults == [0, 0, 0] and queue.take("second", 0, 0) == [0]
    assert [e["event"] for e in queue.news()[0]] == ["started", "lost", "started"]


@pytest.mark.parametrize(("node", "faults"), [("here", 1), ("gone", 0)])
def test_the_death_of_a_worker_is_distinguished_from_the_loss_of_its_node(node, faults, ray_local):
    here = ray_local.get_runtime_context().get_node_id()
    queue = ray_local.remote(WorkQueue).options(num_cpus=0).remote(["expert 0"], 1, 0)
    queue.register.remote("first", 0, {"pid": 1, "host": "a", "node": here if node == "here" else "0" * 56})
    queue.take.remote("first", 0, 0)
    WorkerDeaths(queue).after_exception(None, {0: WorkerHealthCheckFailedError("it is gone", RuntimeError("killed"))})
    results, _ = ray_local.get(queue.outcome.remote())
    assert len(results) == faults
    assert ray_local.get(queue.take.remote("first", 0, 1)) == ([None] if faults else [0])
    ray_local.kill(queue)


def test_all_members_of_a_worker_group_get_the_item_that_its_leader_drew():
    queue = new_queue(items=2, size=2)
    assert queue.take("first", 0, 0, leads=False) == []
    assert [queue.take("first", group, 0, leads) for leads in (True, False) for group in (0, 1)] == [[0], [1], [0], [1]]
    assert queue.take("first", 0, 1, leads=False) == [], "its leader must settle the previous item first"
    queue.settle("first", 0, 0, True)
    assert queue.results == {0: True}
    assert queue.take("first", 0, 1) == [None] == queue.take("first", 0, 1, leads=False)
    queue.explain(1, Failed("RuntimeError: connection closed", "a", True))
    queue.explain(1, Failed("ValueError: diverged", "b", False))
    queue.lost({2: None, 3: None})
    assert queue.results[1].reason == "ValueError: diverged"


def test_fewer_workers_of_a_new_generation_take_over_all_unfinished_items():
    queue = new_queue(items=2)
    assert [queue.take("first", group, 0) for group in (0, 1)] == [[0], [1]]
    queue.register("second", 0, {"pid": 9, "host": "node"})
    assert [queue.take("second", 0, turn) for turn in (0, 1)] == [[0], [1]] and queue.faults == [0, 0]


def test_calls_of_a_worker_of_an_earlier_generation_are_ignored():
    queue = new_queue(items=2)
    assert queue.take("first", 0, 0) == [0]
    queue.register("second", 0, {"pid": 9, "host": "node"})
    assert queue.take("second", 0, 0) == [0] and queue.take("first", 0, 1) == [None]
    queue.settle("first", 0, 0, True)
    assert queue.results == {}
    for _ in range(2):
        queue.settle("second", 0, 0, True)
    assert queue.results == {0: True} and queue.take("second", 0, 1) == [1]
    queue.settle("second", 0, 0, True)
    assert queue.results == {0: True} and queue.running == {0: 1}


def test_a_stopped_queue_gives_out_no_item():
    queue = new_queue()
    assert queue.take("first", 0, 0) == [0] and not queue.beat(0, {"done": 3})
    queue.stop()
    assert queue.beat(0, None) and queue.take("first", 1, 0) == [None]
    assert queue.news()[1] == {"expert 0": {"done": 3}}
