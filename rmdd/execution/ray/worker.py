"""The Ray actor that runs tasks, one at a time, while another thread reports its status."""

import contextlib
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from rmdd import config
from rmdd.execution.tasks import Hooks, Task


class StorageNotVisible(RuntimeError):
    """A node of the cluster does not see the folder `runtime.storage`, which all nodes must share."""


def folder_to_check(runtime: config.Runtime, events: Path) -> Path | None:
    """Create and return the folder of `events`, a folder that every node must see; None if the storage is a URI."""
    if "://" in runtime.storage:
        return None
    events.parent.mkdir(parents=True, exist_ok=True)
    return events.parent.absolute()


def require_visible(folder: Path | None) -> None:
    """Raise `StorageNotVisible` if this node does not see `folder`; the node may have joined after the first check."""
    if folder is not None and not folder.is_dir():
        process = this_process()
        raise StorageNotVisible(
            f"node {process['node'][:8]} ({process['host']}) does not see {folder}; mount one shared folder at "
            "runtime.storage on every node"
        )


def this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "node": ray.get_runtime_context().get_node_id(),
    }


class Worker:
    """Runs tasks in one thread while another thread answers `status` and `stop`. SIGTERM acts like a call of `stop`."""

    def __init__(self, threads: int, folder: Path | None = None):
        self.threads, self.folder = threads, folder
        self.stopping = False
        self.beats = 0
        self.latest: dict[str, Any] = {}
        self.metrics = Metrics()
        with contextlib.suppress(ValueError):  # raised if this is not the main thread, in which Ray creates actors
            signal.signal(signal.SIGTERM, lambda number, frame: self.stop())

    def where(self) -> dict[str, Any]:
        """Return the process id, the host and the node of this worker."""
        return this_process()

    def run(self, task: Task, item: Any, name: str) -> tuple[Any, bool]:
        """Run `task` on `item`; return its result and whether `stop` was called. May raise `StorageNotVisible`."""
        require_visible(self.folder)
        import torch

        torch.set_num_threads(self.threads)

        def report(metrics: dict[str, Any]) -> None:
            self.beats += 1
            self.latest = metrics
            self.metrics.show(name, metrics)

        def should_stop() -> bool:
            self.beats += 1
            return self.stopping

        self.metrics = Metrics()
        try:
            return task(item, Hooks(report, should_stop)), self.stopping
        finally:
            self.latest = {}

    def status(self) -> tuple[int, dict[str, Any]]:
        """Return the number of heartbeats so far, and the latest progress report of the running task."""
        return self.beats, self.latest

    def stop(self) -> None:
        self.stopping = True


class Metrics:
    """Shows progress reports in Ray's dashboard: each number of a report is a gauge `rmdd_<key>`, labelled by item."""

    gauges: dict[str, Gauge] = {}

    def __init__(self) -> None:
        self.before: tuple[float, float] | None = None

    def show(self, item: str, metrics: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
        now, done = time.monotonic(), values.get("done", 0.0)
        if self.before is not None and now > self.before[0]:
            values["done_per_second"] = (done - self.before[1]) / (now - self.before[0])
        self.before = now, done
        values["peak_memory_bytes"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            values["peak_gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        for key, value in values.items():
            self._gauge(key).set(value, {"item": item})

    def _gauge(self, key: str) -> Gauge:
        if key not in self.gauges:
            name = re.sub(r"\W", "_", key.replace("/s", "_per_second"))
            self.gauges[key] = Gauge(f"rmdd_{name}", f"{key} of an expert, a phase or a student", tag_keys=("item",))
        return self.gauges[key]
