"""Tests of student training against a slow loop, of schedule options, of diverging students and of scoring."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.data.images import normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.evaluate.retrieval import recalls
from rmdd.evaluate.students import Diverged, StudentSchedule, TrainingPairs, score, train_student
from rmdd.models.dual import build, tower_of
from rmdd.models.losses import LOSSES
from rmdd.models.prepared import PreparedSplit

TEXT_WIDTH, SIZE, SEED, STUDENT = 5, 8, 4, 2


def fresh(dropout=0.0):
    image = config.ImageTower(name="convnet", weights="random", widths=(4,), groups=2, projection="linear")
    model = config.Model(image=image, text=config.TextTower(name="hashing"), width=6, dropout=dropout, temperature=0.5)
    return build(model, TEXT_WIDTH, SIZE, seed=0, who="student").double()


def pairs_of(seed, pairs, lr_image, lr_text):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    similarity = torch.eye(pairs, dtype=torch.float64) + 0.2 * normal(pairs, pairs)
    return TrainingPairs(normal(pairs, 3, SIZE, SIZE), normal(pairs, TEXT_WIDTH), similarity, lr_image, lr_text)


def training_pairs():
    return [pairs_of(0, 7, 0.02, 0.04), pairs_of(1, 5, 0.03, 0.01)]


def rule_of(**change):
    rule = {"epochs": 4, "batch": 3, "momentum": 0.9, "weight_decay": 1e-2, "lr_drop": 0.1}
    return StudentSchedule.of(config.Evaluate(**{**rule, **change}))


def plain_loop(model, training_pairs, rule, loss):
    """Train with SGD, momentum and weight decay, written out for each parameter, to compare with `train_student`."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    speed, rate = {}, {}
    for s, subset in enumerate(training_pairs):
        if s == 0 or not rule.chain:
            rates = training_pairs[-1] if rule.rates == "last" else subset
            speed, rate = {}, {"image": rates.lr_image, "text": rates.lr_text}
        for epoch in range(rule.epochs):
            dropped = epoch >= math.ceil(rule.epochs / 2) and (s == 0 or not rule.chain)
            dropped = dropped or (s > 0 and rule.chain)
            random = generator(SEED, "student batches", STUDENT, s, epoch)
            steps = len(subset.images) // rule.batch + (len(subset.images) % rule.batch > 0)
            for _ in range(steps):
                index = torch.randperm(len(subset.images), generator=random)[: rule.batch]
                logits = model(subset.images[index], subset.texts[index])
                grads = torch.autograd.grad(
                    LOSSES[loss](logits, subset.similarity[index][:, index]), list(params.values())
                )
                with torch.no_grad():
                    for (name, p), g in zip(params.items(), grads, strict=True):
                        speed[name] = rule.momentum * speed.get(name, 0) + g + rule.weight_decay * p
                        p -= rate[tower_of(name)] * (rule.drop if dropped else 1) * speed[name]


def distance(a, b):
    a, b = (torch.cat([p.flatten() for p in m.trained().values()]) for m in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("schedule", ["per_subset", "shared"])
@pytest.mark.parametrize("lr", ["own", "last"])
@pytest.mark.parametrize(("loss", "epochs"), [("wbce", 4), ("infonce", 5)])
def test_training_equals_the_plain_loop(schedule, lr, loss, epochs):
    rule = rule_of(schedule=schedule, lr=lr, epochs=epochs)
    actual, expected = fresh(), fresh()
    train_student(actual, training_pairs(), rule, loss, SEED, STUDENT)
    plain_loop(expected, training_pairs(), rule, loss)
    assert distance(actual, expected) < 1e-12
    assert distance(actual, fresh()) > 1e-3


def test_options_schedule_and_lr_change_the_student():
    ends = []
    for schedule in ("per_subset", "shared"):
        for lr in ("own", "last"):
            model = fresh()
            train_student(model, training_pairs(), rule_of(schedule=schedule, lr=lr), "wbce", SEED, STUDENT)
            ends.append(model)
    assert all(distance(a, b) > 1e-5 for i, a in enumerate(ends) for b in ends[:i])


def test_the_text_head_can_take_the_image_rate():
    """With `text_lr: image`, as in the released MTT-VL code, the learned learning rate of the text head is ignored."""
    default, image, equal = fresh(), fresh(), fresh()
    train_student(default, [pairs_of(0, 7, 0.02, 0.04)], rule_of(), "wbce", SEED, STUDENT)
    train_student(image, [pairs_of(0, 7, 0.02, 0.04)], rule_of(text_lr="image"), "wbce", SEED, STUDENT)
    train_student(equal, [pairs_of(0, 7, 0.02, 0.02)], rule_of(), "wbce", SEED, STUDENT)
    assert distance(image, equal) == 0 and distance(image, default) > 1e-5
    negative = [pairs_of(0, 7, 0.02, -1.0)]
    train_student(fresh(), negative, rule_of(text_lr="image"), "wbce", SEED, STUDENT)


def test_the_order_of_subsets_changes_the_student():
    first, second = fresh(), fresh()
    train_student(first, training_pairs(), rule_of(), "wbce", SEED, STUDENT)
    train_student(second, training_pairs()[::-1], rule_of(), "wbce", SEED, STUDENT)
    assert distance(first, second) > 1e-5


def test_a_batch_larger_than_the_subset_is_the_whole_subset():
    large, exact = fresh(), fresh()
    train_student(large, training_pairs()[:1], rule_of(batch=128), "wbce", SEED, STUDENT)
    train_student(exact, training_pairs()[:1], rule_of(batch=7), "wbce", SEED, STUDENT)
    assert distance(large, exact) == 0


def test_a_student_is_reproducible_and_differs_from_other_students():
    def end(student, seed=SEED):
        model = fresh(dropout=0.4)
        torch.manual_seed(len(ends))
        train_student(model, training_pairs(), rule_of(), "wbce", seed, student)
        ends.append(model)

    ends = []
    for student, seed in ((0, 1), (0, 1), (1, 1), (0, 2)):
        end(student, seed)
    assert distance(ends[0], ends[1]) == 0
    assert distance(ends[0], ends[2]) > 1e-5 and distance(ends[0], ends[3]) > 1e-5


def test_scoring_during_training_does_not_change_the_student():
    def score_now(subset, passes):
        calls.append((subset, passes))
        torch.rand(5)
        model.eval()
        model.train()

    calls, model, other = [], fresh(dropout=0.4), fresh(dropout=0.4)
    before = torch.random.get_rng_state()
    train_student(other, training_pairs(), rule_of(), "wbce", SEED, STUDENT)
    assert torch.equal(torch.random.get_rng_state(), before)
    train_student(model, training_pairs(), rule_of(), "wbce", SEED, STUDENT, score_now)
    assert calls == [(s, p) for s in (0, 1) for p in (1, 2, 3, 4)]
    assert distance(model, other) == 0


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan")])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_learning_rate_that_is_not_positive_is_rejected(rate, tower):
    broken = [training_pairs()[0], replace(training_pairs()[1], **{f"lr_{tower}": rate})]
    with pytest.raises(Diverged, match=f"learned {tower} learning rate of subset 1 is .*distill.min_inner_lr"):
        train_student(fresh(), broken, rule_of(), "wbce", SEED, STUDENT)
    with pytest.raises(Diverged, match="must be positive"):
        train_student(fresh(), broken, rule_of(lr="last"), "wbce", SEED, STUDENT)


def test_a_diverging_student_stops():
    wild = [pairs_of(0, 7, 1e200, 1e200)]
    with pytest.raises(
        FloatingPointError, match=r"student 2 diverged on subset 0 in pass \d: loss nan at learning rates 1e\+200"
    ):
        train_student(fresh(), wild, rule_of(epochs=9), "infonce", SEED, STUDENT)


@pytest.mark.parametrize("chunk", [2, 100])
def test_score_is_the_recall_of_the_embeddings_in_eval_mode(chunk):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 3, SIZE, SIZE), dtype=np.uint8)
    image_of = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    split = Split("val", images, ["a"] * 8, image_of, list("vwxyz"), {}, Dataset(Path(), {}), np.arange(5), Path())
    texts = random.standard_normal((8, TEXT_WIDTH)).astype(np.float32)
    prepared = PreparedSplit(split, texts, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    model = fresh(dropout=0.5).float()
    model.train()
    actual = score(model, prepared, torch.device("cpu"), chunk)
    assert model.training
    model.eval()
    with torch.no_grad():
        u = model.embed_images(normalise(torch.from_numpy(images), prepared.mean, prepared.std))
        v = model.embed_texts(torch.from_numpy(texts))
    assert actual.as_dict() == recalls(u, v, torch.from_numpy(image_of)).as_dict()
