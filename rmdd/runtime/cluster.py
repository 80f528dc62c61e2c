"""Joining or starting a Ray cluster, and what it has to offer."""

import contextlib
import os
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


@dataclass(frozen=True)
class Resources:
    cpus: float
    gpus: float
    nodes: int

    def workers(self, runtime: config.Runtime, items: int) -> int:
        """How many workers fit side by side: one per `threads` CPUs, or per share of a GPU (no share spans two)."""
        share = runtime.gpus_per_worker
        if share >= 1:
            fit = int(self.gpus / share)
        elif share > 0:
            fit = int(self.gpus) * int(1 / share + 1e-9)
        else:
            fit = int(self.cpus / runtime.threads)
        return max(1, min(fit, items, runtime.workers or items))


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
    if ours and address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    elif ours:
        ray.init(
            address="local",
            num_cpus=runtime.num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=runtime.object_store_mb * 2**20,
        )
    try:
        have = ray.cluster_resources()
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        found = Resources(have.get("CPU", 0.0), have.get("GPU", 0.0), nodes)
        if runtime.gpus_per_worker > found.gpus:
            raise ValueError(
                f"runtime.gpus_per_worker asks for {runtime.gpus_per_worker} GPU(s) but the cluster has "
                f"{found.gpus:g}; set it to 0 for CPUs, or add GPU nodes"
            )
        yield found
    finally:
        if ours:
            ray.shutdown()
