"""MTT-VL: gradients compared with the full unroll, independent batches, and temperature of the released code."""

from slow import assert_equals_slow, full_unroll, infonce, plain_loss, segment
from toy import method_run


def test_equals_the_whole_unroll_and_torchs_sgd(make):
    setup = make(method_run("mtt_vl"))
    assert "similarity.matrix" not in setup.begun.tensors()

    def gradient_of(leaves, drawn):
        assert drawn.start == drawn.start_text
        return full_unroll(plain_loss(setup.model, infonce), *segment(setup, drawn), leaves, 1.0, drawn.batches)

    assert_equals_slow(setup, gradient_of)


def test_every_batch_is_an_independent_draw(make):
    """Two batches of 3 out of 6 pairs have pairs in common; batches cut from one permutation would have none."""
    matcher = make(method_run("mtt_vl", batch=3, steps=2)).matcher
    batches = [matcher.draw(i).batches for i in range(200)]
    assert all(len(set(row.tolist())) == 3 for rows in batches for row in rows)
    shared = [len(set(first.tolist()) & set(second.tolist())) for first, second in batches]
    assert {0, 1, 2, 3} == set(shared) and 1 < sum(shared) / len(shared) < 2


def test_the_released_inner_temperature(make):
    """`distill.temperature: 0.376` multiplies cosines by log(1 / 0.07), a mistake in the released code."""
    setup, plain = make(method_run("mtt_vl", temperature=0.376)), make(method_run("mtt_vl"))
    drawn = setup.matcher.draw(0)
    hot, cold = (m.matcher.gradient(m.begun, drawn).student_loss for m in (setup, plain))
    parts = (setup.begun.images[drawn.batches[0]], setup.begun.texts[drawn.batches[0]])
    setup.model.load_trained(setup.store.read(setup.matcher.experts[drawn.expert], drawn.start))
    cosines = setup.model(*parts).detach() * setup.model.temperature
    assert abs(hot.item() - infonce(cosines / 0.376, None).item()) < 1e-12
    assert abs(cold.item() - infonce(cosines / 0.5, None).item()) < 1e-12
