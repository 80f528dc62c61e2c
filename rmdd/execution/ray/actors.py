"""Supervised actors: experts, phases and students side by side, each restarted where it left off.

One actor per slot takes items until none is left. When an actor or its node dies, or an actor is silent for too
long, its item is begun again elsewhere, which means from its last checkpoint, for tasks keep their own. A task's
own error is not retried.
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
from rmdd.execution.ray.cluster import Resources, resources_now
from rmdd.execution.ray.nodes import alive, draining
from rmdd.execution.ray.worker import Blind, Worker, folder_to_see
from rmdd.execution.tasks import Executor, GivenUp, Interrupted, Piece, Source, Task

POLL_SECONDS = 0.5
NODES_SECONDS = 3.0
"""How often the cluster is asked which nodes it has."""
STOP_SECONDS = 90.0
"""For saving; who stops the driver leaves it 120."""
BACK_OFF = 0.5, 60.0
"""Seconds before an item whose worker died is begun again: at first, and at most after doubling."""


@dataclass(eq=False)
class Job:
    """A piece and what became of it so far."""

    piece: Piece
    starts: int = 0
    deaths: int = 0
    """Starts that count against `max_restarts`: the worker died or hung, and not because its node went."""
    ready_at: float = 0.0


@dataclass(eq=False)
class Hand:
    """An actor and where it is, once it has answered."""

    actor: Any
    place: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        return f"node {self.place['node'][:8]} ({self.place['host']}), pid {self.place['pid']}" if self.place else "?"


@dataclass(eq=False)
class Slot:
    """An actor at work on one item."""

    hand: Hand
    job: Job
    result: Any
    status: Any
    where: Any
    """Answers once the actor is up; None when that has been logged."""
    beats: int = -1
    seen: float = field(default_factory=time.monotonic)
    """When it began, or the count of beats last rose."""

    @property
    def name(self) -> str:
        return self.job.piece.name


@dataclass
class SideBySide(Executor):
    """An executor that spreads items over actors. `events` gets a JSON line for every start, death and end.

    Its actors end with the last piece; inside a `with` they wait for the next ones, and end with it.
    """

    runtime: config.Runtime
    resources: Resources
    events: Path
    say: Callable[[str], None] = lambda text: None
    slots: list[Slot] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    idle: list[Hand] = field(default_factory=list)
    blind: set[str] = field(default_factory=set)
    """Nodes that do not see the storage; nothing is put there again."""
    _kept: bool = False
    _asked: float = 0.0
    _tasks: dict[Task, Any] = field(default_factory=dict)

    def __enter__(self) -> "SideBySide":
        self._kept = True
        return self

    def __exit__(self, *error: object) -> None:
        self._kept = False
        self.rest()

    def rest(self) -> None:
        """Let go of actors that have no work, so that others find room."""
        self._dismiss(self.idle)

    def serve(self, source: Source) -> None:
        """See `rmdd.execution.tasks.Executor`. A piece whose workers keep dying ends with `GivenUp`."""
        more = True
        self._asked = time.monotonic()
        try:
            while more or self.waiting or self.slots:
                if more:
                    new = source(0.0 if self.slots or self.waiting else POLL_SECONDS)
                    more = new is not None
                    self.waiting += [Job(piece) for piece in new or ()]
                self._fill()
                self._wait()
                self._look_after()
                if any(slot.where is not None for slot in self.slots) and not self._ready():
                    self.rest()  # one without work may hold what another needs to start
        except KeyboardInterrupt:
            self._stop()
            raise Interrupted from None
        except BaseException:
            self._stop()
            raise
        finally:
            self._dismiss([slot.hand for slot in self.slots])
            self.slots, self.waiting = [], []
            if not self._kept:
                self.rest()

    # -- starting ------------------------------------------------------------------------------------------------

    def _ready(self) -> list[Job]:
        return [job for job in self.waiting if job.ready_at <= time.monotonic()]

    def _fill(self) -> None:
        width = self.resources.workers(self.runtime, len(self.slots) + len(self.waiting))
        for job in self._ready()[: max(0, width - len(self.slots))]:
            self.waiting.remove(job)
            self.slots.append(self._start(job))

    def _start(self, job: Job) -> Slot:
        hand = self.idle.pop() if self.idle else Hand(self._hire())
        job.starts += 1
        piece, actor = job.piece, hand.actor
        if piece.task not in self._tasks:
            self._tasks[piece.task] = ray.put(piece.task)
        where = actor.where.remote()
        result = actor.run.remote(self._tasks[piece.task], piece.item, piece.name)
        return Slot(hand, job, result, actor.status.remote(), where)

    def _hire(self) -> Any:
        threads = self.runtime.threads
        cpus, gpus = self.runtime.share
        options = {
            "num_cpus": min(cpus, self.resources.widest),
            "num_gpus": gpus,
            "max_concurrency": 2,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        if self.blind:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self.blind))})"}
        return ray.remote(Worker).options(**options).remote(threads, folder_to_see(self.runtime, self.events))

    def _announce(self, slot: Slot, timeout: float = 0.0) -> None:
        """Log the start of a slot once its actor answers."""
        if slot.where is None or not ray.wait([slot.where], timeout=timeout)[0]:
            return
        with contextlib.suppress(RayError):  # a death shows in the result
            slot.hand.place = ray.get(slot.where)
            slot.seen = time.monotonic()
            self._log("started", slot, attempt=slot.job.starts)
            if slot.job.starts > 1:
                self.say(f"{slot.name}: goes on at {slot.hand.words}, start {slot.job.starts}")
        slot.where = None

    # -- looking after -------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Until something happens, or for a moment."""
        news = [s.result for s in self.slots] + [s.where for s in self.slots if s.where is not None]
        if news:
            ray.wait(news, num_returns=1, timeout=POLL_SECONDS)
        elif self.waiting:
            time.sleep(POLL_SECONDS / 5)

    def _look_after(self) -> None:
        results = [slot.result for slot in self.slots]
        ended = set(ray.wait(results, num_returns=len(results), timeout=0)[0]) if results else set()
        for slot in list(self.slots):
            self._announce(slot)
            self._report(slot)
            if slot.result in ended:
                self._settle(slot)
            elif self._hangs(slot):
                minutes = self.runtime.stall_limit
                self._lose(slot, "hung", f"no sign of life for {minutes:g} minutes (runtime.stall_limit)", counts=True)
        if time.monotonic() - self._asked >= NODES_SECONDS:
            self._asked = time.monotonic()
            self.resources = resources_now(self.resources.grows, without=self.blind)
            self._leave(draining())

    def _report(self, slot: Slot) -> None:
        if not ray.wait([slot.status], timeout=0)[0]:
            return
        with contextlib.suppress(RayError, GetTimeoutError):
            beats, latest = ray.get(slot.status, timeout=1)
            if beats != slot.beats:
                slot.beats, slot.seen = beats, time.monotonic()
            if latest:
                place = slot.hand.place if self.resources.nodes > 1 else {}
                slot.job.piece.on_report(
                    {**latest, **({"on": f"{place['host']}/{place['node'][:6]}"} if place else {})}
                )
            slot.status = slot.hand.actor.status.remote()

    def _hangs(self, slot: Slot) -> bool:
        limit = self.runtime.stall_limit
        return limit is not None and bool(slot.hand.place) and time.monotonic() - slot.seen > 60 * limit

    def _leave(self, nodes: set[str]) -> None:
        """Let those on nodes that are about to go save and stop; their items go on elsewhere."""
        self._dismiss([hand for hand in self.idle if hand.place.get("node") in nodes])
        for slot in self.slots:
            if slot.hand.place.get("node") in nodes:
                slot.hand.actor.stop.remote()

    def _settle(self, slot: Slot) -> None:
        self._announce(slot, timeout=5.0)
        settle = slot.job.piece.settle
        try:
            result, told_to_stop = ray.get(slot.result)
        except RayTaskError as error:
            if isinstance(error.cause, Blind) and slot.hand.place:
                self.blind.add(slot.hand.place["node"])
                self._lose(slot, "lost", str(error.cause), counts=False)
                return
            self.slots.remove(slot)
            self.idle.append(slot.hand)
            cause = error.cause if isinstance(error.cause, Exception) else error
            self._log("failed", slot, error=str(cause))
            cause.add_note(f"{slot.name} failed on {slot.hand.words}")
            settle(None, cause)
        except ActorUnavailableError as error:  # its node went, or cannot be reached
            self._lose(slot, "lost", _one_line(error), counts=False)
        except RayError as error:
            gone = "node has died" in str(error) or (slot.hand.place and slot.hand.place["node"] not in alive())
            self._lose(slot, "lost" if gone else "died", _one_line(error), not gone)
        else:
            if told_to_stop and result is False:
                self._lose(slot, "moved", "its node or process was told to go; it has saved", counts=False)
                return
            self.slots.remove(slot)
            self._log("finished", slot)
            _count("finished")
            self.idle.append(slot.hand)
            if told_to_stop:
                self._dismiss([slot.hand])
            settle(result, None)

    def _lose(self, slot: Slot, event: str, why: str, counts: bool) -> None:
        """End a slot whose item is not done, and let the item wait for its next start, or give it up."""
        job, hand = slot.job, slot.hand
        self.slots.remove(slot)
        self._dismiss([hand])  # one that is only out of reach must not go on beside its successor
        self._log(event, slot, why=why)
        _count(event)
        job.deaths += counts
        if job.deaths > self.runtime.max_restarts:
            job.piece.settle(
                None,
                GivenUp(
                    f"the worker of {slot.name} died {job.deaths} times (last on {hand.words}: {why[:200]}); "
                    "its checkpoint is kept; look for lack of memory, then resume, or raise runtime.max_restarts",
                    hand.place.get("host", "?"),
                ),
            )
            return
        self.say(f"{slot.name}: {event} on {hand.words}: {why[:200]}")
        first, most = BACK_OFF
        job.ready_at = time.monotonic() + min(most, first * 2 ** (job.deaths - 1 if counts else 0))
        self.waiting.insert(0, job)

    # -- ending --------------------------------------------------------------------------------------------------

    def _dismiss(self, hands: Sequence[Hand]) -> None:
        for hand in list(hands):
            ray.kill(hand.actor)
            if hand in self.idle:
                self.idle.remove(hand)

    def _stop(self) -> None:
        """Ask everyone to stop at the next step and wait for their checkpoints."""
        working = [s for s in self.slots if s.where is None or ray.wait([s.where], timeout=0)[0]]
        for slot in working:
            slot.hand.actor.stop.remote()
        deadline = time.monotonic() + STOP_SECONDS
        for slot in working:
            ray.wait([slot.result], timeout=max(0.0, deadline - time.monotonic()))
            self._log("stopped", slot)

    def _log(self, event: str, slot: Slot, **facts: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event, "item": slot.name}
        append_jsonl(self.events, {**line, **slot.hand.place, **facts})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_counters: dict[str, Counter] = {}


def _count(event: str) -> None:
    if event not in _counters:
        _counters[event] = Counter(f"rmdd_{event}", f"experts, phases and students: {event}")
    _counters[event].inc()
