"""LoRS: gradients compared with the formula of the two passes, and the initial similarity."""

import pytest
import torch
from slow import assert_equals_slow, plain_loss, segment, two_passes, wbce
from toy import method_run

from rmdd.distill.similarity import dense


def check(make, merged=False, merged_rates=None, **changes):
    made = make(method_run("lors", **changes))

    def gradient_of(leaves, drawn):
        loss = plain_loss(made.model, wbce)
        return two_passes(loss, *segment(made, drawn), leaves, made.begun.alpha, drawn.batches, merged, merged_rates)

    assert_equals_slow(made, gradient_of)


@pytest.mark.parametrize("diagonal", ["vector", "scalar"])
def test_equals_the_formula_of_the_two_passes(make, diagonal):
    check(make, similarity={"diagonal": diagonal})


@pytest.mark.parametrize(("rates", "merged_rates"), [("same", True), ("separate", False)])
def test_merged_branches_share_a_denominator_except_with_separate_rate_branches(make, rates, merged_rates):
    check(make, merged=True, merged_rates=merged_rates, branches="merged", options={"rate_branches": rates})


def test_another_temperature_in_the_inner_steps(make):
    made = make(method_run("lors", temperature=0.25))
    drawn = made.matcher.draw(0)
    result = made.matcher.gradient(made.begun, drawn)
    leaves = {n: t.requires_grad_() for n, t in made.begun.tensors().items()}
    made.model.temperature = 0.25  # the slow version reads the temperature from the model
    wanted = two_passes(plain_loss(made.model, wbce), *segment(made, drawn), leaves, made.begun.alpha, drawn.batches)
    for name, t in result.gradient.tensors().items():
        torch.testing.assert_close(t, wanted[name].detach(), rtol=1e-9, atol=1e-12)


def test_it_starts_at_the_identity_and_learns_relations(make):
    made = make(method_run("lors"))
    assert made.begun.alpha == 3.0
    s = dense(made.begun.similarity, made.begun.alpha, made.begun.texts)
    assert torch.equal(s, torch.eye(made.begun.pairs, dtype=torch.float64))
