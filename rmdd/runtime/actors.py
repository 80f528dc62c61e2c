"""Supervised actors: experts, phases and students side by side, each restarted where it left off.

One actor per slot takes items until none is left. An actor or node that dies is replaced and its item begun
again, which means from its last checkpoint, for tasks keep their own. A task's own error is not retried.
"""

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from rmdd import config
from rmdd.files import append_jsonl
from rmdd.jobs import Hooks, Interrupted, Task
from rmdd.runtime.cluster import Resources

POLL_SECONDS = 0.5
STOP_SECONDS = 120.0


class Worker:
    """Runs tasks in one thread while another answers `status` and `stop`."""

    def __init__(self, threads: int):
        self.threads = threads
        self.stopping = False
        self.latest: dict[str, Any] = {}

    def where(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def run(self, task: Task, item: Any) -> Any:
        import torch

        torch.set_num_threads(self.threads)
        try:
            return task(item, Hooks(self._report, lambda: self.stopping))
        finally:
            self.latest = {}

    def _report(self, metrics: dict[str, Any]) -> None:
        self.latest = metrics

    def status(self) -> dict[str, Any]:
        return self.latest

    def stop(self) -> None:
        self.stopping = True


@dataclass
class Slot:
    """An actor at work on one item."""

    actor: Any
    place: int
    result: Any
    status: Any
    where: Any
    """Answers once the actor is up; None when that has been logged."""


@dataclass
class SideBySide:
    """An executor that spreads items over actors. `events` gets a JSON line for every start, death and end."""

    runtime: config.Runtime
    resources: Resources
    events: Path
    attempts: dict[int, int] = field(default_factory=dict)
    idle: list[Any] = field(default_factory=list)

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """See `rmdd.jobs.Executor`. Raises the task's own error, or `RuntimeError` when its workers keep dying."""
        results: dict[int, Any] = {}
        waiting = deque(range(len(items)))
        self.attempts = dict.fromkeys(waiting, 0)
        slots: list[Slot] = []
        width = self.resources.workers(self.runtime, len(items)) if items else 0
        shared = ray.put(task)
        try:
            while waiting or slots:
                while waiting and len(slots) < width:
                    slots.append(self._start(shared, items, waiting.popleft()))
                starting = [s.where for s in slots if s.where is not None]
                ray.wait([s.result for s in slots] + starting, num_returns=1, timeout=POLL_SECONDS)
                ready, _ = ray.wait([s.result for s in slots], num_returns=len(slots), timeout=0)
                for slot in slots:
                    self._announce(slot, names, timeout=0.0)
                self._collect_reports(slots, names, on_report)
                for slot in [s for s in slots if s.result in ready]:
                    slots.remove(slot)
                    self._settle(slot, names, results, waiting)
                if not waiting:
                    self._dismiss()  # an actor without work would hold what one that is yet to start waits for
            return [results[i] for i in range(len(items))]
        except KeyboardInterrupt:
            self._stop(slots)
            raise Interrupted from None
        except BaseException:
            self._stop(slots)
            raise
        finally:
            self.idle += [slot.actor for slot in slots]
            self._dismiss()

    def _start(self, task: Any, items: Sequence[Any], place: int) -> Slot:
        actor = self.idle.pop() if self.idle else self._hire()
        self.attempts[place] += 1
        where = actor.where.remote()
        return Slot(actor, place, actor.run.remote(task, items[place]), actor.status.remote(), where)

    def _announce(self, slot: Slot, names: Sequence[str], timeout: float) -> None:
        """Log the start of a slot once its actor answers."""
        if slot.where is not None and ray.wait([slot.where], timeout=timeout)[0]:
            with contextlib.suppress(RayActorError, ActorUnavailableError):  # a death shows in the result
                self._log("started", names[slot.place], attempt=self.attempts[slot.place], **ray.get(slot.where))
            slot.where = None

    def _hire(self) -> Any:
        threads, gpus = self.runtime.threads, self.runtime.gpus_per_worker
        options = {
            "num_cpus": 0 if gpus else min(threads, self.resources.cpus),
            "num_gpus": gpus,
            "max_concurrency": 2,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        return ray.remote(Worker).options(**options).remote(threads)

    def _dismiss(self) -> None:
        for actor in self.idle:
            ray.kill(actor)
        self.idle = []

    def _collect_reports(
        self, slots: Sequence[Slot], names: Sequence[str], on_report: Callable[[str, dict], None]
    ) -> None:
        for slot in slots:
            ready, _ = ray.wait([slot.status], timeout=0)
            if not ready:
                continue
            try:
                latest = ray.get(slot.status, timeout=1)
            except (RayActorError, ActorUnavailableError, GetTimeoutError):
                continue
            if latest:
                on_report(names[slot.place], latest)
            slot.status = slot.actor.status.remote()

    def _settle(self, slot: Slot, names: Sequence[str], results: dict[int, Any], waiting: deque[int]) -> None:
        name = names[slot.place]
        self._announce(slot, names, timeout=5.0)
        try:
            results[slot.place] = ray.get(slot.result)
            self._log("finished", name)
            self.idle.append(slot.actor)
        except RayTaskError as error:
            self._log("failed", name, error=str(error.cause))
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except (RayActorError, ActorUnavailableError) as error:
            ray.kill(slot.actor)  # one that is only out of reach must not go on beside its successor
            self._log("died", name, error=" ".join(str(error).split())[:300])
            if self.attempts[slot.place] > self.runtime.max_restarts:
                raise RuntimeError(
                    f"the worker of {name} died {self.attempts[slot.place]} times "
                    f"(last: {' '.join(str(error).split())[:200]}); "
                    "its checkpoint is kept; look for lack of memory, then resume, or raise runtime.max_restarts"
                ) from error
            waiting.appendleft(slot.place)

    def _stop(self, slots: Sequence[Slot]) -> None:
        """Ask everyone to stop at the next step and wait for their checkpoints."""
        working = [s for s in slots if s.where is None or ray.wait([s.where], timeout=0)[0]]
        for slot in working:
            slot.actor.stop.remote()
        deadline = time.monotonic() + STOP_SECONDS
        for slot in working:
            ray.wait([slot.result], timeout=max(0.0, deadline - time.monotonic()))

    def _log(self, event: str, name: str, **facts: Any) -> None:
        append_jsonl(self.events, {"time": round(time.time(), 3), "event": event, "item": name, **facts})
