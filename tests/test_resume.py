"""Kill drivers, workers and nodes of Ray runs, resume the runs, and compare the results with a run without kills."""

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Rmdd
from ray_head import patiently
from tiny import changed
from tiny_killed import TINY

from rmdd import config
from rmdd.core.storage import run_folder

pytestmark = pytest.mark.ray


CHAINED = changed(
    TINY,
    distill={
        "phases": [{"pairs": 6, "start": 0, "stop": 2, "endpoint": 3, "iterations": 30}] * 2,
        "path_start": "student",
        "path_lag": 10,
    },
)


def write_run(folder: Path, raw: Mapping[str, Any] = TINY, **runtime: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    places = {"storage": str(folder / "runs"), "ray": "on", "num_cpus": 2, "track": "none", **runtime}
    (folder / "run.yaml").write_text(yaml.safe_dump({**raw, "runtime": places}))
    return folder / "run.yaml"


def finish(process: Rmdd) -> None:
    output = process.communicate()
    assert process.returncode == 0, output


def results(folder: Path) -> dict[str, bytes]:
    """Return all results of a run (stores, sets and scores) without timings and paths."""
    runs = folder / "runs"
    files = [
        p
        for p in runs.rglob("*")
        if p.is_file() and (p.suffix == ".safetensors" or p.name in ("evaluation.json", "examples.json", "expert.json"))
    ]
    return {str(p.relative_to(runs)): p.read_bytes() for p in files}


def made(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of each file of finished work; both change if it is rewritten."""
    patterns = ("data/*/*.parquet", "experts/*/*/expert.json", "baselines/*/*.json", "phases/*/*/start.safetensors")
    result = [p for pattern in patterns for p in (folder / "runs").glob(pattern)]
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in result}


class Nodes:
    """A Ray cluster of processes on this machine whose nodes can be killed; the head node runs no tasks."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        health = {"initial_delay_ms": 0, "period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 3}
        head = {"num_cpus": 0, "_system_config": {f"health_check_{key}": value for key, value in health.items()}}
        small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head | small))
        self.nodes = [self.add(), self.add()]

    @property
    def place(self) -> dict[str, object]:
        return {"num_cpus": None, "address": self.cluster.address}

    def add(self):
        return patiently(lambda: self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20))

    def kill(self, node) -> None:
        """Kill a node abruptly, as if its machine were switched off, and start a new node."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)
        self.nodes.append(self.add())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    started.cluster.shutdown()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken")
    finish(Rmdd("run", write_run(folder), "--set", "runtime.ray=off", "--quiet"))
    return results(folder)


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(condition: Callable[[], object], process: Rmdd, seconds: float = 300) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the run ended before the test killed it: {process.communicate()}"
        if result := condition():
            return result
        time.sleep(0.005)
    raise AssertionError("the awaited condition did not occur in time")


def pid_of(folder: Path, item: str) -> int | None:
    logs = (folder / "runs").glob("tiny-*/events.jsonl")
    result = [e["pid"] for log in logs for e in events(log) if e["event"] == "started" and e["item"] == item]
    return result[-1] if result else None


def lines_of(folder: Path, pattern: str) -> int:
    return sum(len(p.read_text().splitlines()) for p in (folder / "runs").glob(pattern))


def run_of(folder: Path) -> Path:
    return run_folder(config.load(folder / "run.yaml"))


def in_phases(folder: Path, lines: int) -> Callable[[], object]:
    return lambda: lines_of(folder, "phases/*/phase-1/metrics.jsonl") >= lines and pid_of(folder, "phase 1")


def test_killed_workers_are_replaced_and_a_lost_node_costs_no_attempt(
    tmp_path: Path, unbroken: dict, nodes: Nodes
) -> None:
    process = Rmdd("run", write_run(tmp_path, **nodes.place, max_restarts=1), "--quiet")
    log = run_of(tmp_path) / "events.jsonl"
    begun = lambda: list((tmp_path / "runs").glob("experts/*/expert-001/running.safetensors"))  # noqa: E731
    os.kill(int(str(wait_for(lambda: begun() and pid_of(tmp_path, "expert 1"), process))), signal.SIGKILL)
    os.kill(pid := int(str(wait_for(in_phases(tmp_path, 4), process))), signal.SIGKILL)
    wait_for(lambda: in_phases(tmp_path, 6)() not in (False, pid), process)
    where = [e["node"] for e in events(log) if e["item"] == "phase 1"][-1]
    nodes.kill(next(node for node in nodes.nodes if node.node_id == where))
    finish(process)
    assert [e["item"] for e in events(log) if e["event"] == "died"] == ["expert 1", "phase 1"]
    seen = [e["event"] for e in events(log) if e["item"] == "phase 1"]
    assert seen[:3] == ["started", "died", "started"] and seen[-2:] == ["started", "finished"]
    assert set(seen[3:-2]) == {"lost"}, "one more `died` event would have exceeded the limit"
    assert results(tmp_path) == unbroken


def test_killed_and_terminated_drivers_resume(tmp_path: Path, unbroken: dict, nodes: Nodes) -> None:
    process = Rmdd("run", write_run(tmp_path, **nodes.place), "--quiet")
    kept: dict[str, tuple[int, int]] = {}
    run = run_of(tmp_path)
    for moment in ("experts/*/expert-000/expert.json", None, "tiny-*/students/*.json"):
        if moment is not None:
            wait_for(lambda moment=moment: list((tmp_path / "runs").glob(moment)), process)
            process.kill()
            process.communicate()
        else:
            wait_for(in_phases(tmp_path, 5), process)
            process.terminate()
            output = "".join(process.communicate())
            assert process.returncode == 130 and f"rmdd resume {run}" in output, output
        assert not (run / "evaluation.json").exists()
        assert kept.items() <= made(tmp_path).items(), "finished work is not repeated"
        kept = made(tmp_path)
        process = Rmdd("resume", run, "--quiet")
    finish(process)
    assert kept and kept.items() <= made(tmp_path).items()
    assert results(tmp_path) == unbroken


def test_chained_phases_resume_and_have_the_bits_of_a_run_without_ray(tmp_path: Path, nodes: Nodes) -> None:
    alone = tmp_path / "alone"
    finish(Rmdd("run", write_run(alone, CHAINED), "--set", "runtime.ray=off", "--quiet"))
    killed = tmp_path / "killed"
    process = Rmdd("run", write_run(killed, CHAINED, **nodes.place, max_restarts=1), "--quiet")
    os.kill(int(str(wait_for(lambda: pid_of(killed, "phase 1, expert 1"), process))), signal.SIGKILL)
    os.kill(int(str(wait_for(in_phases(killed, 4), process))), signal.SIGKILL)
    wait_for(in_phases(killed, 12), process)  # within its second segment
    process.kill()
    process.communicate()
    finish(Rmdd("resume", run_of(killed), "--quiet"))
    died = [e["item"] for e in events(run_of(killed) / "events.jsonl") if e["event"] == "died"]
    assert died == ["phase 1, expert 1", "phase 1"]
    assert results(killed) == results(alone)


KILLS = 20


@pytest.mark.slow
def test_soak(tmp_path: Path, unbroken: dict, nodes: Nodes) -> None:
    """Kill drivers, workers and nodes at random moments, at least twenty times, and check the finished runs."""
    draw, kills = random.Random(0), Counter[str]()
    for number in range(100):
        folder = tmp_path / f"run-{number}"
        file = write_run(folder, **nodes.place, max_restarts=KILLS)
        process, kept = Rmdd("run", file, "--quiet"), made(folder)
        while wait_a_while(folder, process, draw):
            victim = draw.choice(("driver", "worker", "worker", "node"))
            working = pids(run_of(folder))
            if victim == "driver":
                process.kill()
                process.communicate()
                process = Rmdd("resume", run_of(folder), "--quiet")
            elif victim == "node":
                nodes.kill(draw.choice(nodes.nodes))
            elif working:
                victim, pid = draw.choice(sorted(working.items()))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            else:
                continue
            kills[victim] += 1
            print(f"{time.strftime('%X')} run {number}: killed {victim}, {kills.total()} in all", flush=True)
            assert kept.items() <= made(folder).items(), "finished work is not repeated"
            kept = made(folder)
        finish(process)
        assert kept.items() <= made(folder).items()
        assert results(folder) == unbroken
        if kills.total() >= KILLS:
            return
    raise AssertionError(f"100 runs had only these kills: {kills}")


def pids(run: Path) -> dict[str, int]:
    """Return the process id of each work item in progress, by item name."""
    working = {}
    for event in events(run / "events.jsonl"):
        if event["event"] == "started":
            working[event["item"]] = event["pid"]
        else:
            working.pop(event["item"], None)
    return working


def wait_a_while(folder: Path, process: Rmdd, draw: random.Random) -> bool:
    """Wait until the run has made progress, plus a random time; return False if the run has ended."""

    def progress() -> int:
        return lines_of(folder, "tiny-*/events.jsonl") + lines_of(folder, "phases/*/*/metrics.jsonl") // 10

    before, until = progress(), None
    while process.poll() is None:
        if until is None and progress() > before:
            until = time.monotonic() + draw.uniform(0, 5)
        if until is not None and time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False
