"""Joining or starting a Ray cluster, and what it has to offer."""

import contextlib
import math
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from rmdd import config

# Set before ray is imported: workers at normal priority, no telemetry, no upload of the working folder, quiet Data.
ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "300",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}

START_ATTEMPTS = 4


@dataclass(frozen=True)
class Resources:
    cpus: float
    gpus: float
    nodes: int
    widest: float = math.inf
    """CPUs of the node that has most."""

    def workers(self, runtime: config.Runtime, items: int) -> int:
        """How many workers fit side by side: as many as have their share of CPUs and of a GPU (no share spans two)."""
        cpus, share = runtime.share
        fit = [items, runtime.workers or items]
        if cpus > 0:
            fit.append(int(self.cpus / cpus + 1e-9))
        if share >= 1:
            fit.append(int(self.gpus / share))
        elif share > 0:
            fit.append(int(self.gpus) * int(1 / share + 1e-9))
        return max(1, min(fit))


def resources_now() -> Resources:
    """What the cluster has now; nodes come and go."""
    import ray

    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [resources.get("CPU", 0.0) for resources in have]
    return Resources(sum(cpus), sum(resources.get("GPU", 0.0) for resources in have), len(have), max(cpus, default=0.0))


@contextlib.contextmanager
def connected(runtime: config.Runtime) -> Iterator[Resources]:
    """Join the cluster that `runtime.address` or RAY_ADDRESS names, or start a local one and stop it at the end.

    A cluster that this process had already joined is used and left alone. Raises `ValueError` when the cluster
    has fewer GPUs than one worker asks for.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = runtime.address or os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex)
    import ray

    ours = not ray.is_initialized()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if ours and address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    elif ours:
        _start(runtime)
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in place
    try:
        found = resources_now()
        if runtime.gpus_per_worker > found.gpus:
            raise ValueError(
                f"runtime.gpus_per_worker asks for {runtime.gpus_per_worker} GPU(s) but the cluster has "
                f"{found.gpus:g}; set it to 0 for CPUs, or add GPU nodes"
            )
        yield found
    finally:
        if ours:
            ray.shutdown()


def _start(runtime: config.Runtime) -> None:
    """Start a local cluster, and again if it does not come up in Ray's half minute, as on a very busy machine."""
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=runtime.num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=256 * 2**20,
            )
            return
        except Exception as error:  # Ray has no class of its own for it
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1 or "timed out" not in str(error):
                raise RuntimeError(f"a local Ray could not be started: {error}") from error
