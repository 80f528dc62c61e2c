import json
import os
import re
import signal
import sys
import time
import urllib.request

import pytest

from rmdd.config import Runtime
from rmdd.execution.executor import Executor, Piece, all_at_once
from rmdd.execution.ray import actors
from rmdd.execution.ray.actors import ActorExecutor
from rmdd.execution.ray.cluster import Resources
from rmdd.execution.tasks import Interrupted, ReturnFailures

pytestmark = pytest.mark.ray


@pytest.fixture
def side_by_side(ray_local, tmp_path):
    """Fixture: a function that builds an `ActorExecutor` with two workers. Functions of this file are pickled by
    value, because workers cannot import a test file."""
    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield lambda **rule: ActorExecutor(
        Runtime(**{"workers": 2, **rule}), Resources(((8.0, 0.0),)), tmp_path / "events.jsonl"
    )
    ray_local.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def events(tmp_path, item=None):
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if item is None or line["item"] == item]


def names_of(items):
    return [f"item {i}" for i in range(len(items))]


def ignore(name, metrics):
    pass


def square(item, hooks):
    time.sleep(0.1 * (5 - item))  # items finish in reverse order
    hooks.report({"done": 1})
    return item * item, os.getpid()


def fail_on_two(item, hooks):
    if item == 2:
        raise ValueError("item two is invalid; remove it")
    return item


def die_until(item, hooks):
    """Task: kill this process in the first `deaths` calls, counted by files in `folder`; `item` is (folder, deaths)."""
    folder, deaths = item
    died = len(list(folder.glob("died-*")))
    if died < deaths:
        (folder / f"died-{died}").touch()
        time.sleep(0.3)  # the worker sends a heartbeat before the kill
        os.kill(os.getpid(), signal.SIGKILL)
    return f"after {died}"


def wait_to_be_stopped(item, hooks):
    hooks.report({"done": 1})
    while not hooks.should_stop():
        time.sleep(0.02)
    (item / "saved").touch()
    return False


def hang_once(item, hooks):
    hooks.report({"done": 1})
    if not (item / "hung").exists():
        (item / "hung").touch()
        time.sleep(600)
    return "done"


def leave_once(item, hooks):
    """Task: at the first call, send SIGTERM to this process, as a leaving node would; then save and stop."""
    if (item / "saved").exists():
        return os.getpid()
    os.kill(os.getpid(), signal.SIGTERM)
    while not hooks.should_stop():
        time.sleep(0.02)
    (item / "saved").write_text(str(os.getpid()))
    return False


def stop_once(item, hooks):
    return "done" if (item / "saved").exists() else wait_to_be_stopped(item, hooks)


def report_until_stopped(item, hooks):
    for done in range(1, 1200):
        hooks.report({"done": done, "pairs/s": 12.5})
        if (item / "stop").exists():
            return True
        time.sleep(0.1)
    return False


def meet(item, hooks):
    """Task: wait until all items have started, so that each needs its own worker; return the pid of the worker."""
    folder, number, others = item
    (folder / f"here-{number}").touch()
    while len(list(folder.glob("here-*"))) < others:
        time.sleep(0.02)
    return os.getpid()


def test_results_are_in_the_order_of_the_items(side_by_side, tmp_path):
    executor, items = side_by_side(), list(range(6))
    assert isinstance(executor, Executor)
    results = executor.map(square, items, names_of(items), ignore)
    assert [value for value, _ in results] == [0, 1, 4, 9, 16, 25]
    assert len({pid for _, pid in results}) == 2, "two actors must run all items together"
    for name in names_of(items):
        assert [line["event"] for line in events(tmp_path, name)] == ["started", "finished"]
    assert {line["pid"] for line in events(tmp_path) if line["event"] == "started"} == {pid for _, pid in results}


def test_more_workers_than_fit_on_the_cluster_start_later(side_by_side):
    items = list(range(5))
    begun: list[str] = []
    results = side_by_side(workers=3, threads=2).map(
        square, items, names_of(items), lambda name, metrics: begun.extend([] if metrics else [name])
    )
    assert sorted(begun) == names_of(items), "a report without metrics announces the start of each item"
    assert [value for value, _ in results] == [0, 1, 4, 9, 16]


def test_an_empty_list_of_items_starts_no_actor(side_by_side, tmp_path):
    assert side_by_side().map(square, [], [], ignore) == []
    assert not (tmp_path / "events.jsonl").exists()


def test_the_error_of_a_task_is_raised_unchanged_and_with_a_note_of_its_node(side_by_side, tmp_path):
    items = list(range(4))
    with pytest.raises(ValueError) as caught:
        side_by_side().map(fail_on_two, items, names_of(items), ignore)
    assert type(caught.value) is ValueError and caught.value.args == ("item two is invalid; remove it",)
    assert [line["event"] for line in events(tmp_path, "item 2")] == ["started", "failed"], (
        "an item whose task raises an error must not run again"
    )
    assert events(tmp_path, "item 2")[-1]["error"] == "item two is invalid; remove it"
    where = events(tmp_path, "item 2")[0]
    (note,) = caught.value.__notes__
    assert note == f"item 2 failed on node {where['node'][:8]} ({where['host']}), pid {where['pid']}"


def test_a_killed_worker_is_replaced_and_its_item_starts_again(side_by_side, tmp_path):
    for name in ("healthy", "mortal"):
        (tmp_path / name).mkdir()
    items = [(tmp_path / "healthy", 0), (tmp_path / "mortal", 1)]
    assert side_by_side().map(die_until, items, names_of(items), ignore) == ["after 0", "after 1"]
    lines = events(tmp_path, "item 1")
    assert [line["event"] for line in lines] == ["started", "died", "started", "finished"]
    assert [lines[0]["attempt"], lines[2]["attempt"]] == [1, 2] and lines[0]["pid"] != lines[2]["pid"]
    assert [line["event"] for line in events(tmp_path, "item 0")] == ["started", "finished"]


def test_a_worker_that_keeps_dying_is_given_up(side_by_side, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"the worker of item 0 died 2 times .*checkpoint is kept; .*raise runtime.max_restarts"
    ):
        side_by_side(max_restarts=1).map(die_until, [(tmp_path, 9)], ["item 0"], ignore)
    assert [line["event"] for line in events(tmp_path)].count("died") == 2
    assert len(list(tmp_path.glob("died-*"))) == 2


def test_under_return_failures_an_item_whose_workers_keep_dying_does_not_stop_the_others(side_by_side, tmp_path):
    for name in ("mortal", "healthy"):
        (tmp_path / name).mkdir()
    items = [(tmp_path / "mortal", 9), (tmp_path / "healthy", 0)]
    failed, finished = side_by_side(max_restarts=1).map(ReturnFailures(die_until), items, names_of(items), ignore)
    assert finished == "after 0"
    assert failed.reason.startswith("the worker of item 0 died 2 times") and not failed.again and failed.host != "?"


def test_an_interrupt_lets_every_worker_save(side_by_side, tmp_path):
    items = [tmp_path / "a", tmp_path / "b"]
    for item in items:
        item.mkdir()
    reported = set()

    def interrupt(name, metrics):
        if metrics:
            reported.add(name)
        if len(reported) == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        side_by_side().map(wait_to_be_stopped, items, names_of(items), interrupt)
    assert all((item / "saved").exists() for item in items)


def test_a_worker_that_hangs_is_killed_and_started_again(side_by_side, tmp_path):
    messages = []
    executor = side_by_side(stall_limit=0.2)
    executor.say = messages.append
    assert executor.map(hang_once, [tmp_path], ["item 0"], ignore) == ["done"]
    assert [line["event"] for line in events(tmp_path)] == ["started", "hung", "started", "finished"]
    assert events(tmp_path)[1]["why"].startswith("no progress for 0.2 minutes")
    assert messages[0].startswith("item 0: hung on node ") and messages[1].startswith("item 0: continues on node ")


def test_a_worker_that_gets_sigterm_saves_and_another_worker_resumes(side_by_side, tmp_path):
    (pid,) = side_by_side(max_restarts=0).map(leave_once, [tmp_path], ["item 0"], ignore)
    assert pid != int((tmp_path / "saved").read_text())
    assert [line["event"] for line in events(tmp_path)] == ["started", "moved", "started", "finished"]


def test_a_worker_on_a_drained_node_saves_and_another_worker_resumes(side_by_side, ray_local, tmp_path, monkeypatch):
    assert actors.draining() == set()
    here, saved = ray_local.nodes()[0]["NodeID"], tmp_path / "saved"
    monkeypatch.setattr(actors, "draining", lambda: set() if saved.exists() else {here})
    monkeypatch.setattr(actors, "NODES_SECONDS", 0.1)
    assert side_by_side(max_restarts=0).map(stop_once, [tmp_path], ["item 0"], ignore) == ["done"]
    assert [line["event"] for line in events(tmp_path)] == ["started", "moved", "started", "finished"]


def test_fractions_of_a_cpu_fit_side_by_side(side_by_side, tmp_path):
    items = [(tmp_path, n, 5) for n in range(5)]
    pids = side_by_side(workers=5, cpus_per_worker=0.5).map(meet, items, names_of(items), ignore)
    assert len(set(pids)) == 5, "five workers with half a CPU each must run on four CPUs at the same time"


def test_a_result_or_error_is_passed_only_to_its_own_piece(side_by_side):
    ended = {}

    def piece(number):
        def settle(result, error):
            ended[number] = result if error is None else str(error)

        return Piece(fail_on_two, number, f"item {number}", lambda metrics: None, settle)

    side_by_side().serve(all_at_once([piece(n) for n in range(4)]))
    assert ended == {0: 0, 1: 1, 2: "item two is invalid; remove it", 3: 3}


def test_actors_are_kept_for_the_next_items_inside_a_with_block(side_by_side):
    with side_by_side() as executor:
        first, second = (executor.map(square, [3, 4], ["a", "b"], ignore) for _ in range(2))
        assert {pid for _, pid in first} == {pid for _, pid in second}
    assert executor.idle == []


def test_reports_are_shown_as_metrics_of_the_ray_dashboard(side_by_side, ray_local, tmp_path):
    node = ray_local.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    gauges = {}

    def look(name, metrics):
        page = urllib.request.urlopen(address, timeout=5).read().decode()
        for line in page.splitlines():
            if match := re.match(r'ray_rmdd_(\w+){.*item="item 0".*} (\S+)', line):
                gauges[match[1]] = float(match[2])
        if "done_per_second" in gauges:
            (tmp_path / "stop").touch()

    side_by_side().map(report_until_stopped, [tmp_path], ["item 0"], look)
    assert gauges["pairs_per_second"] == 12.5 and gauges["done"] > 1
    assert gauges["done_per_second"] > 0 and gauges["peak_memory_bytes"] > 2**20
