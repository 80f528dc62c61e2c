"""Check the dropout masks, the temperature and the mixing of the student's loss in each step."""

import pytest
import torch
from slow import wbce
from toy import MODEL, encoder, first_set

from rmdd import config
from rmdd.distill.trajectory.inner import student_loss
from rmdd.methods.repblend import Blend
from rmdd.models.dual import DualEncoder

SET = first_set().map(torch.Tensor.double)
TARGET = torch.eye(6, dtype=torch.float64)


def model_of(dropout) -> DualEncoder:
    return encoder(config.Model(**{**MODEL, "dropout": dropout})).double()


def losses(rule, calls, dropout=0.5, **more):
    """Return the student's loss for each step number in the list `calls`."""
    model = model_of(dropout)
    compute = student_loss(model, rule, (101, 202, 303), **more)
    return [compute(model.trained(), SET.images, SET.texts, TARGET, step).item() for step in calls]


def test_a_step_has_one_mask_in_both_passes_and_no_other_step_has_it():
    forward, backward = losses(config.Distill(), [0, 1, 2]), losses(config.Distill(), [0, 1, 2, 2, 1, 0])
    assert backward[:3] == forward and backward[3:] == forward[::-1]
    assert len(set(forward)) == 3


def test_fresh_masks_differ_between_the_passes_and_repeat_in_another_run():
    rule = config.Distill(inner_dropout="fresh_mask")
    both = losses(rule, [0, 1, 1, 0])
    assert len(set(both)) == 4 and losses(rule, [0, 1, 1, 0]) == both


def test_without_dropout_nothing_is_drawn():
    assert len(set(losses(config.Distill(inner_dropout="off"), [0, 1, 2]))) == 1
    before = torch.get_rng_state()
    losses(config.Distill(), [0, 1])
    assert torch.equal(torch.get_rng_state(), before), "the global generator is unchanged"


@pytest.mark.parametrize("temperature", [None, 0.07, 0.376, 2.0])
def test_cosines_are_divided_by_the_temperature(temperature):
    model = model_of(0.0)
    cosines = model.embed_images(SET.images) @ model.embed_texts(SET.texts).T
    expected = wbce(cosines / (temperature or MODEL["temperature"]), TARGET).item()
    result = losses(config.Distill(temperature=temperature), [0], dropout=0.0)[0]
    assert result == pytest.approx(expected, rel=1e-12)


def test_a_step_has_one_mixture_in_both_passes():
    order = torch.tensor([5, 3, 4, 0, 1, 2])
    blends = tuple(Blend(w, order) for w in (1.0, 0.0, 0.3))
    result = losses(config.Distill(), [0, 1, 2, 2, 1, 0], dropout=0.0, mix=lambda rows, step: blends[step].of(rows))
    assert result[:3] == result[3:][::-1] and result[0] != result[2]
    assert result[0] == losses(config.Distill(), [0], dropout=0.0)[0], "a mixing weight of 1 changes no features"
    model = model_of(0.0)
    swapped = wbce(model(SET.images[order], SET.texts[order]), TARGET).item()
    assert result[1] == pytest.approx(swapped, rel=1e-12), "a mixing weight of 0 gives the partner's features"
