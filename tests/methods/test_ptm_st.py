"""PTM-ST: presets, the ablations of Table 4, and the matching loop compared with a slow float64 implementation."""

import pytest
import torch
from slow import fast_loop, full_unroll, outer_loop, plain_loss, segment, shortcut, two_passes, wbce
from toy import method_run

from rmdd import config
from rmdd.methods.ptm_st import without

FLICKR30K = [f"flickr30k_ptm_st_{budget}" for budget in (100, 200, 500, 1000)]


def load(name):
    return config.load(name, ["data.root=somewhere"])


@pytest.mark.parametrize("name", FLICKR30K)
def test_the_presets_follow_the_range_rule(name):
    plan = load(name).distill.phases
    for p, phase in enumerate(plan):
        assert (phase.start, phase.stop) == (plan[0].start + p, plan[0].stop + p)
        assert phase.endpoint == (6, 8, 10)[p]
        assert phase.stop <= phase.endpoint


@pytest.mark.parametrize("ptm", [False, True])
@pytest.mark.parametrize("st", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_every_row_of_table_4(ptm, st, ema):
    run = load("flickr30k_ptm_st_500")
    row = without(run, ptm=not ptm, st=not st, ema=not ema)
    first = run.distill.phases[0]
    merged = (first.model_copy(update={"pairs": sum(p.pairs for p in run.distill.phases)}),)
    assert row.distill.phases == (run.distill.phases if ptm else merged)
    assert row.distill.trajectory == ("shortcut" if st else "original")
    assert row.experts.keep == ("endpoints" if st else "all")
    assert row.distill.ema == (0.99 if ema else 0.0)
    switched = {"distill": {"phases", "trajectory", "ema"}, "experts": {"keep"}}
    assert row.model_dump(exclude=switched) == run.model_dump(exclude=switched)
    assert (row == run) == (ptm and st and ema)


def test_without_does_not_change_its_argument():
    run = load("flickr30k_ptm_st_200")
    before = run.model_dump_json()
    without(run, ptm=True, st=True, ema=True)
    assert run.model_dump_json() == before


PLAN = [
    {"pairs": 6, "start": 0, "stop": 2, "endpoint": 2, "iterations": 4},
    {"pairs": 5, "start": 1, "stop": 3, "endpoint": 3, "iterations": 4},
]


def assert_equals_slow_loop(setup, phase, gradients):
    """Compare the matching loop with a slow one: path by eq. 4-5, gradient by `gradients`, torch SGD, EMA by eq. 7."""
    rule = setup.run.distill
    loss, plan = plain_loss(setup.model, wbce), rule.phases[phase]

    def gradient_of(leaves, iteration):
        drawn = setup.matcher.draw(iteration)
        assert plan.start <= drawn.start < plan.stop
        start, target = segment(setup, drawn) if rule.trajectory == "original" else straight(drawn)
        return gradients(loss, start, target, leaves, 1.0, drawn.batches)

    def straight(drawn):
        expert = setup.matcher.experts[drawn.expert]
        return [shortcut(setup.store, expert, plan.endpoint, drawn.start + ahead) for ahead in (0, 1)]

    average = setup.begun.tensors()
    slow = outer_loop(setup.begun, rule, gradient_of, 3)
    for state, wanted in zip(fast_loop(setup, 3), slow, strict=True):
        average = {n: rule.ema * a + (1 - rule.ema) * wanted[n] for n, a in average.items()}
        for name, t in wanted.items():
            torch.testing.assert_close(state.raw.tensors()[name], t, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(state.average.tensors()[name], average[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ptm", [False, True])
@pytest.mark.parametrize("st", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_every_row_of_table_4_equals_the_slow_loop(make, ptm, st, ema):
    """Compare each phase of each row of Table 4 with the slow loop; a row without PTM has one phase."""
    run = method_run("ptm_st", phases=PLAN, ema=0.9, inner_dropout="off")
    row = without(run, ptm=not ptm, st=not st, ema=not ema)
    assert len(row.distill.phases) == 1 + ptm and row.distill.ema == (0.9 if ema else 0.0)
    for phase in range(len(row.distill.phases)):
        setup = make(row, phase)
        assert setup.begun.similarity.keys() == {"matrix"}
        assert_equals_slow_loop(setup, phase, two_passes)


def test_the_exact_gradient_is_one_setting_away(make):
    setup = make(method_run("ptm_st", phases=PLAN, estimator="exact"), 1)
    assert_equals_slow_loop(setup, 1, full_unroll)
