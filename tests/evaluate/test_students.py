"""Tests of student training against a slow loop, of schedule options, of diverging students and of scoring."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rmdd import config
from rmdd.config.order import stages
from rmdd.core.seeding import generator
from rmdd.data.images import normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.evaluate.retrieval import recalls
from rmdd.evaluate.students import Diverged, StudentSchedule, TrainingPairs, joined, score, train_student
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
                value = loss_by_loops(loss, logits, subset, index.tolist())
                grads = torch.autograd.grad(value, list(params.values()))
                with torch.no_grad():
                    for (name, p), g in zip(params.items(), grads, strict=True):
                        speed[name] = rule.momentum * speed.get(name, 0) + g + rule.weight_decay * p
                        p -= rate[tower_of(name)] * (rule.drop if dropped else 1) * speed[name]


def loss_by_loops(loss, logits, subset, index):
    """Return the loss of a batch of the pairs `index`; the entries of each subset are collected by a double loop."""
    numbers = [0 if subset.subset_of is None else int(subset.subset_of[i]) for i in index]
    total = 0
    for number in set(numbers):
        rows = [i for i, other in enumerate(numbers) if other == number]
        z = torch.stack([torch.stack([logits[i, j] for j in rows]) for i in rows])
        s = torch.stack([torch.stack([subset.similarity[index[i], index[j]] for j in rows]) for i in rows])
        total = total + len(rows) * LOSSES[loss](z, s)
    return total / len(index)


def joined_by_hand(subsets, between, rates=None):
    """Return the pairs of several subsets as one training set, written entry by entry; `rates` gives other rates."""
    places = [(k, i) for k, subset in enumerate(subsets) for i in range(len(subset.images))]
    similarity = torch.zeros(len(places), len(places), dtype=torch.float64)
    for a, (k, i) in enumerate(places):
        for b, (other, j) in enumerate(places):
            if k == other:
                similarity[a, b] = subsets[k].similarity[i, j]
    return TrainingPairs(
        torch.stack([subsets[k].images[i] for k, i in places]),
        torch.stack([subsets[k].texts[i] for k, i in places]),
        similarity,
        rates.lr_image if rates else sum(subsets[k].lr_image for k, _ in places) / len(places),
        rates.lr_text if rates else sum(subsets[k].lr_text for k, _ in places) / len(places),
        torch.tensor([k for k, _ in places]) if between == "masked" else None,
    )


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


@pytest.mark.parametrize("between", ["zeros", "masked"])
@pytest.mark.parametrize("order", ["cumulative", "union"])
@pytest.mark.parametrize(("loss", "lr", "schedule"), [("wbce", "own", "per_subset"), ("infonce", "last", "shared")])
def test_joined_subsets_equal_pairs_joined_by_hand(order, between, loss, lr, schedule):
    subsets = [*training_pairs(), pairs_of(2, 4, 0.01, 0.02)]
    rule = rule_of(order=order, between=between, lr=lr, schedule=schedule, batch=6)
    by_hand = {"cumulative": (subsets[:1], subsets[:2], subsets), "union": (subsets,)}[order]
    rates = subsets[-1] if lr == "last" else None
    actual, expected, passes = fresh(), fresh(), []
    train_student(actual, subsets, rule, loss, SEED, STUDENT, lambda *done: passes.append(done))
    plain_loop(expected, [joined_by_hand(stage, between, rates) for stage in by_hand], rule, loss)
    assert distance(actual, expected) < 1e-12
    assert passes == [(stage, n) for stage in range(len(by_hand)) for n in range(1, 5)]
    in_sequence = fresh()
    train_student(in_sequence, subsets, rule_of(lr=lr, schedule=schedule, batch=6), loss, SEED, STUDENT)
    assert distance(actual, in_sequence) > 1e-4


def test_masked_and_zeros_give_different_students():
    ends = {}
    for between in ("zeros", "masked"):
        ends[between] = fresh()
        rule = rule_of(order="union", between=between)
        train_student(ends[between], training_pairs(), rule, "wbce", SEED, STUDENT)
    assert distance(ends["zeros"], ends["masked"]) > 1e-4


def test_a_single_subset_is_the_same_in_every_order():
    (single,) = training_pairs()[:1]
    assert joined([single], "masked") is single
    ends = []
    for order in ("sequence", "cumulative", "union"):
        ends.append(fresh())
        train_student(ends[-1], [single], rule_of(order=order, between="masked"), "wbce", SEED, STUDENT)
    assert distance(ends[0], ends[1]) == distance(ends[0], ends[2]) == 0


@pytest.mark.parametrize("subsets", [1, 2, 4])
def test_every_order_ends_with_all_subsets_learned(subsets):
    everything = list(range(subsets))
    assert stages("sequence", subsets) == tuple((p,) for p in everything)
    assert stages("cumulative", subsets) == tuple(tuple(everything[: p + 1]) for p in everything)
    assert stages("union", subsets) == (tuple(everything),)


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
