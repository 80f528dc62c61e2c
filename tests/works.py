"""A storage with every kind of work at tiny size: runs of all stages, sweep, search, comparison, transfer, coreset."""

import pytest
import tiny

import rmdd
from rmdd import config

TINY = tiny.changed(
    tiny.RUN,
    experts={"keep": "all"},
    distill={"budget": 12, "snapshots": 1, "checkpoint_every": 1},
    evaluate={"epochs": 1, "baseline_draws": 1, "students": 1},
)
PHASE = {"pairs": 3, "start": 0, "stop": 1, "endpoint": 1, "iterations": 2}
CHAINED = {"method": "ptm_st", "path_start": "student", "path_lag": 1, "phases": [PHASE, PHASE], "batch": 2}


def run_of(storage, name, **changes):
    return config.load(tiny.stored(storage, tiny.changed(TINY, name=name, **changes)))


def until(run, iteration):
    """Distil a run up to an iteration of its first phase, and stop there as Ctrl-C does."""
    from rmdd.runs.tasks import DistillPhase

    original = DistillPhase.__call__

    def stopping(self, item, hooks):
        count = {"done": 0}
        hooks = hooks.__class__(
            report=lambda metrics: count.update(metrics), should_stop=lambda: count["done"] >= iteration
        )
        original(self, item, hooks)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillPhase, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            tiny.go(run, "distill")


def make(storage):
    """Fill a storage with runs of all stages, and with each kind of work that is made of runs."""
    swept = tiny.stored(storage, tiny.changed(TINY, name="swept"))
    one, _ = rmdd.sweep(swept, {"distill.lr_image": [3.0, 4.0]}, progress=tiny.QUIET).runs
    tiny.go(run_of(storage, "chained", distill=CHAINED), "distill")
    until(run_of(storage, "begun", distill={"lr_image": 2.0}), 2)
    tiny.go(run_of(storage, "trained", experts={"seed": 1}), "experts")
    tiny.go(run_of(storage, "ingested", data={"scenes": {"train": 11}}), "ingest")
    space = {"distill.lr_image": {"choice": [5.0, 6.0]}}
    search = tiny.changed(TINY, name="searched", search={"space": space, "sampler": "grid"})
    rmdd.search(tiny.stored(storage, search), progress=tiny.QUIET)
    rmdd.compare([one["folder"], "random:4", "full"], progress=tiny.QUIET)
    rmdd.transfer(one["folder"], ["test_resnet@random"], progress=tiny.QUIET)
    rmdd.coreset(
        run_of(storage, "ingested", data={"scenes": {"train": 11}}), method="random", pairs=3, progress=tiny.QUIET
    )
    rmdd.train(one["folder"], progress=tiny.QUIET)
    rmdd.train(one["folder"], "random:3", progress=tiny.QUIET)
