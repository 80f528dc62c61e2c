"""Train experts in one run of Ray Train, whose workers take experts from a shared queue until it is empty.

Workers start once, not for each expert, and Ray Train may change their number during the run (elastic training). An
expert resumes from the epochs that it saved to its store, not from checkpoints of Ray Train. If a worker dies, all
workers are restarted, and each unfinished expert resumes from its last epoch. The death counts against
`runtime.max_restarts` only for the expert of the dead worker.
"""

import contextlib
import functools
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from rmdd import config
from rmdd.core.files import append_jsonl
from rmdd.core.threads import thread_variables
from rmdd.execution.executor import Mapper
from rmdd.execution.ray.actors import POLL_SECONDS, STOP_SECONDS
from rmdd.execution.ray.cluster import Resources
from rmdd.execution.ray.nodes import alive, this_node
from rmdd.execution.ray.worker import StorageNotVisible, folder_to_check, require_visible, this_process
from rmdd.execution.tasks import Failed, GroupMember, Hooks, Interrupted, Task

DIED = WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
"""Classes of errors by which Ray Train reports a dead worker, in contrast to an error raised by a task."""

PATIENCE_SECONDS = 120.0
"""Seconds without a running worker after which a message says which workers Ray Train is waiting for."""


class WorkQueue:
    """The shared queue of items and their results, in a Ray actor that survives the death of workers.

    A *group* is `size` workers with consecutive ranks that work on an item together. A *generation* is all the workers
    that Ray Train started at the same time; after a death, Ray Train starts a new generation. The *turn* of an item is
    the number of items that its group drew from the queue before.
    """

    def __init__(self, names: Sequence[str], size: int, tries: int):
        self.names, self.size, self.tries = names, size, tries
        self.waiting = deque(range(len(names)))
        self.running: dict[int, int] = {}
        self.turns: dict[int, list[int | None]] = {}
        self.addresses: dict[int, str] = {}
        self.reasons: dict[int, Failed] = {}
        self.where: dict[int, dict[str, Any]] = {}
        self.generation = ""
        self.attempts, self.faults = [0] * len(names), [0] * len(names)
        self.results: dict[int, Any] = {}
        self.refusal: str | None = None
        self.up = False
        self.events: list[dict[str, Any]] = []
        self.reports: dict[str, dict[str, Any]] = {}
        self.stopping = False

    # -- called by workers ---------------------------------------------------------------------------------------

    def register(self, generation: str, rank: int, where: dict[str, Any]) -> bool:
        """Record that a worker has started and on which node; return whether the worker should stop.

        The first worker of a generation puts the unfinished items of the previous generation back into the queue.
        """
        if generation != self.generation:
            self.generation = generation
            self.waiting.extendleft(sorted(self.running.values(), reverse=True))
            for entries in (self.running, self.turns, self.addresses, self.reasons, self.where):
                entries.clear()
        self.where[rank], self.up = where, True
        return self.stopping

    def refuse(self, reason: str) -> None:
        """Stop all workers, because one of them runs on a node that does not see the storage folder."""
        self.refusal, self.stopping = reason, True

    def take(self, generation: str, group: int, turn: int, leads: bool = True) -> list[int | None]:
        """Return `[index]` of a group's next item, `[None]` if no item is left, or `[]` if the caller must ask again.

        The leader (first member of the group) draws the item from the queue, after it has settled the previous item.
        Until then the other members get `[]`.
        """
        if generation != self.generation:
            return [None]
        turns = self.turns.setdefault(group, [])
        if leads and turn == len(turns):
            index = None if self.stopping or not self.waiting else self.waiting.popleft()
            turns.append(index)
            if index is not None:
                self.running[group] = index
                self.attempts[index] += 1
                self._log("started", index, group, attempt=self.attempts[index])
        return turns[turn : turn + 1]

    def meet(self, group: int, address: str | None) -> str | None:
        """Return the network address of a group's first member, or None if that member has not called `meet` yet."""
        if address:
            self.addresses[group] = address
        return self.addresses.get(group)

    def beat(self, group: int, report: dict[str, Any] | None) -> bool:
        """Store a progress report of a group's item; return whether the workers of the group should stop."""
        if report and group in self.running:
            self.reports[self.names[self.running[group]]] = report
        return self.stopping

    def settle(self, generation: str, group: int, turn: int, result: Any) -> None:
        """Store the result of a group's item; ignore repeated calls and calls by earlier generations of workers."""
        if generation != self.generation or group not in self.running or turn != len(self.turns[group]) - 1:
            return
        index = self.running.pop(group)
        if isinstance(result, Failed):
            self._fault("failed", index, group, result)
        else:
            self.results[index] = result
            self._log("finished" if result is not False else "stopped", index, group)

    def explain(self, group: int, reason: Failed) -> None:
        """Store the reason why a worker is about to raise an error that stops its group."""
        if group not in self.reasons or not reason.again:
            self.reasons[group] = reason

    # -- called by Train's controller and by the driver ----------------------------------------------------------

    def lost(self, deaths: dict[int, str | None], away: Set[int] = frozenset()) -> None:
        """Queue the items of ended workers again. `deaths[rank]` is the cause of death, None for a failed task.

        The deaths of the ranks in `away`, whose node was lost, do not count against the `tries` of an item.
        """
        self.up = False
        for group in sorted({rank // self.size for rank in deaths}):
            if group not in self.running:
                continue
            index = self.running.pop(group)
            ranks = [r for r in deaths if r // self.size == group]
            died = next((deaths[r] for r in ranks if deaths[r]), None)
            host = self.where.get(ranks[0], {}).get("host", "?")
            explained = self.reasons.get(group, Failed("the worker ended without an error message", host, True))
            if died and not away.isdisjoint(ranks):
                self._log("lost", index, group, attempt=self.attempts[index], error=died)
                self.waiting.appendleft(index)
            elif died:
                self._fault("died", index, group, Failed(f"its worker died ({died})", host, True))
            else:
                self._fault("failed", index, group, explained)

    def nodes(self) -> dict[int, str]:
        """Return the id of the node on which each worker runs, by rank."""
        return {rank: where["node"] for rank, where in self.where.items()}

    def news(self) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], bool]:
        """Return the events and progress reports since the last call, and whether any worker is running."""
        news = self.events, self.reports, self.up
        self.events, self.reports = [], {}
        return news

    def stop(self) -> None:
        self.stopping = True

    def outcome(self) -> tuple[dict[int, Any], str | None]:
        """Return the results by item index, and the reason passed to `refuse` (None if `refuse` was not called)."""
        return self.results, self.refusal

    def _fault(self, event: str, index: int, group: int, reason: Failed) -> None:
        self.faults[index] += 1
        self._log(event, index, group, attempt=self.attempts[index], error=reason.reason)
        if reason.again and self.faults[index] <= self.tries:
            self.waiting.append(index)
        else:
            times = f", {self.faults[index]} times" if self.faults[index] > 1 else ""
            self.results[index] = replace(reason, reason=reason.reason + times, again=False)

    def _log(self, event: str, index: int, group: int, **facts: Any) -> None:
        members = range(group * self.size, (group + 1) * self.size)
        where = next((self.where[rank] for rank in members if rank in self.where), {})
        self.events.append({"time": round(time.time(), 3), "event": event, "item": self.names[index], **facts, **where})


class Heartbeat:
    """Sends a worker's latest progress report to the work queue twice a second; the reply says whether to stop."""

    def __init__(self, queue: Any, group: int):
        self.queue, self.group = queue, group
        self.latest: dict[str, Any] | None = None
        self.stop = threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self._send, daemon=True).start()

    def report(self, metrics: dict[str, Any]) -> None:
        self.latest = metrics

    def flush(self) -> None:
        with self.lock:
            latest, self.latest = self.latest, None
            if ray.get(self.queue.beat.remote(self.group, latest)):
                self.stop.set()

    def _send(self) -> None:
        try:
            while not self.stop.wait(POLL_SECONDS):
                self.flush()
        except RayActorError:
            self.stop.set()  # the run has ended and its work queue was removed


def work(queue: Any, task: Task, items: Sequence[Any], size: int, threads: int, folder: Path | None) -> None:
    """On each worker, run items from the queue until it is empty; the workers of an incomplete group do nothing.

    Raises `StorageNotVisible` on a node that does not see `folder`.
    """
    import torch

    torch.set_num_threads(threads)
    context = ray.train.get_context()
    rank, group = context.get_world_rank(), context.get_world_rank() // size
    generation = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"  # generations use different ports
    where = this_process()
    if ray.get(queue.register.remote(generation, rank, where)) or (group + 1) * size > context.get_world_size():
        return
    try:
        require_visible(folder)
    except StorageNotVisible as error:
        ray.get(queue.refuse.remote(str(error)))
        raise  # the error stops the other workers, which may wait for this one
    member = GroupMember(rank % size, size, ray.util.get_node_ip_address(), functools.partial(_meet, queue, group))
    heartbeat = Heartbeat(queue, group)
    hooks = Hooks(heartbeat.report, heartbeat.stop.is_set, member if size > 1 else None)
    for turn in itertools.count():
        while not (drawn := ray.get(queue.take.remote(generation, group, turn, member.rank == 0))):
            time.sleep(0.05)
        (index,) = drawn
        if index is None:
            return
        result = task(items[index], hooks)
        if isinstance(result, Failed) and size > 1:
            ray.get(queue.explain.remote(group, result))
            raise RuntimeError(result.reason)  # the error stops the other workers, which may wait for this one
        if member.rank == 0:
            heartbeat.flush()
            ray.get(queue.settle.remote(generation, group, turn, result))


def _meet(queue: Any, group: int, address: str | None) -> str:
    while not (leader := ray.get(queue.meet.remote(group, address))):
        time.sleep(0.05)
    return leader


class WorkerDeaths(UserCallback):
    """Callback of Ray Train that reports dead workers to the work queue."""

    def __init__(self, queue: Any):
        self.queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        nodes, alive_nodes = ray.get(self.queue.nodes.remote()), alive()
        deaths: dict[int, str | None] = {}
        away = set()
        for rank, error in worker_exceptions.items():
            died = isinstance(error, DIED)
            failure = getattr(error, "health_check_failure", error)
            deaths[rank] = " ".join(str(failure).split())[:200] if died else None
            if nodes.get(rank) not in alive_nodes or isinstance(failure, ActorUnavailableError):
                away.add(rank)
        ray.get(self.queue.lost.remote(deaths, away))


@dataclass
class ExpertPool(Mapper):
    """Trains experts in one run of Ray Train. A failed expert is trained again, and the others continue.

    `size` workers train each expert together. `name` is the name of Ray Train's run, which writes to a folder of that
    name under `storage`; each store of experts needs a different name. The file `events` gets a JSON line for every
    start, death, failure and end of an expert.
    """

    runtime: config.Runtime
    resources: Resources
    events: Path
    name: str
    storage: Path | str
    size: int = 1
    say: Callable[[str], None] = lambda text: None

    def map(
        self, task: Task, items: Sequence[Any], names: Sequence[str], on_report: Callable[[str, dict[str, Any]], None]
    ) -> list[Any]:
        """See `rmdd.execution.executor.Mapper.map`. The result of an item that failed too often is a `Failed`.

        Raises `ValueError` if fewer than `size` workers fit on the cluster, and `RuntimeError` if Ray Train gives up or
        if a node that joined later does not see the storage folder.
        """
        if not items:
            return []
        scaling = self._scaling(len(items))
        options = {"num_cpus": 0, "scheduling_strategy": this_node()}
        queue = ray.remote(WorkQueue).options(**options).remote(list(names), self.size, self.runtime.max_restarts)
        problems: list[Exception] = []
        thread = threading.Thread(target=self._fit, args=(queue, task, list(items), scaling, problems), daemon=True)
        thread.start()
        up_at = time.monotonic()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                if self._forward(queue, on_report):
                    up_at = time.monotonic()
                elif time.monotonic() - up_at > PATIENCE_SECONDS:
                    up_at = time.monotonic()
                    self.say(f"experts: no worker is running; Ray Train waits for room for {_least(scaling)}")
        except BaseException as error:
            with contextlib.suppress(RayActorError):
                ray.get(queue.stop.remote())
                thread.join(STOP_SECONDS)
                self._forward(queue, lambda name, metrics: None)
            raise (Interrupted() if isinstance(error, KeyboardInterrupt) else error) from None
        results, refusal = ray.get(queue.outcome.remote())
        ray.kill(queue)
        if refusal:
            raise RuntimeError(f"{refusal}; finished epochs are kept")
        if problems and len(results) < len(items):
            raise RuntimeError(
                f"the run of Ray Train failed ({' '.join(str(problems[0]).split())[:300]}); finished epochs are kept"
            ) from problems[0]
        return [results.get(i, False) for i in range(len(items))]

    def _fit(self, queue: Any, task: Task, items: list[Any], scaling: ScalingConfig, problems: list[Exception]) -> None:
        from ray.train.torch import TorchConfig, TorchTrainer

        threads = self.runtime.threads
        deaths = (self.runtime.max_restarts + 1) * (len(items) + 1)
        folder = folder_to_check(self.runtime, self.events)
        try:
            TorchTrainer(
                functools.partial(work, queue, task, items, self.size, threads, folder),
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=scaling,
                run_config=RunConfig(
                    name=self.name,
                    storage_path=str(self.storage),
                    failure_config=FailureConfig(max_failures=deaths),
                    callbacks=[WorkerDeaths(queue)],
                    worker_runtime_env=thread_variables(threads),
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            ).fit()
        except Exception as error:
            problems.append(error)

    def _scaling(self, items: int) -> ScalingConfig:
        runtime, size = self.runtime, self.size
        room = self.resources.workers(runtime.model_copy(update={"workers": None}), items * size)
        most = max(1, min(runtime.workers or room, items * size) // size) * size
        least = min(most, max(size, runtime.min_workers))
        cpus, gpus = runtime.share
        if room < least:
            field = "experts.worker_group.workers" if least == size else "runtime.min_workers"
            raise ValueError(
                f"{field} needs {least} workers at the same time, but the cluster has room for {room} with {gpus:g} "
                f"GPU(s) and {cpus:g} CPU(s) each; lower {field} or the CPUs and GPUs per worker, or add nodes"
            )
        return ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=gpus > 0,
            resources_per_worker={
                "CPU": min(cpus, self.resources.widest),
                **({"GPU": gpus} if gpus else {}),
            },
        )

    def _forward(self, queue: Any, on_report: Callable[[str, dict[str, Any]], None]) -> bool:
        """Log the queue's new events, and pass its new reports to `on_report`; return whether any worker is running."""
        events, reports, up = ray.get(queue.news.remote())
        for event in events:
            append_jsonl(self.events, event)
            if event["event"] == "started":
                on_report(event["item"], {})
        for name, metrics in reports.items():
            on_report(name, metrics)
        return up


def _least(scaling: ScalingConfig) -> str:
    least = scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[0]
    return f"{least} worker(s) with {scaling.resources_per_worker} each"
