"""Test `ray job submit` with a local Ray head node that is started with the options used in `clusters/`."""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import Head, outer_address, started, wait_for

import rmdd

pytestmark = pytest.mark.ray
SUBMIT = ["ray", "job", "submit", "--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
BEARER = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
TINY = [
    "data={scenes: {train: 12, val: 6, test: 6, size: 16}, image_size: 16}",
    "model.image={name: convnet, weights: random, widths: [8, 8], groups: 4, projection: linear}",
    "experts={num: 1, epochs: 2, batch: 16}",
    "distill.phases=[{pairs: 6, start: 0, stop: 1, endpoint: 2, iterations: 80}]",
    "distill.budget=8",
    "distill.batch=3",
    "distill.steps=2",
    "distill.checkpoint_every=2",
    "distill.snapshots=2",
    "evaluate={epochs: 1, students: 2, reference: false, selection_students: 1, baseline_draws: 1}",
    "evaluate.baseline_lrs=[0.1]",
    "evaluate.baseline_losses=[infonce]",
    "runtime.track=none",
    "runtime.workers=1",  # each worker imports torch at its start, which takes long
]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started() as head:
        yield head


def job(storage: Path, step: str = "run", *more: str) -> list[str]:
    sets = [f"runtime.storage={storage}", *TINY, *more]
    return ["python", f"jobs/{step}.py", "--config", "demo", *(w for s in sets for w in ("--set", s))]


def results(storage: Path) -> dict[str, bytes]:
    """Return the content of all files that equal runs must write with equal bytes: experts, sets and scores."""
    names = ("evaluation.json", "expert.json")
    files = [p for p in storage.rglob("*") if p.suffix == ".safetensors" or p.name in names]
    return {str(p.relative_to(storage)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def unbroken(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("unbroken")
    output = head.do(*SUBMIT, "--", *job(storage))
    assert "succeeded" in output and "PTM-ST" in output
    return storage


def test_the_demo_runs_to_the_end(unbroken: Path) -> None:
    (run,) = unbroken.glob("demo-*/")
    assert len(rmdd.load(run / "set").as_dataset()) == 6
    assert (run / "report.html").is_file()
    events = (run / "events.jsonl").read_text()
    assert '"item": "phase 0"' in events, "the phase must be distilled by workers of the cluster"


def test_a_stopped_job_resumes_when_submitted_again(head: Head, unbroken: Path, tmp_path: Path) -> None:
    copy_experts(unbroken, tmp_path)
    client = head.client()
    head.do(*SUBMIT, "--no-wait", "--submission-id", "stopped", "--", *job(tmp_path))
    wait_for(lambda: iterations(tmp_path) >= 5 or client.get_job_status("stopped").is_terminal())
    client.stop_job("stopped")
    wait_for(lambda: client.get_job_status("stopped").is_terminal())
    log = client.get_job_logs("stopped")
    assert client.get_job_status("stopped") == "STOPPED", log
    assert 5 <= iterations(tmp_path) < 80 and not list(tmp_path.glob("*/evaluation.json"))
    (again,) = [line for line in log.splitlines() if "submit it again: " in line]
    head.do(*shlex.split(again.partition("submit it again: ")[2]))
    assert iterations(tmp_path) == 80
    assert results(tmp_path) == results(unbroken)


def test_a_search_runs_as_a_job(head: Head, unbroken: Path, tmp_path: Path) -> None:
    copy_experts(unbroken, tmp_path)
    few = "distill.phases.0.iterations=2", "distill.snapshots=1"
    space = "search={space: {distill.lr_image: {loguniform: [0.01, 0.1]}}, trials: 2, sampler: random}"
    output = head.do(*SUBMIT, "--", *job(tmp_path, "search", *few, space))
    (folder,) = tmp_path.glob("searches/[!.]*/")
    rows = json.loads((folder / "results.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["complete"] * 2
    assert "succeeded" in output and f"best run file: {folder}/best.yaml" in output


def copy_experts(storage: Path, other: Path) -> None:
    for shared in ("data", "experts"):
        shutil.copytree(storage / shared, other / shared)
    shutil.copy(storage / "storage.json", other)


def iterations(storage: Path) -> int:
    return sum(len(p.read_text().splitlines()) for p in storage.glob("phases/*/phase-0/metrics.jsonl"))


def test_the_working_folder_is_the_code_that_runs(head: Head) -> None:
    code = (
        "import ray, rmdd; ray.init(); remote = ray.remote(lambda: __import__('rmdd').__file__);"
        "print('DRIVER', rmdd.__file__); print('WORKER', ray.get(remote.remote()))"
    )
    head.do(*SUBMIT, "--submission-id", "shipped", "--", "python", "-c", code)
    lines = head.client().get_job_logs("shipped").splitlines()  # the output of such a short job may not be streamed
    files = [line.split()[1] for line in lines if line.startswith(("DRIVER", "WORKER"))]
    assert len(files) == 2 and all(file.startswith(str(head.folder)) for file in files)


def test_the_dashboard_answers_only_on_loopback_and_with_the_token(head: Head) -> None:
    assert head.answers("127.0.0.1", **BEARER) == 200
    assert head.answers("127.0.0.1") == 401
    with pytest.raises(OSError):
        head.answers(outer_address(), **BEARER)
