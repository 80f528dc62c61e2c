import json
import re
from dataclasses import replace

import pytest
import torch
from toy import RATES, assert_same_results, distil, first_set, lines_of, run_of, same_tensors, stop_after

from rmdd import config
from rmdd.distill import loop
from rmdd.distill.guard import PhaseDiverged, divergence_reason, health_numbers
from rmdd.distill.loop import State
from rmdd.distill.trajectory import matching, stepping

BAD = 5
"""The iteration (counted from 0) in which the phase diverges; good states exist after iterations 2 and 4."""


def guarded(kind="full", **change):
    """Return a run that checks for divergence. It is fast, because its students take only one step."""
    change = {"steps": 1, "inner_dropout": "fresh_mask"} | change
    guard = {"every": 2, "retries": 3} | change.pop("guard", {})
    return run_of(guard=guard, similarity={"kind": kind, "rank": 2}, **change)


def put(**tensors):
    """Return a function that damages a synthetic set: for each NAME=FUNCTION, it applies FUNCTION to tensor NAME."""
    return lambda raw: raw.with_tensors(raw.tensors() | {n: change(raw.tensors()[n]) for n, change in tensors.items()})


DAMAGE = {
    "not a number": (
        "full",
        put(images=lambda t: t.index_fill(0, torch.tensor([1]), torch.nan)),
        "stopped being finite",
    ),
    "infinite": ("identity", put(texts=lambda t: t / 0), "stopped being finite"),
    "exploding rate": ("full", put(lr_text=lambda t: t * 101), r"the inner text learning rate went from 0.1 to 1\d"),
    "vanishing rate": (
        "identity",
        put(lr_image=lambda t: t / 101),
        "the inner image learning rate went from 0.1 to 0.0009",
    ),
    "negative rate": ("low_rank", put(lr_image=lambda t: -t), "the inner image learning rate went from 0.1 to -0"),
    "dead": ("full", put(**{"similarity.matrix": lambda t: t * 0.4}), "no pair counts as positive: the largest diag"),
    "dead factors": ("low_rank", put(**{"similarity.scale": lambda t: t * 0.4}), "no pair counts as positive"),
}


def diverge(monkeypatch, damage, times=1, at=BAD):
    """Damage the update of iteration `at` until the outer learning rates have been halved `times` times."""
    step = stepping.outer_step

    def spoilt(state, gradient, rule):
        after = step(state, gradient, rule)
        return replace(after, raw=damage(after.raw)) if state.iteration == at and state.halvings < times else after

    monkeypatch.setattr(stepping, "outer_step", spoilt)


def rollbacks_of(folder):
    file = folder / "rollbacks.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.fixture(scope="module")
def unbroken_run(store, tmp_path_factory):
    """Fixture: `unbroken_run(run, times)` returns the folder of a phase never killed that diverged `times` times."""
    folders = {}

    def unbroken_run(run, times):
        if (run, times) not in folders:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                diverge(patch, DAMAGE["not a number"][1], times=times)
                assert distil(run, store, folder)
            folders[run, times] = folder
        return folders[run, times]

    return unbroken_run


USUAL = {"steps": 2, "inner_dropout": "same_mask"}
"""Settings closer to those of users: several student steps, and the same dropout mask in both passes of the engine."""


@pytest.mark.parametrize(("name", "change"), [*((name, {}) for name in DAMAGE), ("not a number", USUAL)])
def test_a_diverged_phase_continues_from_its_last_good_state_at_half_the_rates(
    store, tmp_path, monkeypatch, name, change
):
    kind, damage, words = DAMAGE[name]
    distil(guarded(kind, **change), store, tmp_path / "until", kind=kind, **stop_after(4))
    good = State.load(tmp_path / "until" / "good.safetensors", "key")
    assert good.iteration == 4 and good.halvings == 0

    diverge(monkeypatch, damage)
    assert distil(guarded(kind, **change), store, tmp_path / "found", kind=kind)
    (line,) = rollbacks_of(tmp_path / "found")
    assert line["to"] == 4 and line["halvings"] == 1
    assert re.search(rf"phase 0, iteration 6 \(expert \d, start epoch \d\): .*{words}", line["why"])
    lines = lines_of(tmp_path / "found")
    assert [(m["iteration"], m["rollbacks"]) for m in lines] == [(i, int(i > 4)) for i in range(1, 8)]

    monkeypatch.undo()
    (tmp_path / "slow").mkdir()
    good.save(tmp_path / "slow" / "state.safetensors", "key")
    half = guarded(kind, **change, **{n: lr / 2 for n, lr in RATES.items()})
    assert distil(half, store, tmp_path / "slow", kind=kind)
    result, slow = (State.load(tmp_path / f / "state.safetensors", "key") for f in ("found", "slow"))
    assert result.halvings == 1 and result.iteration == slow.iteration == 7
    for part in ("raw", "average"):
        assert same_tensors(getattr(result, part).tensors(), getattr(slow, part).tensors())


def test_a_nan_loss_is_detected(store, tmp_path, monkeypatch):
    gradient, calls = matching.Matcher.gradient, []

    def spoilt(self, synthetic, drawn):
        result = gradient(self, synthetic, drawn)
        calls.append(1)
        return replace(result, loss=result.loss * torch.nan) if len(calls) == 3 else result

    monkeypatch.setattr(matching.Matcher, "gradient", spoilt)
    assert distil(guarded(skip_above=1e9), store, tmp_path)
    (line,) = rollbacks_of(tmp_path)
    assert line["to"] == 2 and "a loss, gradient or tensor stopped being finite" in line["why"]


def test_rates_are_halved_until_the_phase_is_stable(store, tmp_path):
    """Check a phase whose `lr_lr` is far too high: it diverges until `lr_lr` has been halved often enough."""
    assert distil(guarded(lr_lr=30.0, guard={"retries": 40}), store, tmp_path)
    state = State.load(tmp_path / "state.safetensors", "key")
    lines, back = lines_of(tmp_path), rollbacks_of(tmp_path)
    assert state.halvings == len(back) > 1 and [b["halvings"] for b in back] == list(range(1, len(back) + 1))
    assert [m["iteration"] for m in lines] == list(range(1, 8))
    assert 1e-3 < state.raw.lr_image < 10 and all(1e-3 < m["lr_image"] < 10 for m in lines)


def test_after_its_retries_it_fails_with_the_command_to_continue(store, tmp_path, monkeypatch):
    diverge(monkeypatch, DAMAGE["dead"][1], times=5)
    with pytest.raises(
        PhaseDiverged, match=r"3 rollbacks with halved learning rates did not help\. .*good.safetensors holds itera"
    ) as e:
        distil(guarded(), store, tmp_path)
    assert "holds iteration 4" in str(e.value) and "rmdd run RUN.yaml --set distill.guard.retries=7" in str(e.value)
    assert "phase 0, iteration 6 (expert" in str(e.value) and "no pair counts as positive" in str(e.value)
    assert [b["halvings"] for b in rollbacks_of(tmp_path)] == [1, 2, 3]
    good = State.load(tmp_path / "good.safetensors", "key")
    assert good.iteration == 4 and good.halvings == 3

    assert distil(guarded(guard={"retries": 7}), store, tmp_path), "two more halvings let the phase finish"
    assert [b["halvings"] for b in rollbacks_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [m["iteration"] for m in lines_of(tmp_path)] == list(range(1, 8))
    assert distil(guarded(guard={"retries": 7}), store, tmp_path / "at once")
    assert_same_results(tmp_path, tmp_path / "at once")


def test_no_retries_fail_at_once(store, tmp_path, monkeypatch):
    diverge(monkeypatch, DAMAGE["infinite"][1])
    with pytest.raises(PhaseDiverged, match=r"0 rollbacks .* --set distill.guard.retries=1"):
        distil(guarded(guard={"retries": 0}), store, tmp_path)
    assert not rollbacks_of(tmp_path)


@pytest.mark.parametrize("stop", [3, 6])
@pytest.mark.parametrize(("every", "change"), [(2, {}), (100, {}), (2, USUAL)])
def test_stopped_and_resumed_around_a_rollback_is_bit_identical(
    store, tmp_path, unbroken_run, monkeypatch, stop, every, change
):
    run = guarded(guard={"every": every}, **change)
    unbroken = unbroken_run(run, times=2)
    diverge(monkeypatch, DAMAGE["not a number"][1], times=2)
    assert not distil(run, store, tmp_path, **stop_after(stop))
    assert distil(run, store, tmp_path)
    assert_same_results(unbroken, tmp_path)
    assert rollbacks_of(unbroken) == rollbacks_of(tmp_path)
    assert [b["halvings"] for b in rollbacks_of(unbroken)] == [1, 2]


class Killed(BaseException):
    """Raised to end the distillation loop without any cleanup, as SIGKILL would."""


@pytest.mark.parametrize(
    ("checkpoint_every", "where"), [(5, 1), (5, 2), (5, 3), (100, 1), (100, 5), (100, 6), (100, 7)]
)
def test_killed_in_the_middle_of_a_rollback_is_bit_identical(
    store, tmp_path, unbroken_run, monkeypatch, where, checkpoint_every
):
    """Kill the process before each file write of the rollback in turn."""
    run = guarded(checkpoint_every=checkpoint_every)
    unbroken = unbroken_run(run, times=1)
    diverge(monkeypatch, DAMAGE["not a number"][1])
    writes, armed = [], []

    def counted(write):
        def maybe(*args):
            writes.append(1)
            if armed and len(writes) - armed[0] == where:
                raise Killed
            return write(*args)

        return maybe

    judge = loop.divergence_reason

    def arm(*args):
        result = judge(*args)
        if result:
            armed.append(len(writes))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop, "divergence_reason", arm)
        patch.setattr(loop, "append_jsonl", counted(loop.append_jsonl))
        patch.setattr(State, "save", counted(State.save))
        with pytest.raises(Killed):
            distil(run, store, tmp_path)
    assert distil(run, store, tmp_path)
    assert_same_results(unbroken, tmp_path)
    assert rollbacks_of(unbroken) == rollbacks_of(tmp_path)


def test_iterations_above_the_threshold_are_skipped_and_counted(store, tmp_path):
    distil(run_of(), store, tmp_path / "plain")
    losses = sorted(line["loss"] for line in lines_of(tmp_path / "plain"))

    assert distil(run_of(skip_above=losses[0] / 2), store, tmp_path / "none")
    state, initial_set = State.load(tmp_path / "none" / "state.safetensors", "key"), first_set().tensors()
    assert same_tensors(state.raw.tensors(), initial_set) and same_tensors(state.average.tensors(), initial_set)
    assert not state.momentum and state.iteration == 7
    lines = lines_of(tmp_path / "none")
    assert all(m["skipped"] and m["lr_image"] == pytest.approx(0.1) for m in lines) and len(lines) == 7

    assert distil(run_of(skip_above=losses[3]), store, tmp_path / "some")
    lines = lines_of(tmp_path / "some")
    assert [m["skipped"] for m in lines] == [m["loss"] > losses[3] for m in lines]
    assert 0 < sum(m["skipped"] for m in lines) < 7
    assert "skipped" not in lines_of(tmp_path / "plain")[0]


def test_a_skipped_step_does_not_count_as_divergence(store, tmp_path, monkeypatch):
    diverge(monkeypatch, DAMAGE["exploding rate"][1])
    assert distil(guarded(skip_above=1e-6), store, tmp_path)
    assert not rollbacks_of(tmp_path)


@pytest.mark.parametrize("kind", ["full", "low_rank", "identity"])
def test_health_numbers(kind):
    initial_set = first_set(kind, alpha=3.0)
    total, lr_image, lr_text, diagonal = health_numbers(initial_set, torch.tensor(2.0)).tolist()
    assert total == pytest.approx(2 + sum(float(t.sum()) for t in initial_set.tensors().values()), rel=1e-4)
    assert (lr_image, lr_text, diagonal) == pytest.approx((0.1, 0.1, 1.0))
    assert divergence_reason([total, lr_image, lr_text, diagonal], (0.1, 0.1), config.Distill()) is None


def test_the_diagonal_of_factors_equals_that_of_the_matrix():
    initial_set = first_set("low_rank", alpha=3.0)
    random = torch.Generator().manual_seed(2)
    parts = {n: torch.randn(t.shape, generator=random) for n, t in initial_set.similarity.items()}
    moved = replace(initial_set, similarity=parts)
    unbroken_run = torch.diag(parts["scale"]) + 3.0 / 2 * parts["left"] @ parts["right"].T
    assert health_numbers(moved, torch.tensor(0.0))[3].item() == pytest.approx(
        unbroken_run.diagonal().max().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("numbers", "rule", "healthy"),
    [
        ([1.0, 9.9, 0.1, 1.0], {}, True),
        ([1.0, 10.1, 0.1, 1.0], {}, False),
        ([1.0, 10.1, 0.1, 1.0], {"max_rate_growth": 200.0}, True),
        ([1.0, 0.1, 0.0011, 1.0], {}, True),
        ([1.0, 0.1, 0.0009, 1.0], {}, False),
        ([1.0, 0.1, 0.1, 0.5], {}, False),
        ([1.0, 0.1, 0.1, 0.5], {"dead_similarity": False}, True),
        ([float("inf"), 0.1, 0.1, 1.0], {}, False),
        ([float("nan"), 0.1, 0.1, 1.0], {"dead_similarity": False}, False),
    ],
)
def test_divergence_reasons(numbers, rule, healthy):
    judged = config.Distill(guard=config.Guard(**rule))
    assert (divergence_reason(numbers, (0.1, 0.1), judged) is None) == healthy


def test_the_dead_similarity_check_applies_to_wbce_only():
    assert divergence_reason([1.0, 0.1, 0.1, 0.2], (0.1, 0.1), config.Distill(loss="infonce")) is None
