"""`ray job submit` from the repository to a head that was started the way `clusters/` starts it."""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import rmdd

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SUBMIT = ["ray", "job", "submit", "--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
TINY = [
    "data={scenes: {train: 60, val: 12, test: 12, size: 16}, image_size: 16}",
    "model.image={name: convnet, weights: random, widths: [8, 8], groups: 4, projection: linear}",
    "experts={num: 2, epochs: 4, batch: 16}",
    "distill.phases=[{pairs: 6, start: 0, stop: 1, endpoint: 2, iterations: 200}]",
    "distill.budget=8",
    "distill.batch=3",
    "distill.steps=2",
    "evaluate={epochs: 2, students: 2, reference: false, selection_students: 1, baseline_draws: 2}",
    "evaluate.baseline_lrs=[0.1]",
    "evaluate.baseline_losses=[infonce]",
    "runtime.track=none",
]


class Head:
    """A head of its own ports and folder, and words for the command line that find it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rmdd-", dir="/tmp"))  # sockets lie in it: 107 bytes are the limit
        self.port = free_port()
        mine = {"--port": free_port(), "--dashboard-port": self.port, "--temp-dir": self.folder, "--num-cpus": 2}
        mine |= {"--ray-client-server-port": free_port(), "--dashboard-agent-listen-port": free_port()}
        mine |= {"--min-worker-port": 0, "--max-worker-port": 0, "--object-store-memory": 80 * 2**20}
        words = [w for w in head_words() if w.partition("=")[0] not in {*mine, "--autoscaling-config"}]
        base = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = base | {"PATH": path, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "OMP_NUM_THREADS": "1"}
        self.log = self.folder / "head.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, "--block", *(f"{name}={value}" for name, value in mine.items())],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{self.port}"

    def status_of(self, host: str, **headers: str) -> int:
        request = urllib.request.Request(f"http://{host}:{self.port}/api/version", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def comes_up(self) -> bool:
        """False when Ray gave up: it waits 30 seconds for its own processes, and a busy machine may need longer."""
        wait_for(lambda: self.process.poll() is not None or "will now block" in self.log.read_text(), 120)
        return self.process.poll() is None

    def do(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state_of(self, job: str) -> str:
        return self.client().get_job_status(job).value

    def client(self):
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.environment["RAY_API_SERVER_ADDRESS"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


def head_words() -> list[str]:
    commands = yaml.safe_load((ROOT / "clusters" / "onprem.yaml").read_text())["head_start_ray_commands"]
    words = shlex.split(commands[-1])
    return words[words.index("ray") :]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            head = Head()
            stack.callback(head.stop)
            if head.comes_up():
                break
        yield head


def job(storage: Path) -> list[str]:
    sets = [f"runtime.storage={storage}", *TINY]
    return ["python", "jobs/run.py", "--config", "demo", *(w for s in sets for w in ("--set", s))]


def results(storage: Path) -> dict[str, bytes]:
    """Everything that a run's value decides: stores, sets and scores, without clocks and places."""
    named = ("evaluation.json", "expert.json")
    found = [p for p in storage.rglob("*") if p.suffix == ".safetensors" or p.name in named]
    return {str(p.relative_to(storage)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def unbroken(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("unbroken")
    output = head.do(*SUBMIT, "--", *job(storage))
    assert "succeeded" in output and "PTM-ST" in output
    return storage


def test_the_demo_runs_to_the_end(unbroken: Path) -> None:
    (run,) = unbroken.glob("demo-*")
    assert len(rmdd.load(run / "set").as_dataset()) == 6
    assert (run / "report.html").is_file()
    events = (run / "events.jsonl").read_text()
    assert '"item": "phase 0"' in events, "the job's work went to the cluster's workers"


def test_a_stopped_job_saves_and_goes_on_when_submitted_again(head: Head, unbroken: Path, tmp_path: Path) -> None:
    head.do(*SUBMIT, "--no-wait", "--submission-id", "stopped", "--", *job(tmp_path))
    written = lambda: [len(p.read_text().splitlines()) for p in tmp_path.glob("phases/*/phase-0/metrics.jsonl")]  # noqa: E731
    wait_for(lambda: max(written(), default=0) >= 5)
    head.client().stop_job("stopped")
    wait_for(lambda: head.state_of("stopped") == "STOPPED")
    assert 5 <= max(written()) < 200 and not list(tmp_path.glob("*/evaluation.json"))
    log = head.client().get_job_logs("stopped")
    (again,) = [line for line in log.splitlines() if "submit it again: " in line]
    kept = max(written())
    head.do(*shlex.split(again.partition("submit it again: ")[2]))
    assert max(written()) == 200 and kept > 0
    assert results(tmp_path) == results(unbroken)


def test_what_is_shipped_is_what_runs(head: Head) -> None:
    code = (
        "import ray, rmdd; ray.init(); there = ray.remote(lambda: __import__('rmdd').__file__);"
        "print('HERE', rmdd.__file__); print('THERE', ray.get(there.remote()))"
    )
    lines = head.do(*SUBMIT, "--", "python", "-c", shlex.quote(code)).splitlines()
    places = [line.split()[1] for line in lines if line.startswith(("HERE", "THERE"))]
    assert len(places) == 2 and all(place.startswith(str(head.folder)) for place in places)


def test_the_dashboard_answers_on_loopback_and_to_the_token_alone(head: Head) -> None:
    assert head.status_of("127.0.0.1", **bearer()) == 200
    assert head.status_of("127.0.0.1") == 401
    with pytest.raises(OSError):
        head.status_of(outer_address(), **bearer())


def outer_address() -> str:
    from ray.util import get_node_ip_address

    return get_node_ip_address()
