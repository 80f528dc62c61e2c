"""DATM: the growing range of start epochs, and updates compared with those of LoRS in float64."""

import pytest
from slow import assert_equals_slow, plain_loss, segment, two_passes, wbce
from toy import PAIRS, method_run

from rmdd import config
from rmdd.methods.datm import growing_stop

RAMP = {"pairs": PAIRS, "start": 0, "stop": 3, "grow_from": 1, "grow_until": 40, "endpoint": 3, "iterations": 60}


def ramp(low, first, last, until, iteration):
    """Return the paper's exclusive bound U(i) for i = `iteration`, and the allowed start epochs `low` to U(i) - 1."""
    bound = first
    while bound < last and (bound + 1 - first) * until <= (last - first) * iteration:
        bound += 1
    return bound, list(range(low, bound))


@pytest.mark.parametrize(("low", "first", "last", "until"), [(0, 1, 3, 40), (1, 2, 8, 7), (2, 4, 4, 5), (0, 2, 4, 3)])
def test_the_bound_grows_as_in_the_paper(low, first, last, until):
    phase = config.Phase(pairs=4, start=low, stop=last, grow_from=first, grow_until=until, endpoint=last)
    for iteration in range(2 * until):
        assert growing_stop(phase, last, iteration) == ramp(low, first, last, until, iteration)[0]
    assert growing_stop(phase, last, 0) == first and growing_stop(phase, last, until) == last


def test_a_bound_below_the_ramp_stays():
    """A start range that ends at or below `grow_from` must not grow; ranges computed by a method can be so short."""
    assert {growing_stop(config.Phase(pairs=4, stop=5, grow_from=3, grow_until=4), 2, i) for i in range(20)} == {2}


def test_a_phase_that_does_not_grow_keeps_its_bound():
    assert {growing_stop(config.Phase(pairs=4, stop=3), 3, i) for i in range(50)} == {3}


def test_starts_come_from_the_range_of_their_iteration(make):
    matcher = make(method_run("datm", phases=[RAMP])).matcher
    starts = {}
    for iteration in range(400):
        drawn = matcher.draw(iteration)
        bound, allowed = ramp(0, 1, 3, 40, iteration)
        assert drawn.start == drawn.start_text and drawn.start in allowed
        starts.setdefault(bound, set()).add(drawn.start)
    assert starts == {1: {0}, 2: {0, 1}, 3: {0, 1, 2}}


def test_equals_the_two_passes_of_lors_on_a_growing_range(make):
    quick = RAMP | {"grow_until": 4, "iterations": 6}
    setup = make(method_run("datm", phases=[quick]))
    loss = plain_loss(setup.model, wbce)

    def gradient_of(leaves, drawn):
        return two_passes(loss, *segment(setup, drawn), leaves, setup.begun.alpha, drawn.batches)

    assert_equals_slow(setup, gradient_of, iterations=6)


def test_an_invalid_ramp_is_rejected():
    for change, words in (
        ({"grow_until": None}, "set both or neither"),
        ({"start": 1}, "grow_from 1 must be above start 1"),
        ({"start_text": 1}, "grow_from 1 must be above start_text 1"),
        ({"grow_from": 4}, "at most stop 3"),
    ):
        with pytest.raises(config.ConfigError, match=words):
            method_run("datm", phases=[RAMP | change])
