"""MTT-VL: gradients compared with the full unroll, independent batches, and the released temperature."""

from slow import assert_equals_slow, full_unroll, infonce, plain_loss, segment
from toy import method_run


def test_equals_the_whole_unroll_and_torchs_sgd(make):
    made = make(method_run("mtt_vl"))
    assert "similarity.matrix" not in made.begun.tensors()

    def gradient_of(leaves, drawn):
        assert drawn.start == drawn.start_text
        return full_unroll(plain_loss(made.model, infonce), *segment(made, drawn), leaves, 1.0, drawn.batches)

    assert_equals_slow(made, gradient_of)


def test_every_batch_is_an_independent_draw(make):
    """Two batches of 3 out of 6 pairs share pairs; if both were cut from one permutation they would share none."""
    matcher = make(method_run("mtt_vl", batch=3, steps=2)).matcher
    batches = [matcher.draw(i).batches for i in range(200)]
    assert all(len(set(row.tolist())) == 3 for rows in batches for row in rows)
    shared = [len(set(first.tolist()) & set(second.tolist())) for first, second in batches]
    assert {0, 1, 2, 3} == set(shared) and 1 < sum(shared) / len(shared) < 2


def test_the_released_inner_temperature(make):
    """`distill.temperature: 0.376` multiplies cosines by log(1 / 0.07), which reproduces a mistake of the code."""
    made, plain = make(method_run("mtt_vl", temperature=0.376)), make(method_run("mtt_vl"))
    drawn = made.matcher.draw(0)
    hot, cold = (m.matcher.gradient(m.begun, drawn).student_loss for m in (made, plain))
    parts = (made.begun.images[drawn.batches[0]], made.begun.texts[drawn.batches[0]])
    made.model.load_trained(made.store.read(made.matcher.experts[drawn.expert], drawn.start))
    cosines = made.model(*parts).detach() * made.model.temperature
    assert abs(hot.item() - infonce(cosines / 0.376, None).item()) < 1e-12
    assert abs(cold.item() - infonce(cosines / 0.5, None).item()) < 1e-12
