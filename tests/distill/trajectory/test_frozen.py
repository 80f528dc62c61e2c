"""Check in float64 that features computed once give the gradients of a frozen tower that runs in every step."""

import pytest
import torch
from torch import nn
from toy import MODEL, encoder, first_set, method_run

from rmdd import config
from rmdd.distill.trajectory import frozen
from rmdd.distill.trajectory.frozen import features_of, to_pixels
from rmdd.distill.trajectory.inner import student_loss
from rmdd.distill.trajectory.matching import Matcher
from rmdd.distill.unroll import meta_gradient
from rmdd.methods import matching_method

IMAGE = MODEL["image"] | {"weights": "random:0", "trainable": False, "projection": "block"}
BATCHES = torch.tensor([[4, 0, 2], [2, 5, 4], [0, 5, 2]])
"""Mini-batches of a set with six pairs; no mini-batch uses pair 1 or 3."""


def problem(dropout=0.0):
    model = encoder(config.Model(**{**MODEL, "image": IMAGE, "dropout": dropout})).double()
    random = torch.Generator().manual_seed(0)
    start = model.trained()
    target = {n: p + 0.1 * torch.randn(p.shape, generator=random, dtype=torch.float64) for n, p in start.items()}
    return model, start, target, first_set().map(torch.Tensor.double)


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
@pytest.mark.parametrize("branches", ["separate", "merged"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_tower_in_every_step(monkeypatch, estimator, branches, dropout):
    monkeypatch.setattr(frozen, "CHUNK", 3)  # the four pairs in the mini-batches then need two forward passes
    model, start, target, synthetic = problem(dropout)
    before = {n: p.clone() for n, p in model.image_tower.named_parameters()}
    rule, how = config.Distill(), {"estimator": estimator, "branches": branches}
    tower, seeds = model.train().image_tower, (1, 2, 3)

    plain = meta_gradient(student_loss(model, rule, seeds), start, target, synthetic, BATCHES, **how)
    features = features_of(tower, synthetic, BATCHES)
    behind = meta_gradient(student_loss(model.on_features(), rule, seeds), start, target, features, BATCHES, **how)
    result = to_pixels(tower, synthetic, BATCHES, behind)

    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-12, atol=0)
    for name, t in plain.gradient.tensors().items():
        torch.testing.assert_close(result.gradient.tensors()[name], t, rtol=1e-10, atol=1e-13)
    assert result.gradient.images.shape == synthetic.images.shape and (result.gradient.images[[1, 3]] == 0).all()
    assert (result.gradient.images[[0, 2, 4, 5]].flatten(1) != 0).any(dim=1).all()
    for name, p in model.image_tower.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_features_are_those_of_the_pairs_in_use():
    model, *_, synthetic = problem()
    result = features_of(model.image_tower, synthetic, BATCHES)
    full = model.image_tower(synthetic.images)
    torch.testing.assert_close(result.images[[0, 2, 4, 5]], full[[0, 2, 4, 5]], rtol=1e-12, atol=1e-12)
    assert (result.images[[1, 3]] == 0).all() and not result.images.requires_grad
    assert result.texts is synthetic.texts and result.pairs == synthetic.pairs


def test_a_frozen_tower_has_no_dropout(make):
    """Check that a frozen tower stays in eval mode; its dropout would draw a different mask in each pass."""
    run = method_run("repblend")
    made = make(run)
    made.model.image_tower = nn.Sequential(made.model.image_tower, nn.Dropout(0.5)).requires_grad_(False).train()
    matcher = Matcher(matching_method(run), 0, made.store, made.model, torch.device("cpu"))
    first, second = (matcher.gradient(made.begun, matcher.draw(0)) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradient.images, second.gradient.images)
