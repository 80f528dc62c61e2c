"""Heartbeats of the workers of a search, and the request to stop them, which Ray Tune does not offer.

Every worker sends a heartbeat each second to a monitor (an actor without CPUs), which answers whether to stop.
"""

import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from rmdd.execution.tasks import Hooks

BEAT_SECONDS = 1.0


class TrialMonitor:
    """Collects the heartbeats of workers, by the trial that each works on."""

    def __init__(self) -> None:
        self.beats: dict[str, tuple[int, float]] = {}
        """The number of heartbeats of each running trial, and when it last rose."""
        self.reasons: dict[str, str] = {}
        self.stopping = False

    def receive(self, trial: str, beats: int | None) -> bool:
        """Take the number of heartbeats of a trial (None: it ended), and return whether its worker should stop."""
        if beats is None:
            self.beats.pop(trial, None)
        elif trial not in self.beats or self.beats[trial][0] != beats:
            self.beats[trial] = beats, time.monotonic()
        return self.stopping

    def silent(self, seconds: float) -> list[str]:
        """Return the trials without a heartbeat for `seconds`; each is returned only once."""
        late = time.monotonic() - seconds
        silent = [trial for trial, (_, beat) in self.beats.items() if beat < late]
        for trial in silent:
            del self.beats[trial]
        return silent

    def note_failure(self, trial: str, why: str) -> None:
        self.reasons[trial] = why

    def reason(self, trial: str) -> str | None:
        """Return the reason of a trial's last failure, or None."""
        return self.reasons.get(trial)

    def stop(self) -> None:
        self.stopping = True

    def at_work(self) -> bool:
        return bool(self.beats)


class TrialHeartbeat:
    """Sends the heartbeats of a worker from a thread; its hooks count a heartbeat at each call."""

    def __init__(self, monitor: Any):
        self.monitor = monitor
        self.trial, self.beats, self.stopping = "", 0, False
        self.hooks = Hooks(report=lambda metrics: self._count(), should_stop=self._should_stop)
        threading.Thread(target=self._send, name="heartbeat", daemon=True).start()

    def begin(self, trial: str) -> None:
        self._count()
        self.trial = trial
        self._report(trial, self.beats)

    def end(self) -> None:
        trial, self.trial = self.trial, ""
        self._report(trial, None)

    def _count(self) -> None:
        self.beats += 1

    def _should_stop(self) -> bool:
        self._count()
        return self.stopping

    def _report(self, trial: str, beats: int | None) -> None:
        self.stopping = ray.get(self.monitor.receive.remote(trial, beats))

    def _send(self) -> None:
        try:
            while True:
                if trial := self.trial:
                    self._report(trial, self.beats)
                    if self.trial != trial:  # the trial ended meanwhile
                        self._report(trial, None)
                time.sleep(BEAT_SECONDS)
        except RayError:  # the search is over
            return
