"""Check worker groups without Ray; each test starts two processes on this machine."""

import pytest
import torch
import worker_groups

from rmdd import config
from rmdd.execution.tasks import Hooks
from rmdd.experts.store import Store
from rmdd.experts.train import begin_store
from rmdd.experts.worker_group import run_in_processes

EPOCHS = 3


def initial_set(path, **experts):
    run = worker_groups.run_of(**experts)
    begin_store(run, path, worker_groups.WIDTH, {})
    return path, run


def by_one(path, **experts):
    item = initial_set(path, **experts)
    assert worker_groups.train(item, Hooks())
    return Store.open(path)


def by_two(path, hooks=None, **experts):
    return run_in_processes(worker_groups.train, initial_set(path, **experts), hooks or Hooks(), 2, 1)


def check_same(a, b):
    assert a.complete() == b.complete() == [0]
    for epoch in range(EPOCHS + 1):
        for name, p in a.read(0, epoch).items():
            torch.testing.assert_close(b.read(0, epoch)[name], p, rtol=1e-5, atol=1e-6)
    losses = [[m.get("loss") for m in store.record(0)["metrics"][1:]] for store in (a, b)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_gradients_of_the_ranks_add_up_to_that_of_the_whole_batch():
    assert run_in_processes(worker_groups.exact, None, Hooks(), 2, 1)


def test_a_stopped_and_resumed_group_with_momentum_trains_what_one_worker_trains(tmp_path):
    one, logged = by_one(tmp_path / "one", momentum=0.9), []
    group = {"momentum": 0.9, "worker_group": {"workers": 2}}
    assert not by_two(tmp_path / "two", Hooks(logged.append, lambda: len(logged) >= 1), **group)
    store = Store.open(tmp_path / "two")
    assert store.complete() == [] and (store.folder(0) / "running.safetensors").is_file()
    assert by_two(tmp_path / "two", **group)
    check_same(one, store)


def test_a_rank_that_fails_ends_the_group_with_its_reason():
    with pytest.raises((ValueError, RuntimeError), match="rank one fails on purpose"):
        run_in_processes(worker_groups.die, None, Hooks(), 2, 1)


@pytest.mark.parametrize(
    "strategy",
    ["zero3", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow)],
)
def test_zero_trains_what_one_worker_trains(tmp_path, strategy):
    pytest.importorskip("deepspeed")
    one = by_one(tmp_path / "one")
    assert by_two(tmp_path / strategy, worker_group={"workers": 2, "strategy": strategy})
    check_same(one, Store.open(tmp_path / strategy))


def test_an_impossible_split_over_workers_is_refused():
    with pytest.raises(
        ValueError, match=r"experts.batch 2 cannot be split over experts.worker_group.workers 3; raise experts.batch"
    ):
        config.Experts(batch=2, worker_group=config.WorkerGroup(workers=3))
    with pytest.raises(ValueError, match="experts.momentum"):
        config.Experts(momentum=0.9, worker_group=config.WorkerGroup(workers=2, strategy="zero2"))
