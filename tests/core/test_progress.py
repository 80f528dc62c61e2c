import io

import pytest
from rich.console import Console

from rmdd.core.progress import Progress
from rmdd.execution.in_turn import SequentialExecutor


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def follow(clock: Clock, **options) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(console=Console(file=out, width=200, **options), clock=clock), out


def test_a_log_has_a_first_line_a_last_line_and_at_most_one_line_every_ten_seconds():
    clock = Clock()
    progress, out = follow(clock)
    with progress.stage("phases", {"phase 0": 100, "phase 1": 100}) as update:
        for done in range(1, 101):
            clock.now += 0.5
            update("phase 0", {"done": done, "loss": 0.25})
    lines = out.getvalue().splitlines()
    assert lines[0] == "phases: 2 to do"
    assert lines[-1] == "phases: done after 0:00:50"
    assert len(lines) == 2 + 5
    assert lines[1] == "phases: 0/2 done, 10%, 0:01:30 left; phase 0: 20/100 loss 0.25"


def test_items_that_are_not_added_yet_count_in_the_totals():
    clock = Clock()
    progress, out = follow(clock)
    with progress.stage("trials", {}) as stage:
        for number in (3, 4):
            stage.add({f"trial {number}": 2})
            stage.expect(8, 2, ended=3)
        clock.now = 20.0
        stage("trial 3", {"done": 2})
        assert (stage.finished, stage.count, stage.share, stage.left) == (4, 8, 8 / 16, None)
        clock.now = 40.0
        stage("trial 4", {"done": 1})
        assert stage.left == 40.0 * 7
    assert "trials: 4/8 done, 56%, 0:04:40 left; trial 4: 1/2" in out.getvalue()


def test_earlier_work_of_a_resumed_item_does_not_shorten_the_estimate():
    clock = Clock()
    progress, out = follow(clock)
    with progress.stage("phases", {"phase 0": 100}) as update:
        update("phase 0", {"done": 50})
        clock.now = 10.0
        update("phase 0", {"done": 60})
    assert "0:00:40 left" in out.getvalue()


def test_the_live_table_has_a_row_per_running_item_and_counts_the_finished_items():
    clock = Clock()
    progress, out = follow(clock, force_terminal=True)
    with progress.stage("experts", {f"expert {e}": 2 for e in range(30)}) as update:
        for e in range(5):
            update(f"expert {e}", {"done": 2, "val": 40.0})
        for e in range(5, 25):
            clock.now += 1
            update(f"expert {e}", {"done": 1, "val": 33.25})
    text = out.getvalue()
    assert "5 done, 20 running, 5 waiting" in text
    assert "val 33.25" in text and "and 4 more" in text
    assert "experts: done" in text


def test_an_error_ends_the_stage_and_quiet_prints_nothing():
    progress, out = follow(Clock())
    with pytest.raises(ValueError), progress.stage("experts", {"expert 0": 1}):
        raise ValueError
    assert "experts: stopped" in out.getvalue()
    quiet = Progress(quiet=True, console=Console(file=io.StringIO()))
    quiet.say("hello")
    with quiet.stage("experts", {"expert 0": 1}) as update:
        update("expert 0", {"done": 1})
    assert quiet.console.file.getvalue() == ""


def test_an_item_is_running_as_soon_as_a_worker_begins_it():
    clock = Clock()
    progress, _ = follow(clock)
    with progress.stage("phases", {"phase 0": 100, "phase 1": 100}) as stage:
        executor = SequentialExecutor()
        heads = []

        def task(item, hooks):
            heads.append(stage.table().renderables[0].plain)
            clock.now += 5.0
            hooks.report({"done": 100})

        executor.map(task, [0, 1], ["phase 0", "phase 1"], stage)
    assert heads[0].startswith("phases  0 done, 1 running, 1 waiting  0%")
    assert heads[1].startswith("phases  1 done, 1 running, 0 waiting  50%")
