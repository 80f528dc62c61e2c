"""The schedule of chained phases, against a simulation that runs one wave after the other."""

import itertools

import pytest

from rmdd import config
from rmdd.distill import chain


def rule_of(*iterations: int, lag: int | None = None, start: str = "student") -> config.Distill:
    phases = [{"pairs": 4, "iterations": count} for count in iterations]
    return config.Distill.model_validate({"phases": phases, "path_start": start, "path_lag": lag})


def simulated(iterations: list[int], lag: int) -> list[dict[int, tuple[int, int, tuple[int, ...]]]]:
    """Run waves until all phases are finished.

    Return for each wave, by phase: the updates before and after the wave, and the updates of the earlier phases when
    the wave begins.
    """
    made, result = [0] * len(iterations), []
    while made != iterations:
        wave, work = len(result), {}
        for p, total in enumerate(iterations):
            if wave >= p and made[p] < total:
                work[p] = (made[p], min(total, made[p] + lag), tuple(made[:p]))
        for p, (_, after, _) in work.items():
            made[p] = after
        result.append(work)
    return result


@pytest.mark.parametrize("lag", [1, 3, 5, 7, 100])
@pytest.mark.parametrize("iterations", [[6], [6, 6], [4, 9, 2], [9, 1, 5, 12]])
def test_the_schedule_equals_a_simulation(iterations, lag):
    rule = rule_of(*iterations, lag=lag)
    if len(iterations) == 1:
        assert chain.waves(rule) == 1 and chain.iterations_of_earlier_phases(rule, 0, 3) == ()
        return
    waves = simulated(iterations, lag)
    assert chain.waves(rule) == len(waves)
    ends: dict[int, list[int]] = {p: [] for p in range(len(iterations))}
    for wave, work in enumerate(waves):
        for p in range(len(iterations)):
            before, after = (chain.updates_after(rule, p, w) for w in (wave - 1, wave))
            assert (before < after) == (p in work)
            if p in work:
                assert (before, after) == work[p][:2]
                ends[p].append(after)
                for iteration in range(before, after):
                    assert chain.iterations_of_earlier_phases(rule, p, iteration) == work[p][2]
    assert ends == {p: chain.segment_ends(rule, p) for p in ends}


def test_without_a_lag_a_phase_starts_when_the_earlier_ones_are_finished():
    rule = rule_of(5, 8, 3)
    assert chain.waves(rule) == 3
    assert [[chain.updates_after(rule, p, wave) for p in range(3)] for wave in range(3)] == [
        [5, 0, 0],
        [5, 8, 0],
        [5, 8, 3],
    ]
    assert {chain.iterations_of_earlier_phases(rule, 2, i) for i in range(3)} == {(5, 8)}


def test_independent_phases_run_in_one_wave_and_have_no_sources():
    rule = rule_of(5, 8, start="theta_0")
    assert chain.waves(rule) == 1 and [chain.updates_after(rule, p, 0) for p in (0, 1)] == [5, 8]
    assert all(chain.iterations_of_earlier_phases(rule, p, i) == () for p, i in itertools.product((0, 1), range(8)))


def test_a_lag_takes_the_time_of_one_phase_plus_the_lags():
    phases, lag, total = 4, 10, 100
    waves = chain.waves(rule_of(*[total] * phases, lag=lag))
    assert waves * lag == total + (phases - 1) * lag
