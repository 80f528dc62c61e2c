"""LoRS: gradients compared with the formula of TESLA's two passes, and the initial similarity."""

import pytest
import torch
from slow import assert_equals_slow, plain_loss, segment, two_passes, wbce
from toy import method_run

from rmdd.distill.similarity import dense


def check(make, merged=False, merged_rates=None, **changes):
    setup = make(method_run("lors", **changes))

    def gradient_of(leaves, drawn):
        loss = plain_loss(setup.model, wbce)
        return two_passes(loss, *segment(setup, drawn), leaves, setup.begun.alpha, drawn.batches, merged, merged_rates)

    assert_equals_slow(setup, gradient_of)


@pytest.mark.parametrize("diagonal", ["vector", "scalar"])
def test_equals_the_formula_of_the_two_passes(make, diagonal):
    check(make, similarity={"diagonal": diagonal})


@pytest.mark.parametrize(("rates", "merged_rates"), [("same", True), ("separate", False)])
def test_merged_branches_share_a_denominator_except_with_separate_rate_branches(make, rates, merged_rates):
    check(make, merged=True, merged_rates=merged_rates, branches="merged", options={"rate_branches": rates})


def test_another_temperature_in_the_inner_steps(make):
    setup = make(method_run("lors", temperature=0.25))
    drawn = setup.matcher.draw(0)
    result = setup.matcher.gradient(setup.begun, drawn)
    leaves = {n: t.requires_grad_() for n, t in setup.begun.tensors().items()}
    setup.model.temperature = 0.25  # `plain_loss` reads the temperature of the model
    wanted = two_passes(plain_loss(setup.model, wbce), *segment(setup, drawn), leaves, setup.begun.alpha, drawn.batches)
    for name, t in result.gradient.tensors().items():
        torch.testing.assert_close(t, wanted[name].detach(), rtol=1e-9, atol=1e-12)


def test_it_starts_at_the_identity_and_learns_relations(make):
    setup = make(method_run("lors"))
    assert setup.begun.alpha == 3.0
    s = dense(setup.begun.similarity, setup.begun.alpha, setup.begun.texts)
    assert torch.equal(s, torch.eye(setup.begun.pairs, dtype=torch.float64))
