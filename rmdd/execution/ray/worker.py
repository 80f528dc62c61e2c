"""The actor that does the work: one task at a time, while another thread answers how it goes."""

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
    """This node does not see the folder that all of them should."""


def folder_to_check(runtime: config.Runtime, events: Path) -> Path | None:
    """A folder that every node should see: that of the run, made if it is not there; None where it is at a URI."""
    if "://" in runtime.storage:
        return None
    events.parent.mkdir(parents=True, exist_ok=True)
    return events.parent.absolute()


def require_visible(folder: Path | None) -> None:
    """Raise `StorageNotVisible` on a node that joined after the start, was not asked, and does not see `folder`."""
    if folder is not None and not folder.is_dir():
        here = this_process()
        raise StorageNotVisible(
            f"node {here['node'][:8]} ({here['host']}) does not see {folder}; mount one shared folder at "
            "runtime.storage on every node"
        )


def this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "node": ray.get_runtime_context().get_node_id(),
    }


class Worker:
    """Runs tasks in one thread while another answers `status` and `stop`. SIGTERM is a `stop` too."""

    def __init__(self, threads: int, folder: Path | None = None):
        self.threads, self.folder = threads, folder
        self.stopping = False
        self.beats = 0
        self.latest: dict[str, Any] = {}
        self.metrics = Metrics()
        with contextlib.suppress(ValueError):  # Ray makes actors in the main thread, which alone may do this
            signal.signal(signal.SIGTERM, lambda number, frame: self.stop())

    def where(self) -> dict[str, Any]:
        """The process and the node it is on."""
        return this_process()

    def run(self, task: Task, item: Any, name: str) -> tuple[Any, bool]:
        """The result, and whether the task had been asked to stop. Raises `StorageNotVisible`."""
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
        """A count of signs of life, and the latest report."""
        return self.beats, self.latest

    def stop(self) -> None:
        self.stopping = True


class Metrics:
    """What an item reports, for the dashboard: gauges `rmdd_<key>` by item, with its pace and the memory it takes."""

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
