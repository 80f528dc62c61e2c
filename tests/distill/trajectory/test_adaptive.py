"""Check how adaptive ranges and endpoints move, and that a killed phase resumes with bit-identical results."""

import math
from dataclasses import replace

import pytest
import torch
from toy import CPU, EPOCHS, PAIRS, assert_same_results, distil, encoder, first_set, lines_of, run_of, stop_after

from rmdd import config
from rmdd.distill.loop import State
from rmdd.distill.phases import Window
from rmdd.distill.trajectory import stepping
from rmdd.distill.trajectory.adaptive import adapted
from rmdd.distill.trajectory.matching import Matcher
from rmdd.distill.trajectory.statistics import probe, straightness
from rmdd.methods import matching_method


def moving(stop=1, endpoint=2, iterations=5, **plan):
    """Return a run with `phases: adaptive`. It is fast, because its students take only one step."""
    phase = config.Phase(pairs=PAIRS, start=0, stop=stop, endpoint=endpoint, iterations=iterations)
    rule = {"kind": "adaptive", "every": 2, "pace": 0.5, "experts": 1, **plan}
    return run_of(phases=(phase,), plan=config.Plan(**rule), steps=1, inner_dropout="fresh_mask")


def windows(run, store, iterations):
    """Keep the synthetic set constant; return the window (range of start epochs, and endpoint) of each update."""
    matcher, state, result = (
        Matcher(matching_method(run), 0, store, encoder(run.model), CPU),
        State.begin(first_set()),
        [],
    )
    for iteration in range(iterations):
        state.iteration = iteration
        state = adapted(matcher, state)
        assert matcher.ranges["image"] == matcher.ranges["text"] == state.window[:2]
        assert matcher.path(matcher.experts[0]).endpoint == state.window.endpoint
        result.append(state.window)
    return result


def test_a_range_grows_while_gradients_agree_and_moves_the_endpoint(store):
    result = windows(moving(agreement=-1), store, 6)
    grown = [Window(0, 1, 2), Window(0, 1.5, 3), Window(0, 2, 3)]
    assert result == [grown[0]] * 2 + [grown[1]] * 2 + [grown[2]] * 2, "no target lies after epoch 3, the last epoch"


def test_a_range_stays_when_no_gradient_asks_for_a_move(store):
    result = windows(moving(stop=2, endpoint=3, agreement=1), store, 3)
    run = moving(stop=2, endpoint=3)
    matcher = Matcher(matching_method(run), 0, store, encoder(run.model), CPU)
    matcher.set_window(Window(0.0, 2.0, 3))
    opposed = float(probe(matcher, first_set(), [1.0, 2.0], experts=1).agreement()[0, 1]) < 0
    assert result == [Window(0, 2, 3)] * 2 + [Window(0, 1.5 if opposed else 2, 3)]


def test_endpoints_are_among_those_of_the_plan(store):
    assert {w.endpoint for w in windows(moving(agreement=-1, endpoints=(2,)), store, 3)} == {2}


def test_starts_are_drawn_from_the_window(store, tmp_path):
    run = moving(agreement=-1, iterations=8)
    assert distil(run, store, tmp_path)
    lines = lines_of(tmp_path)
    assert all(line["low"] <= line["start"] < line["stop"] <= line["endpoint"] - 1 for line in lines)
    assert lines[0]["stop"] == 1 and lines[-1]["stop"] == 2 and lines[-1]["endpoint"] == EPOCHS
    assert any(line["start"] % 1 for line in lines)


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert distil(moving(agreement=-1), store, folder)
    return folder


@pytest.mark.parametrize("first", [2, 3])
def test_a_stopped_phase_resumes_bit_identically(store, tmp_path, unbroken, first):
    """Stop a phase right before or right after its range of start epochs moves; then resume it."""
    run = moving(agreement=-1)
    assert not distil(run, store, tmp_path, **stop_after(first))
    assert distil(run, store, tmp_path)
    assert_same_results(unbroken, tmp_path)


def test_a_rollback_restores_the_window(store, tmp_path, monkeypatch):
    """Compare two phases that diverge right after their range moves; only one is stopped after the rollback."""
    monkeypatch.setattr(stepping, "outer_step", _spoilt(stepping.outer_step, at=4))
    run = moving(agreement=-1, iterations=7, pace=0.25)
    run = run.model_copy(update={"distill": run.distill.model_copy(update={"guard": config.Guard(every=3)})})
    assert distil(run, store, tmp_path / "whole")
    assert not distil(run, store, tmp_path / "parts", **stop_after(6))
    assert distil(run, store, tmp_path / "parts")
    assert_same_results(tmp_path / "whole", tmp_path / "parts")
    lines = lines_of(tmp_path / "whole")
    assert [line["iteration"] for line in lines] == list(range(1, 8)) and lines[-1]["rollbacks"] == 1
    assert [line["stop"] for line in lines] == [1, 1, 1.25, 1.25, 1.5, 1.5, 1.75]


def _spoilt(step, at):
    """Return an outer step that makes the phase diverge once, in iteration `at`."""

    def once(state, gradient, rule):
        after = step(state, gradient, rule)
        if state.iteration != at or state.halvings:
            return after
        return replace(after, raw=after.raw.with_tensors({**after.raw.tensors(), "lr_text": torch.tensor(99.0)}))

    return once


def test_the_endpoint_never_moves_to_a_bent_shortcut(store):
    straight = {e: straightness(store, [0], e) for e in (2, 3)}
    assert straight[3] < straight[2], "a random walk"
    between = (straight[2] + straight[3]) / 2
    assert {w.endpoint for w in windows(moving(agreement=-1, min_straightness=between), store, 4)} == {2}
    assert {w.endpoint for w in windows(moving(agreement=-1, min_straightness=0), store, 4)} == {2, 3}


@pytest.mark.parametrize("reuse_graphs", [0, 2])
def test_moves_follow_the_slow_cosines(make, reuse_graphs):
    """Compute gradients one by one in float64, for several sets; check that the bounds move as their cosines demand."""
    phases = (config.Phase(pairs=PAIRS, stop=1, endpoint=2), config.Phase(pairs=PAIRS, start=1, stop=2, endpoint=3))
    plan = config.Plan(kind="adaptive", every=1, pace=0.25, agreement=0.5, experts=2)
    rule = {"steps": 2, "inner_dropout": "off", "estimator": "exact", "reuse_graphs": reuse_graphs}
    made = make(run_of(phases=phases, plan=plan, **rule), 1)
    moves = set()
    for i in range(8):
        raw = made.begun.map(lambda t, i=i: t * (1 + 0.3 * i) if t.ndim else t)
        raw = raw.with_tensors({**raw.tensors(), "images": raw.images.roll(i, 2)})
        low, stop = 0.5 + 0.05 * i, 1.75
        now = Window(low, stop, 3)
        state = State(1, raw, raw, {}, window=now)

        def gradients(t, raw=raw):
            parts = {"images": 0, "texts": 0}
            for expert in (0, 1):
                drawn = replace(made.matcher.draw(0), expert=expert, start=t, start_text=t)
                result = made.matcher.gradient(raw, drawn, estimator="first_order").gradient
                parts = {"images": parts["images"] + result.images, "texts": parts["texts"] + result.texts}
            return parts

        made.matcher.set_window(now)
        ends = [gradients(t) for t in ((low + stop) / 2, low, low - 0.25, stop, 2.0)]
        cosine = [
            sum(
                float((a[p] * b[p]).sum()) / math.sqrt(float((a[p] ** 2).sum() * (b[p] ** 2).sum()))
                for p in ("images", "texts")
            )
            / 2
            for a, b in ((ends[0], other) for other in ends[1:])
        ]
        wanted = [low, stop]
        if cosine[3] >= 0.5:
            wanted[1] = 2.0
        elif cosine[2] < 0:
            wanted[1] = max(stop - 0.25, min(stop, low + 1))
        if cosine[1] >= 0.5:
            wanted[0] = low - 0.25
        elif cosine[0] < 0:
            wanted[0] = min(low + 0.25, max(low, wanted[1] - 1))
        assert adapted(made.matcher, state).window[:2] == pytest.approx(wanted)
        moves.add((wanted[0] != low, wanted[1] != stop))
    assert len(moves) > 1


def test_a_checkpoint_has_the_window(store, tmp_path):
    distil(moving(agreement=-1), store, tmp_path, **stop_after(3))
    state = State.load(tmp_path / "state.safetensors", "key")
    assert state.window == Window(0, 1.5, 3) and state.to(CPU).window == state.window
    assert torch.isfinite(state.raw.images).all()
