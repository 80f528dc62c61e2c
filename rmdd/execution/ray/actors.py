"""Run items (experts, phases, students) in parallel on Ray actors, and resume an item after the death of its worker.

Each actor runs one item at a time until no item is left. If an actor or its node dies, or an actor reports no progress
for too long, the item of that actor starts again on a new actor and resumes from the item's last checkpoint. An item
whose task raises an error is not run again.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.util.metrics import Counter

from rmdd import config
from rmdd.core.files import append_jsonl
from rmdd.core.threads import thread_variables
from rmdd.execution.executor import Executor, Piece, PieceSource, RetriesExhausted
from rmdd.execution.ray.cluster import Resources, resources_now
from rmdd.execution.ray.nodes import alive, draining
from rmdd.execution.ray.worker import StorageNotVisible, Worker, folder_to_check
from rmdd.execution.tasks import Interrupted, Task

POLL_SECONDS = 0.5
"""Longest time between two checks of the workers, in seconds."""
NODES_SECONDS = 3.0
"""Seconds between two checks of which nodes the cluster has and which are about to leave."""
STOP_SECONDS = 90.0
"""Seconds for saving checkpoints after a stop signal; cluster managers kill this process after 120 seconds."""
BACK_OFF = 0.5, 60.0
"""Seconds before an item whose worker died runs again: first delay, which doubles at each death, and longest delay."""


@dataclass(eq=False)
class Attempts:
    """A piece of work, the number of times it was started, and the number of times its worker died."""

    piece: Piece
    starts: int = 0
    deaths: int = 0
    """Number of times that a worker died or hung although its node was alive. `runtime.max_restarts` limits it."""
    ready_at: float = 0.0
    """Earliest time of the next start, in seconds of `time.monotonic`."""


@dataclass(eq=False)
class WorkerActor:
    """A Ray actor that runs items. `process` holds its process id, host and node once the actor has answered."""

    actor: Any
    process: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        at = self.process
        return f"node {at['node'][:8]} ({at['host']}), pid {at['pid']}" if at else "?"


@dataclass(eq=False)
class RunningItem:
    """An item that is running on an actor."""

    worker: WorkerActor
    attempts: Attempts
    result: Any
    status: Any
    where: Any
    """Ray reference to the actor's pid, host and node, ready when the actor runs; None once the start was logged."""
    beats: int = -1
    last_beat: float = field(default_factory=time.monotonic)
    """Time of the item's start or last heartbeat, in seconds of `time.monotonic`."""

    @property
    def name(self) -> str:
        return self.attempts.piece.name


@dataclass
class ActorExecutor(Executor):
    """An executor that spreads items over Ray actors. `events` gets a JSON line per start, death and end of an item.

    The actors are stopped when the `with` block of the executor ends or, without a block, when a call ends.
    """

    runtime: config.Runtime
    resources: Resources
    events: Path
    say: Callable[[str], None] = lambda text: None
    running: list[RunningItem] = field(default_factory=list)
    waiting: list[Attempts] = field(default_factory=list)
    idle: list[WorkerActor] = field(default_factory=list)
    without_storage: set[str] = field(default_factory=set)
    """Ids of the nodes that do not see the storage folder; no more actors are started on them."""
    _entered: bool = False
    _nodes_checked: float = 0.0
    _tasks: dict[Task, Any] = field(default_factory=dict)

    def __enter__(self) -> "ActorExecutor":
        self._entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self._entered = False
        self.rest()

    def rest(self) -> None:
        """Stop the idle actors, to free their CPUs and GPUs for other work."""
        self._kill(self.idle)

    def serve(self, source: PieceSource) -> None:
        """See `Executor.serve`. A piece whose workers die too often is settled with the error `RetriesExhausted`."""
        more = True
        self._nodes_checked = time.monotonic()
        try:
            while more or self.waiting or self.running:
                if more:
                    new = source(0.0 if self.running or self.waiting else POLL_SECONDS)
                    more = new is not None
                    self.waiting += [Attempts(piece) for piece in new or ()]
                self._fill()
                self._wait()
                self._check_running()
                if any(item.where is not None for item in self.running) and not self._next():
                    self.rest()  # idle actors may hold CPUs that a new actor waits for
        except KeyboardInterrupt:
            self._stop()
            raise Interrupted from None
        except BaseException:
            self._stop()
            raise
        finally:
            self._kill([item.worker for item in self.running])
            self.running, self.waiting = [], []
            if not self._entered:
                self.rest()

    # -- starting items ------------------------------------------------------------------------------------------

    def _next(self) -> list[Attempts]:
        """Return the items to start now: they fit on the cluster, and any delay after a worker's death is over."""
        room = self.resources.workers(self.runtime, len(self.running) + len(self.waiting)) - len(self.running)
        ready = [attempts for attempts in self.waiting if attempts.ready_at <= time.monotonic()]
        return ready[: max(0, room)]

    def _fill(self) -> None:
        for attempts in self._next():
            self.waiting.remove(attempts)
            self.running.append(self._start(attempts))

    def _start(self, attempts: Attempts) -> RunningItem:
        worker = self.idle.pop() if self.idle else WorkerActor(self._start_actor())
        attempts.starts += 1
        piece, actor = attempts.piece, worker.actor
        if piece.task not in self._tasks:
            self._tasks[piece.task] = ray.put(piece.task)
        where = actor.where.remote()
        result = actor.run.remote(self._tasks[piece.task], piece.item, piece.name)
        return RunningItem(worker, attempts, result, actor.status.remote(), where)

    def _start_actor(self) -> Any:
        threads = self.runtime.threads
        cpus, gpus = self.runtime.share
        options = {
            "num_cpus": min(cpus, self.resources.widest),
            "num_gpus": gpus,
            "max_concurrency": 2,
            "scheduling_strategy": "SPREAD",
            "runtime_env": thread_variables(threads),
        }
        if self.without_storage:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self.without_storage))})"}
        return ray.remote(Worker).options(**options).remote(threads, folder_to_check(self.runtime, self.events))

    def _log_start(self, item: RunningItem, timeout: float = 0.0) -> None:
        """Write the start of an item to the event log, once the actor that runs the item has answered."""
        if item.where is None or not ray.wait([item.where], timeout=timeout)[0]:
            return
        with contextlib.suppress(RayError):  # if the actor died, `_settle` handles it
            item.worker.process = ray.get(item.where)
            item.last_beat = time.monotonic()
            self._log("started", item, attempt=item.attempts.starts)
            item.attempts.piece.on_report({})
            if item.attempts.starts > 1:
                self.say(f"{item.name}: continues on {item.worker.where}, start {item.attempts.starts}")
        item.where = None

    # -- supervising running items -------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait until a running item starts or ends, for at most `POLL_SECONDS`."""
        news = [s.result for s in self.running] + [s.where for s in self.running if s.where is not None]
        if news:
            ray.wait(news, num_returns=1, timeout=POLL_SECONDS)
        elif self.waiting:
            time.sleep(POLL_SECONDS / 5)

    def _check_running(self) -> None:
        results = [item.result for item in self.running]
        ended = set(ray.wait(results, num_returns=len(results), timeout=0)[0]) if results else set()
        for item in list(self.running):
            self._log_start(item)
            self._report(item)
            if item.result in ended:
                self._settle(item)
            elif self._hangs(item):
                minutes = self.runtime.stall_limit
                self._end_unfinished(
                    item, "hung", f"no progress for {minutes:g} minutes (runtime.stall_limit)", counts=True
                )
        if time.monotonic() - self._nodes_checked >= NODES_SECONDS:
            self._nodes_checked = time.monotonic()
            self.resources = resources_now(self.resources.grows, without=self.without_storage)
            self._stop_on(draining())

    def _report(self, item: RunningItem) -> None:
        if not ray.wait([item.status], timeout=0)[0]:
            return
        with contextlib.suppress(RayError, GetTimeoutError):
            beats, latest = ray.get(item.status, timeout=1)
            if beats != item.beats:
                item.beats, item.last_beat = beats, time.monotonic()
            if latest:
                process = item.worker.process if self.resources.nodes > 1 else {}
                item.attempts.piece.on_report(
                    {**latest, **({"on": f"{process['host']}/{process['node'][:6]}"} if process else {})}
                )
            item.status = item.worker.actor.status.remote()

    def _hangs(self, item: RunningItem) -> bool:
        limit = self.runtime.stall_limit
        return limit is not None and bool(item.worker.process) and time.monotonic() - item.last_beat > 60 * limit

    def _stop_on(self, nodes: set[str]) -> None:
        """Stop the actors on `nodes`, which are about to leave. Tasks save checkpoints and resume on other nodes."""
        self._kill([worker for worker in self.idle if worker.process.get("node") in nodes])
        for item in self.running:
            if item.worker.process.get("node") in nodes:
                item.worker.actor.stop.remote()

    def _settle(self, item: RunningItem) -> None:
        self._log_start(item, timeout=5.0)
        settle = item.attempts.piece.settle
        try:
            result, stopped = ray.get(item.result)
        except RayTaskError as error:
            if isinstance(error.cause, StorageNotVisible) and item.worker.process:
                self.without_storage.add(item.worker.process["node"])
                self._end_unfinished(item, "lost", str(error.cause), counts=False)
                return
            self.running.remove(item)
            self.idle.append(item.worker)
            cause = error.cause if isinstance(error.cause, Exception) else error
            self._log("failed", item, error=str(cause))
            cause.add_note(f"{item.name} failed on {item.worker.where}")
            settle(None, cause)
        except ActorUnavailableError as error:  # Ray raises this if the node was lost or cannot be reached
            self._end_unfinished(item, "lost", _one_line(error), counts=False)
        except RayError as error:
            process = item.worker.process
            node_lost = "node has died" in str(error) or (process and process["node"] not in alive())
            self._end_unfinished(item, "lost" if node_lost else "died", _one_line(error), not node_lost)
        else:
            if stopped and result is False:
                self._end_unfinished(
                    item, "moved", "its node or process was stopped; the task saved its checkpoint first", counts=False
                )
                return
            self.running.remove(item)
            self._log("finished", item)
            _count("finished")
            self.idle.append(item.worker)
            if stopped:
                self._kill([item.worker])
            settle(result, None)

    def _end_unfinished(self, item: RunningItem, event: str, why: str, counts: bool) -> None:
        """Stop the actor of an unfinished item; queue the item again or, after too many deaths, settle it as failed."""
        attempts, worker = item.attempts, item.worker
        self.running.remove(item)
        self._kill([worker])  # the actor may still run on a node that cannot be reached
        self._log(event, item, why=why)
        _count(event)
        attempts.deaths += counts
        if attempts.deaths > self.runtime.max_restarts:
            attempts.piece.settle(
                None,
                RetriesExhausted(
                    f"the worker of {item.name} died {attempts.deaths} times (last on {worker.where}: {why[:200]}); "
                    "its checkpoint is kept; check whether memory ran out, then resume, or raise runtime.max_restarts",
                    worker.process.get("host", "?"),
                ),
            )
            return
        self.say(f"{item.name}: {event} on {worker.where}: {why[:200]}")
        first, most = BACK_OFF
        attempts.ready_at = time.monotonic() + min(most, first * 2 ** (attempts.deaths - 1 if counts else 0))
        self.waiting.insert(0, attempts)

    # -- stopping actors -----------------------------------------------------------------------------------------

    def _kill(self, workers: Sequence[WorkerActor]) -> None:
        for worker in list(workers):
            ray.kill(worker.actor)
            if worker in self.idle:
                self.idle.remove(worker)

    def _stop(self) -> None:
        """Ask the tasks of all workers to stop, and wait until they have saved checkpoints and ended."""
        working = [s for s in self.running if s.where is None or ray.wait([s.where], timeout=0)[0]]
        for item in working:
            item.worker.actor.stop.remote()
        deadline = time.monotonic() + STOP_SECONDS
        for item in working:
            ray.wait([item.result], timeout=max(0.0, deadline - time.monotonic()))
            self._log("stopped", item)

    def _log(self, event: str, item: RunningItem, **facts: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event, "item": item.name}
        append_jsonl(self.events, {**line, **item.worker.process, **facts})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_counters: dict[str, Counter] = {}


def _count(event: str) -> None:
    if event not in _counters:
        _counters[event] = Counter(f"rmdd_{event}", f"number of experts, phases and students with the event {event!r}")
    _counters[event].inc()
