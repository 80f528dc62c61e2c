"""Show the progress of running work: a live table on a terminal, plain lines in a log, and nothing if `quiet` is True.

All output goes to stderr, because stdout is for results.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LOG_SECONDS = 10.0
"""Seconds between two progress lines in a log."""
ROWS = 16
"""Largest number of items, such as experts or phases, that the live table shows."""


@dataclass
class _Item:
    total: int
    done: float = 0
    first: float = 0
    """Units of work finished at the first report; `rate` ignores them, because an earlier process did them."""
    started: bool = False
    began: float | None = None
    """Time in seconds at which the work that `rate` counts began, or None before the first report."""
    reported_at: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    @property
    def rate(self) -> float:
        """Units of work finished per second since the first report."""
        elapsed = self.reported_at - (self.began or 0.0)
        return (self.done - self.first) / elapsed if elapsed > 0 else 0.0


class Progress:
    """Prints lines of text (`say`) and shows the progress of a group of items, such as the experts of a run (`stage`).

    >>> with Progress(quiet=True).stage("experts", {"expert 0": 10}) as update:
    ...     update("expert 0", {"done": 3, "loss": 0.7})
    """

    def __init__(
        self, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.quiet = quiet
        self.console = console or Console(stderr=True)
        self.clock = clock

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, title: str, totals: Mapping[str, int]) -> Iterator["Stage"]:
        """Show the progress of a group of items until the block ends; `totals` has the units of work of each item.

        Yields a function `update(name, metrics)`: `metrics["done"]` is the number of finished units of the item `name`,
        and the other metrics are printed beside it. Without metrics, the work on the item begins.
        """
        live = not self.quiet and self.console.is_terminal
        stage = Stage(title, self.clock, None if live else self.say)
        stage.add(totals)
        if not live:
            self.say(f"{title}: {len(totals)} to do" if totals else title)
        table = Live(get_renderable=stage.table, console=self.console, refresh_per_second=2, transient=True)
        outcome = "stopped"
        try:
            with table if live else contextlib.nullcontext():
                yield stage
            outcome = "done"
        finally:
            self.say(f"{title}: {outcome} after {_clock(self.clock() - stage.began)}")


class Stage:
    """The progress of a group of items. `stage(name, metrics)` updates one item. It also passes a line to `say` if
    `LOG_SECONDS` have passed since the last line."""

    def __init__(self, title: str, clock: Callable[[], float], say: Callable[[str], None] | None = None):
        self.title, self.clock, self.say = title, clock, say
        self.items: dict[str, _Item] = {}
        self.most = self.each = self.ended = 0
        self.began = self.logged_at = clock()

    def add(self, totals: Mapping[str, int]) -> None:
        """Add the items in `totals` (units of work by item name); items that were added earlier do not change."""
        for name, total in totals.items():
            self.items.setdefault(name, _Item(total))

    def expect(self, most: int, each: int, ended: int) -> None:
        """Announce `most` items with `each` units of work per item; `ended` are finished, and `add` adds the others."""
        self.most, self.each, self.ended = most, each, ended

    def __call__(self, name: str, metrics: Mapping[str, Any]) -> None:
        item, now = self.items[name], self.clock()
        item.started = True
        if not metrics:
            return
        done = float(metrics.get("done", item.done))
        if item.began is None:
            # a first report of at most one unit shows that the item was not resumed: its work began with the stage
            item.began, item.first = self.began if done <= 1 else now, 0 if done <= 1 else done
        item.done, item.reported_at = done, now
        item.metrics = {key: value for key, value in metrics.items() if key != "done"}
        if self.say is not None and now - self.logged_at >= LOG_SECONDS:
            self.logged_at = now
            self.say(self.line(name))

    @property
    def count(self) -> int:
        """Number of items of the stage, including expected items that were not added yet."""
        return max(self.most, len(self.items) + self.ended)

    @property
    def finished(self) -> int:
        return self.ended + sum(item.finished for item in list(self.items.values()))

    @property
    def share(self) -> float:
        """Share of the units of work of all items that is finished, between 0 and 1."""
        total = sum(item.total for item in list(self.items.values())) + self._not_added * self.each
        done = sum(min(item.done, item.total) for item in list(self.items.values()))
        return (done + self.ended * self.each) / (total + self.ended * self.each) if total + self.ended else 1.0

    @property
    def _not_added(self) -> int:
        return self.count - len(self.items) - self.ended

    @property
    def left(self) -> float | None:
        """Seconds until all items are finished, at the average pace so far; None if no unit was finished yet."""
        gained = sum(item.done - item.first for item in list(self.items.values()) if item.began is not None)
        missing = (
            sum(max(item.total - item.done, 0) for item in list(self.items.values())) + self._not_added * self.each
        )
        elapsed = self.clock() - self.began
        return missing * elapsed / gained if gained > 0 else None

    def line(self, name: str) -> str:
        item = self.items[name]
        parts = [f"{self.title}: {self.finished}/{self.count} done, {self.share:.0%}"]
        if self.left is not None:
            parts.append(f"{_clock(self.left)} left")
        return ", ".join(parts) + f"; {name}: {item.done:g}/{item.total} {_metrics(item.metrics)}".rstrip()

    def table(self) -> Group:
        followed = list(self.items.items())  # a copy, because another thread may add items
        running = [(name, item) for name, item in followed if item.started and not item.finished]
        waiting = self.count - self.finished - len(running)
        head = f"{self.title}  {self.finished} done, {len(running)} running, {waiting} waiting  {self.share:.0%}"
        left = "" if self.left is None else f"  {_clock(self.left)} left"
        rows = Table.grid(padding=(0, 2))
        rows.add_row("all", ProgressBar(1.0, self.share, width=24), "", "", "", _clock(self.clock() - self.began))
        for name, item in running[:ROWS]:
            wait = _clock((item.total - item.done) / item.rate) if item.rate > 0 else "-"
            pace = f"{item.rate:.3g}/s" if item.rate > 0 else "-"
            bar = ProgressBar(item.total, item.done, width=24)
            rows.add_row(name, bar, f"{item.done:g}/{item.total}", pace, wait, _metrics(item.metrics))
        more = [Text(f"and {len(running) - ROWS} more")] if len(running) > ROWS else []
        return Group(Text(head + left, style="bold"), rows, *more)


def _metrics(metrics: Mapping[str, Any]) -> str:
    return " ".join(f"{k} {v:.4g}" if isinstance(v, int | float) else f"{k} {v}" for k, v in metrics.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
