"""Heartbeats of the workers of a search, and a way to ask the workers to stop; Ray Tune offers neither.

Every second, each worker calls a Ray actor, the `TrialMonitor`. The answer says whether the worker should stop.
"""

import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from rmdd.execution.tasks import Hooks

BEAT_SECONDS = 1.0


class TrialMonitor:
    """Collects the heartbeats of all running trials; runs as a Ray actor."""

    def __init__(self) -> None:
        self.beats: dict[str, tuple[int, float]] = {}
        """Number of heartbeats of each running trial, and the time of the last one, in seconds of `time.monotonic`."""
        self.reasons: dict[str, str] = {}
        self.stopping = False

    def receive(self, trial: str, beats: int | None) -> bool:
        """Store a trial's number of heartbeats (None: the trial ended); return whether its worker should stop."""
        if beats is None:
            self.beats.pop(trial, None)
        elif trial not in self.beats or self.beats[trial][0] != beats:
            self.beats[trial] = beats, time.monotonic()
        return self.stopping

    def silent(self, seconds: float) -> list[str]:
        """Return the ids of trials that sent no heartbeat for `seconds`; each id is returned only once."""
        late = time.monotonic() - seconds
        silent = [trial for trial, (_, beat) in self.beats.items() if beat < late]
        for trial in silent:
            del self.beats[trial]
        return silent

    def note_failure(self, trial: str, why: str) -> None:
        self.reasons[trial] = why

    def reason(self, trial: str) -> str | None:
        """Return the reason of a trial's latest failure, or None if the trial never failed."""
        return self.reasons.get(trial)

    def stop(self) -> None:
        self.stopping = True

    def at_work(self) -> bool:
        return bool(self.beats)


class TrialHeartbeat:
    """Counts the calls of a worker's hooks (its heartbeats); a thread sends the number to the monitor."""

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
                    if self.trial != trial:  # the trial ended during the call
                        self._report(trial, None)
                time.sleep(BEAT_SECONDS)
        except RayError:  # the search is over
            return
