"""Kill what works, go on, and compare bits with a run that nobody touched."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from rmdd import config
from rmdd.pipeline import run_folder

pytestmark = pytest.mark.ray

TINY = {
    "name": "tiny",
    "data": {"source": "scenes", "image_size": 16, "scenes": {"train": 60, "val": 12, "test": 12, "size": 16}},
    "model": {
        "image": {"name": "convnet", "weights": "random", "widths": [8, 8], "groups": 4, "projection": "linear"},
        "text": {"name": "hashing", "width": 32, "projection": "block"},
        "width": 16,
    },
    "experts": {
        "num": 2,
        "epochs": 6,
        "batch": 16,
        "augment": {"crop": True, "flip": 0.5, "randaugment_ops": 2},
    },
    "distill": {
        "budget": 14,
        "phases": [
            {"pairs": 6, "start": 0, "stop": 1, "endpoint": 2, "iterations": 60},
            {"pairs": 7, "start": 1, "stop": 2, "endpoint": 3, "iterations": 60},
        ],
        "batch": 3,
        "steps": 2,
        "inner_lr": 0.01,
        "lr_lr": 1e-5,
        "lr_image": 1.0,
        "lr_text": 1.0,
        "lr_similarity": 0.1,
        "checkpoint_every": 5,
        "snapshots": 2,
    },
    "evaluate": {
        "epochs": 3,
        "students": 2,
        "baseline_lrs": [0.1],
        "baseline_losses": ["infonce"],
        "baseline_draws": 2,
    },
}


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    runtime = {"storage": str(folder / "runs"), "ray": "on", "num_cpus": 2, "track": "none"}
    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY, "runtime": runtime}))
    return folder / "run.yaml"


def start(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rmdd", *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def results(folder: Path) -> dict[str, bytes]:
    """Everything that a run's value decides: stores, sets and scores, without clocks and places."""
    runs = folder / "runs"
    files = [
        p
        for p in runs.rglob("*")
        if p.is_file() and (p.suffix == ".safetensors" or p.name in ("evaluation.json", "expert.json"))
    ]
    assert not [p for p in runs.rglob("*.tmp")], "a temporary file was left behind"
    return {str(p.relative_to(runs)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start("run", str(write_run(folder)), "--quiet"))
    return results(folder)


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 300) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the run ended before it was killed: {process.communicate()[0]}"
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("what was waited for never came")


def pid_of(folder: Path, item: str) -> int | None:
    run = run_folder(config.load(folder / "run.yaml"))
    found = [e["pid"] for e in events(run / "events.jsonl") if e["event"] == "started" and e["item"] == item]
    return found[-1] if found else None


def lines_of(folder: Path, pattern: str) -> int:
    return sum(len(p.read_text().splitlines()) for p in (folder / "runs").glob(pattern))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    write_run(tmp_path)
    yield tmp_path


def test_killed_phase_actor_is_restarted_from_its_checkpoint(folder: Path, unbroken: dict[str, bytes]) -> None:
    process = start("run", str(folder / "run.yaml"), "--quiet")
    pid = wait_for(
        lambda: lines_of(folder, "phases/*/phase-1/metrics.jsonl") >= 10 and pid_of(folder, "phase 1"), process
    )
    os.kill(int(str(pid)), signal.SIGKILL)
    finish(process)
    run = run_folder(config.load(folder / "run.yaml"))
    assert [e["item"] for e in events(run / "events.jsonl") if e["event"] == "died"] == ["phase 1"]
    assert results(folder) == unbroken


def test_killed_expert_worker_is_restarted_at_its_last_epoch(folder: Path, unbroken: dict[str, bytes]) -> None:
    process = start("run", str(folder / "run.yaml"), "--quiet")
    begun = lambda: list((folder / "runs").glob("experts/*/expert-001/running.safetensors"))  # noqa: E731
    pid = wait_for(lambda: begun() and pid_of(folder, "expert 1"), process)
    os.kill(int(str(pid)), signal.SIGKILL)
    finish(process)
    assert results(folder) == unbroken


@pytest.mark.parametrize(
    "moment",
    ["experts/*/expert-000/running.safetensors", "phases/*/phase-0/state.safetensors", "tiny-*/students/*.json"],
)
def test_killed_driver_goes_on_with_resume(folder: Path, unbroken: dict[str, bytes], moment: str) -> None:
    process = start("run", str(folder / "run.yaml"), "--quiet")
    wait_for(lambda: list((folder / "runs").glob(moment)), process)
    process.kill()
    process.communicate()
    time.sleep(4)  # the workers of a killed driver end within 3 s
    run = run_folder(config.load(folder / "run.yaml"))
    assert not (run / "evaluation.json").exists()
    finish(start("resume", str(run), "--quiet"))
    assert results(folder) == unbroken


def test_terminated_run_saves_stops_and_says_how_to_go_on(folder: Path, unbroken: dict[str, bytes]) -> None:
    process = start("run", str(folder / "run.yaml"))
    wait_for(lambda: lines_of(folder, "phases/*/phase-0/metrics.jsonl") >= 5, process)
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    run = run_folder(config.load(folder / "run.yaml"))
    assert f"rmdd resume {run}" in output
    finish(start("resume", str(run), "--quiet"))
    assert results(folder) == unbroken


def test_ray_off_gives_the_same_bits(folder: Path, unbroken: dict[str, bytes]) -> None:
    finish(start("run", str(folder / "run.yaml"), "--set", "runtime.ray=off", "--quiet"))
    assert results(folder) == unbroken
