"""Ranges and endpoints that move: where to, and the same bits after a kill."""

import pytest
import torch
from toy import CPU, EPOCHS, PAIRS, assert_same_results, distil, encoder, first_set, lines_of, run_of, stop_after

from rmdd import config
from rmdd.distill.adaptive import adapted
from rmdd.distill.matching import Matcher, State
from rmdd.distill.phases import Window
from rmdd.distill.signals import probe


def moving(stop=1, endpoint=2, iterations=5, **plan):
    """One student step with fresh masks, whose gradients take reverse mode, the quicker one at this size."""
    phase = config.Phase(pairs=PAIRS, start=0, stop=stop, endpoint=endpoint, iterations=iterations)
    rule = {"kind": "adaptive", "every": 2, "pace": 0.5, "experts": 1, **plan}
    return run_of(phases=(phase,), plan=config.Plan(**rule), steps=1, inner_dropout="fresh_mask")


def windows(run, store, iterations):
    """The window of each update, the set standing still."""
    matcher, state, found = Matcher(run, 0, store, encoder(run.model), CPU), State.begin(first_set()), []
    for iteration in range(iterations):
        state.iteration = iteration
        state = adapted(matcher, state)
        assert matcher.ranges["image"] == matcher.ranges["text"] == state.window[:2]
        assert matcher.path(matcher.experts[0]).endpoint == state.window.endpoint
        found.append(state.window)
    return found


def test_a_range_grows_while_all_agrees_and_takes_the_endpoint_along(store):
    found = windows(moving(agreement=-1), store, 6)
    grown = [Window(0, 1, 2), Window(0, 1.5, 3), Window(0, 2, 3)]
    assert found == [grown[0]] * 2 + [grown[1]] * 2 + [grown[2]] * 2, "the experts end at 3, and targets are one ahead"


def test_a_range_stands_where_nothing_beyond_agrees_and_nothing_within_opposes(store):
    found = windows(moving(stop=2, endpoint=3, agreement=1), store, 3)
    run = moving(stop=2, endpoint=3)
    matcher = Matcher(run, 0, store, encoder(run.model), CPU)
    matcher.look_through(Window(0.0, 2.0, 3))
    opposed = float(probe(matcher, first_set(), [1.0, 2.0], experts=1).agreement()[0, 1]) < 0
    assert found == [Window(0, 2, 3)] * 2 + [Window(0, 1.5 if opposed else 2, 3)]


def test_endpoints_are_among_those_of_the_plan(store):
    assert {w.endpoint for w in windows(moving(agreement=-1, endpoints=(2,)), store, 3)} == {2}


def test_starts_are_drawn_from_the_window(store, tmp_path):
    run = moving(agreement=-1, iterations=8)
    assert distil(run, store, tmp_path)
    lines = lines_of(tmp_path)
    assert all(line["low"] <= line["start"] < line["stop"] <= line["endpoint"] - 1 for line in lines)
    assert lines[0]["stop"] == 1 and lines[-1]["stop"] == 2 and lines[-1]["endpoint"] == EPOCHS
    assert any(line["start"] % 1 for line in lines)


@pytest.mark.parametrize("first", [2, 3])
def test_a_stopped_phase_goes_on_with_the_same_bits(store, tmp_path, first):
    """Stopped right before a move, and right after it."""
    run = moving(agreement=-1)
    assert distil(run, store, tmp_path / "whole")
    assert not distil(run, store, tmp_path / "parts", **stop_after(first))
    assert distil(run, store, tmp_path / "parts")
    assert_same_results(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_has_the_window(store, tmp_path):
    distil(moving(agreement=-1), store, tmp_path, **stop_after(3))
    state = State.load(tmp_path / "state.safetensors", "key")
    assert state.window == Window(0, 1.5, 3) and state.to(CPU).window == state.window
    assert torch.isfinite(state.raw.images).all()
