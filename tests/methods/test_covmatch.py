"""CovMatch on toy pairs, for both `texts` options: loss, gradient and online model, compared with plain sums."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objectives import descend, objective_of, opened, prepared_split, run_of
from toy import same_tensors

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.data.images import normalise
from rmdd.models.text import embed
from rmdd.models.tokens import TokenTower, mask_of

SMALL = {"real_batch": 8, "reset": 4, "rho": 1.5, "mean_weight": 0.3}


@pytest.fixture(params=["frozen", "tokens"])
def setting(request, bert, tmp_path):
    """Fixture: a run and its real pairs; every test that uses it runs once per `texts` option."""
    if request.param == "frozen":
        return run_of("covmatch", SMALL), prepared_split()
    tower = {"name": bert, "pooling": "mean", "max_tokens": 12}
    run = run_of("covmatch", {**SMALL, "texts": "tokens", "chunk": 4}, text=tower)
    train = prepared_split()
    return run, dataclasses.replace(train, texts=np.array(embed(train.split.captions, run.model.text, tmp_path)))


def with_options(run, **options):
    rule = run.distill.model_copy(update={"options": run.distill.options | options})
    return run.model_copy(update={"distill": rule})


def slow_loss(objective, train, images, texts, iteration):
    """Compute the loss from its definition: encode one pair at a time and sum every entry of C in Python."""
    rule, model = objective.rule, objective.model
    draws = generator(objective.seed, "real batch", 0, iteration, 0)
    records = torch.randperm(len(train.split.captions), generator=draws)[: rule.real_batch].tolist()
    pixels = normalise(torch.from_numpy(train.split.images[train.split.image_of[records]]), train.mean, train.std)
    h_v = [model.image_tower(x[None].to(images.dtype))[0] for x in pixels]
    if model.text_tower is None:
        h_l = [torch.tensor(train.texts[r]).to(images.dtype) for r in records]
    else:
        h_l = [model.text_tower(model.text_tower.words([train.split.captions[r]]))[0] for r in records]
    g_v = [model.image_tower(x[None])[0] for x in images]
    g_l = list(texts) if model.text_tower is None else [model.text_tower(y[None])[0] for y in texts]

    def covariance(vs, ls):
        mean_v, mean_l = sum(vs) / len(vs), sum(ls) / len(ls)
        return sum(torch.outer(v - mean_v, t - mean_l) for v, t in zip(vs, ls, strict=True)) / (len(vs) - 1)

    gap = rule.rho * covariance(h_v, h_l) - covariance(g_v, g_l)
    means = 0.0
    for head, real, learned in ((model.head_image, h_v, g_v), (model.head_text, h_l, g_l)):
        difference = sum(head(h) for h in real) / len(real) - sum(head(h) for h in learned) / len(learned)
        means = means + (difference**2).sum()
    return (gap**2).sum() + rule.mean_weight * means


def test_loss_and_gradient_equal_the_slow_ones(setting):
    """Compare with slow code in float64: for a new online model and after each of the model's first training steps."""
    run, train = setting
    for chunk in (2, 64):
        _, begun, objective = opened(with_options(run, chunk=chunk), None, train)
        objective.model.double()
        begun = begun.map(torch.Tensor.double)
        objective.train = dataclasses.replace(train, texts=train.texts.astype(np.float64))
        draw = objective._real
        objective._real = lambda *a, draw=draw: (draw(*a)[0].double(), draw(*a)[1])
        for iteration in range(3):
            gradient, parts = objective.gradient(begun, iteration, 0)
            leaves = begun.images.clone().requires_grad_(), begun.texts.clone().requires_grad_()
            slow = slow_loss(objective, train, *leaves, iteration)
            assert parts["loss"] == pytest.approx(float(slow.detach()), rel=1e-9)
            assert parts["loss"] == pytest.approx(parts["loss_covariance"] + 0.3 * parts["loss_mean"])
            expected = torch.autograd.grad(slow, leaves)
            for actual, wanted in zip((gradient.images, gradient.texts), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)
            assert float(gradient.lr_image) == float(gradient.lr_text) == 0
            objective.after(begun, iteration)


def test_the_set_comes_closer_to_the_real_covariance(setting):
    run, train = setting
    _, begun, objective = opened(with_options(run, real_batch=48, reset=99, lr_tower=0, lr_head=0), None, train)
    after, losses = descend(objective, begun, 40, lr=0.02)
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    assert not torch.equal(after.texts, begun.texts)


def test_the_online_model_learns_and_is_reset(setting):
    run, train = setting
    _, begun, objective = opened(run, None, train)
    trained = {n for n, p in objective.model.named_parameters() if p.requires_grad}
    assert {"head_image.weight", "head_text.weight"} < trained
    assert any(n.startswith("text_tower.") for n in trained) == (begun.texts.ndim == 3)
    states = [{n: t.clone() for n, t in objective.model.state_dict().items()}]
    for iteration in range(5):
        objective.after(begun, iteration)
        states.append({n: t.clone() for n, t in objective.model.state_dict().items()})
    moved = {n for n in trained if not torch.equal(states[0][n], states[3][n])}
    assert {n for n in trained if "text_tower" not in n} <= moved
    towers = [n for n in trained if not n.startswith("head_")]
    assert all(torch.equal(states[0][n], states[4][n]) for n in towers), (
        "a reset of the online model must restore the pretrained towers"
    )
    first_head, second_head = (states[i]["head_image.weight"] for i in (0, 4))
    assert not torch.equal(first_head, second_head), "a reset of the online model must draw new heads"
    assert not torch.equal(states[4]["head_image.weight"], states[5]["head_image.weight"])


def test_a_reset_draws_a_new_tower_if_it_has_no_weights():
    _, begun, objective = opened(run_of("covmatch", SMALL | {"reset": 1}, weights="random"), None, prepared_split())
    name = next(n for n, p in objective.model.named_parameters() if n.startswith("image_tower.") and p.ndim == 4)
    turns = []
    for iteration in range(3):
        turns.append(objective.model.state_dict()[name].clone())
        objective.after(begun, iteration)
    assert not any(torch.equal(turns[i], turns[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_online_step_is_that_of_torch(setting):
    run, train = setting
    _, begun, objective = opened(with_options(run, online_momentum=0, weight_decay=0), None, train)
    images, texts = objective._real("online batch", 0)
    before = objective.model.head_image.weight.detach().clone()
    v, t = objective._encode(images, texts)
    logits = F.normalize(v @ before.T, dim=1) @ F.normalize(objective.model.head_text(t), dim=1).T / 0.5
    head = before.requires_grad_()
    logits = F.normalize(v @ head.T, dim=1) @ F.normalize(objective.model.head_text(t), dim=1).T / 0.5
    labels = torch.arange(len(images))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    (grad,) = torch.autograd.grad(loss, head)
    objective.after(begun, 0)
    torch.testing.assert_close(objective.model.head_image.weight.detach(), (head - 0.1 * grad).detach())


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_resumed_objective_gives_the_same_bits(setting, average):
    run, train = setting
    run = with_options(run, average=average)
    method, begun, unbroken = opened(run, None, train)
    uninterrupted, losses = descend(unbroken, begun, 7, lr=0.01)
    for stop in (3, 4, 6):  # the run resumes before, at and after the reset of the online model
        first = objective_of(method, None, train)
        half, _ = descend(first, begun, stop, lr=0.01)
        state = {n: t.clone() for n, t in first.tensors().items()}
        assert ("taken" in state) == (stop != 4), "a checkpoint directly after a reset must not hold the model"
        descend(first, half, 1, start=stop)
        for second in (objective_of(method, None, train), first):
            second.load(state)
            rest, more = descend(second, half, 7 - stop, start=stop, lr=0.01)
            assert same_tensors(rest.tensors(), uninterrupted.tensors()) and more == losses[stop:]
            assert same_tensors(second.tensors(), unbroken.tensors())


def test_the_real_covariance_is_averaged_since_the_last_reset(setting):
    run, train = setting
    _, begun, objective = opened(with_options(run, average=0.75, lr_tower=0, lr_head=0), None, train)
    covariances = []
    for iteration in range(2):
        images, texts = objective._real("online batch", iteration)
        v, t = (f.detach() for f in objective._encode(images, texts))
        covariances.append((v - v.mean(0)).T @ (t - t.mean(0)) / (len(v) - 1))
        objective.after(begun, iteration)
    torch.testing.assert_close(objective.mean, 0.75 * covariances[0] + 0.25 * covariances[1])
    objective.after(begun, 2)
    objective.after(begun, 3)
    assert objective.mean is None


def test_a_frozen_image_tower_stays(bert):
    run = run_of("covmatch", SMALL)
    image = run.model.image.model_copy(update={"trainable": False, "projection": "block"})
    run = run.model_copy(update={"model": run.model.model_copy(update={"image": image})})
    _, begun, objective = opened(run, None, prepared_split())
    before = {n: t.clone() for n, t in objective.model.image_tower.state_dict().items()}
    descend(objective, begun, 2, lr=0.01)
    assert same_tensors(before, objective.model.image_tower.state_dict())


def test_token_embeddings_give_the_embeddings_of_their_captions(bert, tmp_path):
    """The frozen tower must give the same output for captions and for their token embeddings, padded or not."""
    for pooling, unit in (("cls", False), ("mean", True)):
        tower = {"name": bert, "pooling": pooling, "max_tokens": 12, "normalise": unit}
        run, train = run_of("covmatch", {**SMALL, "texts": "tokens", "chunk": 4}, text=tower), prepared_split()
        texts = np.array(embed(train.split.captions, run.model.text, tmp_path))
        method, begun, _ = opened(run, None, dataclasses.replace(train, texts=texts))
        records = method.records(0, train)
        lengths = [len(train.split.captions[r].split()) + 2 for r in records]
        assert mask_of(begun.texts).sum(dim=1).tolist() == lengths and len(set(lengths)) > 1
        students = method.exported(begun)
        torch.testing.assert_close(students.texts, torch.tensor(texts[records]), rtol=1e-4, atol=1e-5)
        assert torch.equal(students.images, begun.images)


def test_padding_has_no_gradient(bert):
    tower = TokenTower(config.TextTower(name=bert, pooling="mean", max_tokens=12))
    words = tower.words(["red circle", "green square by a tree"]).detach().requires_grad_()
    (grad,) = torch.autograd.grad(tower(words).square().sum(), words)
    mask = mask_of(words)
    assert (~mask).sum() == 3 and grad[~mask].abs().max() == 0 and grad[mask].abs().min(dim=1).values.max() > 0


def test_texts_stay_as_long_as_their_captions(setting):
    run, train = setting
    _, begun, objective = opened(run, None, train)
    after, _ = descend(objective, begun, 3, lr=0.01)
    if begun.texts.ndim == 3:
        assert torch.equal(mask_of(begun.texts), mask_of(after.texts))


def test_invalid_settings_are_rejected():
    with pytest.raises(config.ConfigError, match=r"texts: tokens needs a text tower that reads tokens; set model"):
        run_of("covmatch", {"texts": "tokens"})
    with pytest.raises(config.ConfigError, match=r"needs the masks of real captions; set distill.init: real"):
        run_of("covmatch", {"texts": "tokens"}, text={"name": str(Path(__file__).parent)}, init="noise")
