"""Stopping of work by Ctrl-C, SIGTERM or a time limit."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal asked to stop. A second signal raises `KeyboardInterrupt`."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def time_limit(minutes: float | None, say: Callable[[str], None]) -> Iterator[None]:
    """Raise `KeyboardInterrupt` in the block after `minutes`. Raises `ValueError` if called outside the main thread."""
    if minutes is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("runtime.time_limit works only in the main thread of Python; set it to null, or run there")
    began = time.monotonic()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    except KeyboardInterrupt:
        if time.monotonic() - began >= 60 * minutes:
            say(f"the time limit of {minutes:g} minutes (runtime.time_limit) was reached")
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
