"""TESLA-VL: gradients compared with the formula of TESLA's two passes and with the full unroll."""

from slow import assert_equals_slow, full_unroll, plain_loss, segment, two_passes, wbce
from toy import method_run


def test_equals_the_formula_of_the_two_passes(make):
    setup = make(method_run("tesla_vl"))
    loss = plain_loss(setup.model, wbce)
    assert not setup.begun.similarity
    assert_equals_slow(
        setup, lambda leaves, drawn: two_passes(loss, *segment(setup, drawn), leaves, 1.0, drawn.batches)
    )


def gap(make, steps):
    """Return how far the estimated gradient of the images is from the gradient of a full unroll, relative to it."""
    setup = make(method_run("tesla_vl", steps=steps))
    drawn, loss = setup.matcher.draw(0), plain_loss(setup.model, wbce)
    estimated = setup.matcher.gradient(setup.begun, drawn).gradient.images
    leaves = {n: t.requires_grad_() for n, t in setup.begun.tensors().items()}
    unrolled = full_unroll(loss, *segment(setup, drawn), leaves, 1.0, drawn.batches)["images"].detach()
    return ((estimated - unrolled).norm() / unrolled.norm()).item()


def test_exact_for_one_step_and_a_truncation_for_more(make):
    assert gap(make, 1) < 1e-12
    assert gap(make, 4) > 1e-3


def test_the_exact_estimator_is_one_setting_away(make):
    setup = make(method_run("tesla_vl", estimator="exact"))
    loss = plain_loss(setup.model, wbce)
    assert_equals_slow(
        setup, lambda leaves, drawn: full_unroll(loss, *segment(setup, drawn), leaves, 1.0, drawn.batches)
    )
