"""Start a Ray head node on this machine with the commands of `clusters/`; other Ray processes are not affected."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from cluster_files import CLUSTERS, ROOT


class Head:
    """A Ray head node with separate ports and a separate folder; `environment` points the command line to it."""

    def __init__(self, autoscaling: str | None = None, **flags: object):
        """Start a head node. `autoscaling` is the text of an autoscaler file; `{gcs}` stands for the node's address."""
        self.folder = Path(tempfile.mkdtemp(prefix="rmdd-", dir="/tmp"))  # socket paths are limited to 107 bytes
        self.log, self.gcs, self.dashboard = self.folder / "head.log", free_port(), free_port()
        mine = {"port": self.gcs, "dashboard-port": self.dashboard, "temp-dir": self.folder, "num-cpus": 2}
        mine |= {"ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port()}
        mine |= {"min-worker-port": 0, "max-worker-port": 0, "object-store-memory": 80 * 2**20, **flags}
        if autoscaling:
            mine["autoscaling-config"] = self.folder / "autoscaling.yaml"
            (self.folder / "autoscaling.yaml").write_text(autoscaling.format(gcs=f"{outer_address()}:{self.gcs}"))
        mine = {f"--{name}": value for name, value in mine.items()}
        words = [w for w in start_words() if w.partition("=")[0] not in {*mine, "--autoscaling-config"}]
        base = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        base |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{base['PATH']}", "OMP_NUM_THREADS": "1"}
        base |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        if autoscaling:
            base |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, "--block", *(f"{name}={value}" for name, value in mine.items())],
                env=base,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.environment = base | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}"}

    def comes_up(self) -> bool:
        """Return whether the head node started; Ray gives up after 30 seconds, too few on a busy machine."""
        wait_for(lambda: self.process.poll() is not None or "will now block" in self.log.read_text())
        return self.process.poll() is None

    def answers(self, host: str, **headers: str) -> int:
        """Return the HTTP status of the dashboard at `host`. Raises `OSError` if nothing listens there."""
        request = urllib.request.Request(f"http://{host}:{self.dashboard}/api/version", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def do(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            words, env=self.environment | environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def client(self):
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.environment["RAY_API_SERVER_ADDRESS"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._end_nodes()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_nodes(self) -> None:
        """End the autoscaler's nodes; they are no child processes of the head node and would run for a minute more."""
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in file.read_bytes():
                    os.kill(int(file.parent.name), signal.SIGKILL)


@contextlib.contextmanager
def started(autoscaling: str | None = None, **flags: object) -> Iterator[Head]:
    """Start a Ray head node, in up to three attempts."""
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            head = Head(autoscaling, **flags)
            stack.callback(head.stop)
            if head.comes_up():
                break
        else:
            raise AssertionError(f"no Ray head node started:\n{head.log.read_text()}")
        yield head


def patiently(begin: Callable):
    """Call `begin`, which starts Ray nodes, up to six times: on a busy machine, a start may exceed Ray's 30 seconds."""
    for _ in range(5):
        with contextlib.suppress(Exception):
            return begin()
    return begin()


def start_words() -> list[str]:
    commands = yaml.safe_load((CLUSTERS / "onprem.yaml").read_text())["head_start_ray_commands"]
    words = shlex.split(commands[-1])
    return words[words.index("ray") :]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def outer_address() -> str:
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not occur in time"
        time.sleep(0.05)
