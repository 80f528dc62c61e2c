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
"""The iteration that derails, counted from 0; states to go back to are kept at 2 and 4."""


def guarded(kind="full", **change):
    """A run with a guard. With one student step and fresh masks, the gradients are quicker to compute."""
    change = {"steps": 1, "inner_dropout": "fresh_mask"} | change
    guard = {"every": 2, "retries": 3} | change.pop("guard", {})
    return run_of(guard=guard, similarity={"kind": kind, "rank": 2}, **change)


def put(**tensors):
    """A damage: these tensors in the place of the set's."""
    return lambda raw: raw.with_tensors(raw.tensors() | {n: change(raw.tensors()[n]) for n, change in tensors.items()})


DAMAGE = {
    "not a number": (
        "full",
        put(images=lambda t: t.index_fill(0, torch.tensor([1]), torch.nan)),
        "stopped being finite",
    ),
    "infinite": ("identity", put(texts=lambda t: t / 0), "stopped being finite"),
    "exploding rate": ("full", put(lr_text=lambda t: t * 101), r"the inner text rate went from 0.1 to 1\d"),
    "vanishing rate": ("identity", put(lr_image=lambda t: t / 101), "the inner image rate went from 0.1 to 0.0009"),
    "negative rate": ("low_rank", put(lr_image=lambda t: -t), "the inner image rate went from 0.1 to -0"),
    "dead": ("full", put(**{"similarity.matrix": lambda t: t * 0.4}), "the similarity is dead: its largest diagonal"),
    "dead factors": ("low_rank", put(**{"similarity.scale": lambda t: t * 0.4}), "the similarity is dead"),
}


def derail(monkeypatch, damage, times=1, at=BAD):
    """Spoil what an iteration gives until the outer rates were halved so many times."""
    step = stepping.outer_step

    def spoilt(state, gradient, rule):
        after = step(state, gradient, rule)
        return replace(after, raw=damage(after.raw)) if state.iteration == at and state.halvings < times else after

    monkeypatch.setattr(stepping, "outer_step", spoilt)


def rollbacks_of(folder):
    file = folder / "rollbacks.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """`whole(run, times)`: the folder of a phase that derails `times` times and is never stopped, made once."""
    folders = {}

    def whole(run, times):
        if (run, times) not in folders:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                derail(patch, DAMAGE["not a number"][1], times=times)
                assert distil(run, store, folder)
            folders[run, times] = folder
        return folders[run, times]

    return whole


USUAL = {"steps": 2, "inner_dropout": "same_mask"}
"""Settings closer to those of users: several student steps, and the same dropout mask in both passes."""


@pytest.mark.parametrize(("name", "change"), [*((name, {}) for name in DAMAGE), ("not a number", USUAL)])
def test_a_derailed_phase_goes_on_from_its_last_good_state_at_half_the_rates(
    store, tmp_path, monkeypatch, name, change
):
    kind, damage, words = DAMAGE[name]
    distil(guarded(kind, **change), store, tmp_path / "until", kind=kind, **stop_after(4))
    good = State.load(tmp_path / "until" / "good.safetensors", "key")
    assert good.iteration == 4 and good.halvings == 0

    derail(monkeypatch, damage)
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
    found, slow = (State.load(tmp_path / f / "state.safetensors", "key") for f in ("found", "slow"))
    assert found.halvings == 1 and found.iteration == slow.iteration == 7
    for part in ("raw", "average"):
        assert same_tensors(getattr(found, part).tensors(), getattr(slow, part).tensors())


def test_a_loss_that_is_no_number_is_caught(store, tmp_path, monkeypatch):
    gradient, seen = matching.Matcher.gradient, []

    def spoilt(self, synthetic, drawn):
        found = gradient(self, synthetic, drawn)
        seen.append(1)
        return replace(found, loss=found.loss * torch.nan) if len(seen) == 3 else found

    monkeypatch.setattr(matching.Matcher, "gradient", spoilt)
    assert distil(guarded(skip_above=1e9), store, tmp_path)
    (line,) = rollbacks_of(tmp_path)
    assert line["to"] == 2 and "a loss, gradient or tensor stopped being finite" in line["why"]


def test_rates_that_are_too_high_are_halved_until_it_goes(store, tmp_path):
    """Nothing is spoilt here: the rate of the inner rates is far too high to begin with."""
    assert distil(guarded(lr_lr=30.0, guard={"retries": 40}), store, tmp_path)
    state = State.load(tmp_path / "state.safetensors", "key")
    lines, back = lines_of(tmp_path), rollbacks_of(tmp_path)
    assert state.halvings == len(back) > 1 and [b["halvings"] for b in back] == list(range(1, len(back) + 1))
    assert [m["iteration"] for m in lines] == list(range(1, 8))
    assert 1e-3 < state.raw.lr_image < 10 and all(1e-3 < m["lr_image"] < 10 for m in lines)


def test_after_its_retries_it_fails_with_the_command_to_go_on(store, tmp_path, monkeypatch):
    derail(monkeypatch, DAMAGE["dead"][1], times=5)
    with pytest.raises(
        PhaseDiverged, match=r"3 rollbacks with halved rates did not help\. .*good.safetensors holds itera"
    ) as e:
        distil(guarded(), store, tmp_path)
    assert "holds iteration 4" in str(e.value) and "rmdd run RUN.yaml --set distill.guard.retries=7" in str(e.value)
    assert "phase 0, iteration 6 (expert" in str(e.value) and "the similarity is dead" in str(e.value)
    assert [b["halvings"] for b in rollbacks_of(tmp_path)] == [1, 2, 3]
    good = State.load(tmp_path / "good.safetensors", "key")
    assert good.iteration == 4 and good.halvings == 3

    assert distil(guarded(guard={"retries": 7}), store, tmp_path), "two more halvings are enough"
    assert [b["halvings"] for b in rollbacks_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [m["iteration"] for m in lines_of(tmp_path)] == list(range(1, 8))
    assert distil(guarded(guard={"retries": 7}), store, tmp_path / "at once")
    assert_same_results(tmp_path, tmp_path / "at once")


def test_no_retries_fail_at_once(store, tmp_path, monkeypatch):
    derail(monkeypatch, DAMAGE["infinite"][1])
    with pytest.raises(PhaseDiverged, match=r"0 rollbacks .* --set distill.guard.retries=1"):
        distil(guarded(guard={"retries": 0}), store, tmp_path)
    assert not rollbacks_of(tmp_path)


@pytest.mark.parametrize("stop", [3, 6])
@pytest.mark.parametrize(("every", "change"), [(2, {}), (100, {}), (2, USUAL)])
def test_stopped_and_resumed_around_a_rollback_has_the_bits_of_unbroken(
    store, tmp_path, whole, monkeypatch, stop, every, change
):
    run = guarded(guard={"every": every}, **change)
    unbroken = whole(run, times=2)
    derail(monkeypatch, DAMAGE["not a number"][1], times=2)
    assert not distil(run, store, tmp_path, **stop_after(stop))
    assert distil(run, store, tmp_path)
    assert_same_results(unbroken, tmp_path)
    assert rollbacks_of(unbroken) == rollbacks_of(tmp_path)
    assert [b["halvings"] for b in rollbacks_of(unbroken)] == [1, 2]


class Killed(BaseException):
    """Ends the loop without a chance to tidy up, like SIGKILL does."""


@pytest.mark.parametrize(
    ("checkpoint_every", "where"), [(5, 1), (5, 2), (5, 3), (100, 1), (100, 5), (100, 6), (100, 7)]
)
def test_killed_in_the_middle_of_a_rollback_has_the_bits_of_unbroken(
    store, tmp_path, whole, monkeypatch, where, checkpoint_every
):
    """Killed before one of the writes of the rollback, each in turn."""
    run = guarded(checkpoint_every=checkpoint_every)
    unbroken = whole(run, times=1)
    derail(monkeypatch, DAMAGE["not a number"][1])
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
        found = judge(*args)
        if found:
            armed.append(len(writes))
        return found

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
    state, begun = State.load(tmp_path / "none" / "state.safetensors", "key"), first_set().tensors()
    assert same_tensors(state.raw.tensors(), begun) and same_tensors(state.average.tensors(), begun)
    assert not state.momentum and state.iteration == 7
    lines = lines_of(tmp_path / "none")
    assert all(m["skipped"] and m["lr_image"] == pytest.approx(0.1) for m in lines) and len(lines) == 7

    assert distil(run_of(skip_above=losses[3]), store, tmp_path / "some")
    lines = lines_of(tmp_path / "some")
    assert [m["skipped"] for m in lines] == [m["loss"] > losses[3] for m in lines]
    assert 0 < sum(m["skipped"] for m in lines) < 7
    assert "skipped" not in lines_of(tmp_path / "plain")[0]


def test_what_a_skipped_step_would_have_done_is_no_derailment(store, tmp_path, monkeypatch):
    derail(monkeypatch, DAMAGE["exploding rate"][1])
    assert distil(guarded(skip_above=1e-6), store, tmp_path)
    assert not rollbacks_of(tmp_path)


@pytest.mark.parametrize("kind", ["full", "low_rank", "identity"])
def test_vitals(kind):
    begun = first_set(kind, alpha=3.0)
    total, lr_image, lr_text, diagonal = health_numbers(begun, torch.tensor(2.0)).tolist()
    assert total == pytest.approx(2 + sum(float(t.sum()) for t in begun.tensors().values()), rel=1e-4)
    assert (lr_image, lr_text, diagonal) == pytest.approx((0.1, 0.1, 1.0))
    assert divergence_reason([total, lr_image, lr_text, diagonal], (0.1, 0.1), config.Distill()) is None


def test_the_diagonal_of_factors_is_the_printed_one():
    begun = first_set("low_rank", alpha=3.0)
    random = torch.Generator().manual_seed(2)
    parts = {n: torch.randn(t.shape, generator=random) for n, t in begun.similarity.items()}
    moved = replace(begun, similarity=parts)
    whole = torch.diag(parts["scale"]) + 3.0 / 2 * parts["left"] @ parts["right"].T
    assert health_numbers(moved, torch.tensor(0.0))[3].item() == pytest.approx(whole.diagonal().max().item(), rel=1e-5)


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
def test_what_is_wrong(numbers, rule, healthy):
    judged = config.Distill(guard=config.Guard(**rule))
    assert (divergence_reason(numbers, (0.1, 0.1), judged) is None) == healthy


def test_other_losses_know_no_positives():
    assert divergence_reason([1.0, 0.1, 0.1, 0.2], (0.1, 0.1), config.Distill(loss="infonce")) is None
