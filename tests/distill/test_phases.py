import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd import config
from rmdd.distill.phases import draw, mini_batches


def rule(**change):
    phases = (config.Phase(pairs=9, start=0, stop=2), config.Phase(pairs=7, start=1, stop=4))
    return config.Distill(**{"phases": phases, "batch": 3, "steps": 4, **change})


def same(a, b):
    return (a.expert, a.start, a.dropout_seeds) == (b.expert, b.start, b.dropout_seeds) and torch.equal(
        a.batches, b.batches
    )


def test_a_draw_depends_on_seed_phase_and_iteration_alone():
    seen = [draw(rule(), 0, i, 4, seed=5) for i in range(6)]
    torch.manual_seed(123)
    backwards = [draw(rule(), 0, i, 4, seed=5) for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(seen, backwards, strict=True))
    for other in (draw(rule(), 0, 3, 4, seed=6), draw(rule(), 1, 3, 4, seed=5), draw(rule(), 0, 2, 4, seed=5)):
        assert not same(seen[3], other)
        assert not set(other.dropout_seeds) & set(seen[3].dropout_seeds)


def test_what_other_phases_are_does_not_matter():
    alone = rule(phases=(config.Phase(pairs=9, start=0, stop=2),))
    assert all(same(draw(rule(), 0, i, 4, 5), draw(alone, 0, i, 4, 5)) for i in range(5))


@settings(deadline=None, max_examples=20)
@given(experts=st.integers(1, 7), phase=st.integers(0, 1), seed=st.integers(0, 2**32))
def test_every_expert_comes_once_a_turn(experts, phase, seed):
    order = [draw(rule(), phase, i, experts, seed).expert for i in range(3 * experts)]
    for turn in range(3):
        assert sorted(order[turn * experts : (turn + 1) * experts]) == list(range(experts))


def test_turns_are_shuffled():
    turns = {tuple(draw(rule(), 0, 5 * turn + i, 5, 0).expert for i in range(5)) for turn in range(6)}
    assert len(turns) > 3


@pytest.mark.parametrize(("start_rule", "expected"), [("exclusive", {1, 2, 3}), ("inclusive", {1, 2, 3, 4})])
def test_starts_cover_the_range(start_rule, expected):
    starts = [draw(rule(start_rule=start_rule), 1, i, 2, 0).start for i in range(300)]
    assert set(starts) == expected
    assert all(starts.count(s) > 300 / len(expected) / 2 for s in expected)


def test_batches_of_the_published_setting():
    """99 pairs, batches of 20, 8 steps: two permutations of four batches, 19 pairs idle in each."""
    batches = mini_batches(99, 20, 8, torch.Generator().manual_seed(0))
    assert batches.shape == (8, 20)
    for turn in (batches[:4], batches[4:]):
        assert len(turn.unique()) == 80
    assert set(batches[:4].flatten().tolist()) != set(batches[4:].flatten().tolist())


@settings(deadline=None, max_examples=40)
@given(data=st.data(), pairs=st.integers(2, 30), steps=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_batches_are_cut_from_permutations(data, pairs, steps, seed):
    batch = data.draw(st.integers(2, pairs))
    rows = mini_batches(pairs, batch, steps, torch.Generator().manual_seed(seed))
    assert rows.shape == (steps, batch) and rows.min() >= 0 and rows.max() < pairs
    whole = pairs // batch
    for i in range(0, steps, whole):
        turn = rows[i : i + whole].flatten()
        assert len(turn.unique()) == len(turn)
