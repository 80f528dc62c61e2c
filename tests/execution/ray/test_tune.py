"""Test that a search with Ray Tune gives the same results as without Ray, also if workers die or hang."""

import os
import signal
import threading
import time

import pytest
import yaml
from tiny import QUIET
from tiny_search import BOTH, LR, searched

import rmdd
from rmdd import config
from rmdd.cli.command import stop_on_sigterm
from rmdd.execution.ray.cluster import ENVIRONMENT, resources_now
from rmdd.execution.ray.tune import run_trials
from rmdd.execution.tasks import Interrupted

pytestmark = pytest.mark.ray
KEEP = ("number", "state", "values", "curve", "val")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_a_search_has_the_same_results_with_ray_and_tune_leaves_no_files(ray_local, tmp_path):
    raw = searched(tmp_path / "on", {"distill.lr_image": LR, **BOTH}, trials=5, pruner="asha", concurrency=1)
    raw["runtime"]["ray"] = "on"
    on = rmdd.search(raw, progress=QUIET)
    raw["runtime"] |= {"ray": "off", "storage": str(tmp_path / "off")}
    off = rmdd.search(raw, progress=QUIET)
    rows = [[{key: row[key] for key in KEEP} for row in result.table.rows] for result in (on, off)]
    assert rows[0] == rows[1] and len(rows[0]) == 5 and on.failures == {}
    sets = [{p.parts[-3:]: p.read_bytes() for p in (tmp_path / n).glob("phases/*/*/set-*")} for n in ("on", "off")]
    assert sets[0] == sets[1]
    assert not list((tmp_path / "on" / "fleets").glob("search-*"))
    assert config.load(yaml.safe_load((on.folder / "best.yaml").read_text())).hash_of()


class Numbers:
    """`TrialSource` with one trial per number in a list; it records all results, and ends trials with a low score."""

    def __init__(self, numbers, stop_below=0):
        self.remaining, self.stop_below = list(numbers), stop_below
        self.results, self.open, self.most, self.failures = [], set(), 0, {}

    def ask(self):
        if not self.remaining:
            return None
        number = self.remaining.pop(0)
        self.open.add(f"n{number}")
        self.most = max(self.most, len(self.open))
        return f"n{number}", number

    def tell(self, name, rung):
        self.results.append((name, rung["step"]))
        continues = not rung["done"] and rung["val"] >= self.stop_below
        if not continues:
            self.open.discard(name)
        return continues

    def fail(self, name, why):
        self.open.discard(name)
        self.failures[name] = why


def counting(folder, dies=()):
    """Return a `TrialRunner` class with three rungs; each trial in `dies` kills its worker once, in rung 2."""

    class Counter:
        def __init__(self, number):
            self.number, self.step = number, 0

        def run_rung(self, hooks):
            self.step += 1
            mark = folder / f"died-{self.number}"
            if self.number in dies and self.step == 2 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"step": self.step, "val": float(self.number), "done": self.step == 3}

    return Counter


def test_the_source_can_end_a_trial_and_a_dead_worker_is_replaced(ray_local, tmp_path):
    runtime = config.Runtime(storage=str(tmp_path))
    source = Numbers([1, 5, 2, 7], stop_below=3)
    run_trials(source, counting(tmp_path, dies=(7,)), runtime, resources_now(), 2)
    assert source.most == 2 and source.open == set() and source.failures == {}
    steps = {name: [s for n, s in source.results if n == name] for name in ("n1", "n2", "n5", "n7")}
    assert steps == {"n1": [1], "n2": [1], "n5": [1, 2, 3], "n7": [1, 1, 2, 3]}


def test_an_error_of_the_source_stops_the_search(ray_local, tmp_path):
    class Broken(Numbers):
        def ask(self):
            raise ValueError("narrow search.space")

    with pytest.raises(ValueError, match="narrow search.space"):
        run_trials(Broken([1]), counting(tmp_path), config.Runtime(storage=str(tmp_path)), resources_now(), None)


def wait_for(reached):
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes_ended(folder):
    """Return whether all processes that wrote a file `pid-*` to `folder` have ended."""
    pids = [int(file.name.removeprefix("pid-")) for file in folder.glob("pid-*")]
    return bool(pids) and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_worker_that_hangs_is_replaced(ray_local, tmp_path):
    class Hanging:
        def __init__(self, number):
            self.mark = tmp_path / f"pid-{os.getpid()}"

        def run_rung(self, hooks):
            first = not list(tmp_path.glob("pid-*"))
            self.mark.touch()
            if first:
                os.kill(os.getpid(), signal.SIGSTOP)
            return {"step": 1, "val": 1.0, "done": True}

    messages, source = [], Numbers([1])
    runtime = config.Runtime(storage=str(tmp_path), stall_limit=3 / 60)
    run_trials(source, Hanging, runtime, resources_now(), 1, messages.append)
    assert source.results == [("n1", 1)] and "made no progress" in messages[0] and len(list(tmp_path.glob("pid-*"))) > 1


def test_the_source_gets_the_reason_of_a_failed_trial(ray_local, tmp_path):
    class Failing:
        def __init__(self, number):
            pass

        def run_rung(self, hooks):
            raise RuntimeError("out of memory on the card")

    source = Numbers([1])
    run_trials(source, Failing, config.Runtime(storage=str(tmp_path), max_restarts=0), resources_now(), 1)
    assert "out of memory on the card" in source.failures["n1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_workers_save_and_end_also_on_a_cluster_that_keeps_running(ray_local, tmp_path, number):
    class Saving:
        def __init__(self, number):
            (tmp_path / f"pid-{os.getpid()}").touch()

        def run_rung(self, hooks):
            (tmp_path / "climbs").touch()
            while not hooks.should_stop():
                time.sleep(0.05)
            (tmp_path / "saved").touch()
            raise Interrupted

    def stop():
        wait_for((tmp_path / "climbs").exists)
        os.kill(os.getpid(), number)

    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    threading.Thread(target=stop).start()
    try:
        with pytest.raises(Interrupted):
            run_trials(Numbers([1, 2]), Saving, config.Runtime(storage=str(tmp_path)), resources_now(), 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "saved").exists()
    wait_for(lambda: processes_ended(tmp_path))
