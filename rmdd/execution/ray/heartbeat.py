"""Signs of life of the workers of a search, and the word to stop: what Ray Tune does not carry.

An actor without a share of the machine hears a beat of every worker each second, and answers whether to stop.
"""

import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from rmdd.execution.tasks import Hooks

BEAT_SECONDS = 1.0


class TrialMonitor:
    """What is known of the workers, by the trial that each is at."""

    def __init__(self) -> None:
        self.beats: dict[str, tuple[int, float]] = {}
        """Of those at work: signs of life, and when their number last rose."""
        self.reasons: dict[str, str] = {}
        self.stopping = False

    def hear(self, trial: str, beats: int | None) -> bool:
        """Take the signs of life of a worker, None while it has no work; returns whether to stop."""
        if beats is None:
            self.beats.pop(trial, None)
        elif trial not in self.beats or self.beats[trial][0] != beats:
            self.beats[trial] = beats, time.monotonic()
        return self.stopping

    def silent(self, seconds: float) -> list[str]:
        """Trials whose worker has given no sign of life for so long; each is told once."""
        late = time.monotonic() - seconds
        silent = [trial for trial, (_, beat) in self.beats.items() if beat < late]
        for trial in silent:
            del self.beats[trial]
        return silent

    def note_failure(self, trial: str, why: str) -> None:
        self.reasons[trial] = why

    def reason(self, trial: str) -> str | None:
        """Why a trial last failed, as its worker put it."""
        return self.reasons.get(trial)

    def stop(self) -> None:
        self.stopping = True

    def at_work(self) -> bool:
        return bool(self.beats)


class TrialHeartbeat:
    """In a worker: sends its beats from a thread, and gives the runner of its trial hooks."""

    def __init__(self, monitor: Any):
        self.monitor = monitor
        self.trial, self.beats, self.stopping = "", 0, False
        self.hooks = Hooks(report=lambda metrics: self._live(), should_stop=self._should_stop)
        threading.Thread(target=self._send, name="heartbeat", daemon=True).start()

    def begin(self, trial: str) -> None:
        self._live()
        self.trial = trial
        self._hear(trial, self.beats)

    def end(self) -> None:
        trial, self.trial = self.trial, ""
        self._hear(trial, None)

    def _live(self) -> None:
        self.beats += 1

    def _should_stop(self) -> bool:
        self._live()
        return self.stopping

    def _hear(self, trial: str, beats: int | None) -> None:
        self.stopping = ray.get(self.monitor.hear.remote(trial, beats))

    def _send(self) -> None:
        try:
            while True:
                if trial := self.trial:
                    self._hear(trial, self.beats)
                    if self.trial != trial:  # it ended meanwhile
                        self._hear(trial, None)
                time.sleep(BEAT_SECONDS)
        except RayError:  # the search is over
            return
