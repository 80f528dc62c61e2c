import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rmdd import config
from rmdd.data.images import normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.distill.phases import NOISE_PIXEL_MEAN, NOISE_PIXEL_STD, draw, initial, mini_batches
from rmdd.distill.similarity import dense
from rmdd.distill.starts import choose_images, choose_records
from rmdd.models.prepared import PreparedSplit


def rule(**change):
    phases = (config.Phase(pairs=9, start=0, stop=2), config.Phase(pairs=7, start=1, stop=4))
    return config.Distill(**{"phases": phases, "batch": 3, "steps": 4, **change})


def same(a, b):
    return (a.expert, a.start, a.dropout_seeds) == (b.expert, b.start, b.dropout_seeds) and torch.equal(
        a.batches, b.batches
    )


def test_a_draw_depends_on_seed_phase_and_iteration_alone():
    draws = [draw(rule(), 0, i, 4, seed=5) for i in range(6)]
    torch.manual_seed(123)
    backwards = [draw(rule(), 0, i, 4, seed=5) for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(draws, backwards, strict=True))
    for other in (draw(rule(), 0, 3, 4, seed=6), draw(rule(), 1, 3, 4, seed=5), draw(rule(), 0, 2, 4, seed=5)):
        assert not same(draws[3], other)
        assert not set(other.dropout_seeds) & set(draws[3].dropout_seeds)


def test_draws_do_not_depend_on_other_phases():
    alone = rule(phases=(config.Phase(pairs=9, start=0, stop=2),))
    assert all(same(draw(rule(), 0, i, 4, 5), draw(alone, 0, i, 4, 5)) for i in range(5))


@settings(deadline=None, max_examples=20)
@given(experts=st.integers(1, 7), phase=st.integers(0, 1), seed=st.integers(0, 2**32))
def test_every_expert_comes_once_a_turn(experts, phase, seed):
    order = [draw(rule(), phase, i, experts, seed).expert for i in range(3 * experts)]
    for turn in range(3):
        assert sorted(order[turn * experts : (turn + 1) * experts]) == list(range(experts))


def test_turns_are_shuffled():
    turns = {tuple(draw(rule(), 0, 5 * turn + i, 5, 0).expert for i in range(5)) for turn in range(6)}
    assert len(turns) > 3


@pytest.mark.parametrize(("start_rule", "expected"), [("exclusive", {1, 2, 3}), ("inclusive", {1, 2, 3, 4})])
def test_starts_cover_the_range(start_rule, expected):
    starts = [draw(rule(start_rule=start_rule), 1, i, 2, 0).start for i in range(300)]
    assert set(starts) == expected
    assert all(starts.count(s) > 300 / len(expected) / 2 for s in expected)


def test_batches_of_the_published_setting():
    """Mini-batches of 20 from 99 pairs: 8 steps use two permutations, four batches from each; 19 pairs stay unused."""
    batches = mini_batches(99, 20, 8, torch.Generator().manual_seed(0))
    assert batches.shape == (8, 20)
    for turn in (batches[:4], batches[4:]):
        assert len(turn.unique()) == 80
    assert set(batches[:4].flatten().tolist()) != set(batches[4:].flatten().tolist())


@settings(deadline=None, max_examples=40)
@given(data=st.data(), pairs=st.integers(2, 30), steps=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_batches_are_cut_from_permutations(data, pairs, steps, seed):
    batch = data.draw(st.integers(2, pairs))
    rows = mini_batches(pairs, batch, steps, torch.Generator().manual_seed(seed))
    assert rows.shape == (steps, batch) and rows.min() >= 0 and rows.max() < pairs
    full = pairs // batch
    for i in range(0, steps, full):
        turn = rows[i : i + full].flatten()
        assert len(turn.unique()) == len(turn)


SIZE, IMAGES, CAPTIONS = 16, 12, 2


class MemorySplit(Split):
    """A dataset split in memory; each image is encoded when it is read."""

    def encoded(self, i):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.images[i].transpose(1, 2, 0))).save(file, "PNG")
        return file.getvalue()


def prepared_split():
    random = np.random.default_rng(0)
    image_of = np.repeat(np.arange(IMAGES), CAPTIONS)
    pictures = random.integers(0, 256, (IMAGES, 3, SIZE, SIZE)).astype(np.uint8)
    texts = (2 + 3 * random.standard_normal((len(image_of), 200))).astype(np.float32)
    names = [str(i) for i in range(IMAGES)]
    captions = [f"caption {i}" for i in range(len(image_of))]
    split = MemorySplit("train", pictures, captions, image_of, names, {}, Dataset(Path(), {}), np.arange(9), Path())
    return PreparedSplit(split, texts, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


TRAIN, RECORDS = prepared_split(), [5, 0, 17, 4]


def run_of(augment=config.NO_AUGMENT, **distill):
    return config.Run(
        seed=3,
        data=config.Data(image_size=SIZE),
        experts=config.Experts(augment=augment),
        distill=rule(similarity={"rank": 2} | distill.pop("similarity", {}), **distill),
    )


def test_records_are_drawn_without_replacement_by_seed_and_phase():
    chosen = choose_records(0, 20, TRAIN, seed=1)
    assert len(set(chosen)) == 20 and set(chosen) <= set(range(IMAGES * CAPTIONS))
    torch.manual_seed(5)
    assert choose_records(0, 20, TRAIN, seed=1) == chosen
    assert choose_records(0, 8, TRAIN, seed=1) == chosen[:8]
    assert choose_records(1, 20, TRAIN, seed=1) != chosen != choose_records(0, 20, TRAIN, seed=2)
    assert sorted(choose_records(0, 24, TRAIN, seed=1)) == list(range(24)), "all 24 records can be drawn"


def test_more_pairs_than_records_are_an_error():
    with pytest.raises(ValueError, match=r"phase 1 wants 25 pairs but the train split has 24 .*lower distill.phases.1"):
        choose_records(1, 25, TRAIN, seed=1)


def test_a_real_start_equals_the_records():
    initial_set = initial(run_of(inner_lr=0.03), 0, TRAIN, RECORDS)
    pictures = torch.from_numpy(TRAIN.split.images[TRAIN.split.image_of[RECORDS]])
    assert torch.equal(initial_set.images, normalise(pictures, TRAIN.mean, TRAIN.std))
    assert torch.equal(initial_set.texts, torch.tensor(TRAIN.texts[RECORDS]))
    assert (
        initial_set.lr_image == initial_set.lr_text == torch.tensor(0.03)
        and initial_set.lr_image is not initial_set.lr_text
    )
    initial_set.texts.zero_()
    assert TRAIN.texts[RECORDS].all(), "changing the synthetic set does not change the train split"


def test_images_with_mean_captions_are_drawn_once_over_all_phases():
    sizes = [2, 3, 1]
    chosen = [choose_images(p, sizes, TRAIN, seed=1) for p in range(3)]
    assert [len(phase) for phase in chosen] == sizes
    records = list(itertools.chain.from_iterable(chosen))
    images = TRAIN.split.image_of[records].tolist()
    assert len(set(images)) == len(images) == 6
    assert choose_images(0, sizes, TRAIN, seed=2) != chosen[0]
    assert all(TRAIN.split.image_of[:r].tolist().count(image) == 0 for r, image in zip(records, images, strict=True))
    with pytest.raises(ValueError, match=r"wants 13 different images but the train split has 12; lower the pairs"):
        choose_images(0, [6, 7], TRAIN, seed=1)


def test_a_start_with_mean_captions_equals_a_slow_mean():
    initial_set = initial(run_of(init="mean_captions"), 0, TRAIN, RECORDS)
    for text, record in zip(initial_set.texts, RECORDS, strict=True):
        same = [i for i in range(IMAGES * CAPTIONS) if TRAIN.split.image_of[i] == TRAIN.split.image_of[record]]
        expected = sum(TRAIN.texts[i].astype(np.float64) for i in same) / len(same)
        torch.testing.assert_close(text, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)
    assert torch.equal(initial_set.images, initial(run_of(), 0, TRAIN, RECORDS).images)


@pytest.mark.parametrize("start", ["real", "noise"])
@pytest.mark.parametrize("kind", ["full", "low_rank", "identity"])
def test_the_similarity_starts_at_the_identity(kind, start):
    initial_set = initial(run_of(init=start, similarity={"kind": kind, "alpha": 2.5}), 0, TRAIN, RECORDS)
    assert initial_set.alpha == 2.5
    assert torch.equal(dense(initial_set.similarity, initial_set.alpha, initial_set.texts), torch.eye(4))
    assert kind != "low_rank" or initial_set.similarity["left"].abs().min() > 0, "factors of 0 would get no gradient"


def test_a_noise_start_depends_on_statistics_only():
    records = list(range(20))
    initial_set = initial(run_of(init="noise"), 0, TRAIN, records)
    assert initial_set.images.shape == (20, 3, SIZE, SIZE) and initial_set.texts.shape == (20, 200)
    channels = initial_set.images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.tensor(NOISE_PIXEL_MEAN), atol=0.06, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.tensor(NOISE_PIXEL_STD), atol=0.05, rtol=0)
    assert initial_set.texts.mean().item() == pytest.approx(2, abs=0.2)
    assert initial_set.texts.std().item() == pytest.approx(3, abs=0.2)
    again = initial(run_of(init="noise"), 0, TRAIN, records[::-1])
    assert torch.equal(initial_set.images, again.images) and torch.equal(initial_set.texts, again.texts)
    assert not torch.equal(initial_set.images, initial(run_of(init="noise"), 1, TRAIN, records).images)


def test_an_augmented_start_has_the_augmentations_of_the_experts():
    plain = initial(run_of(), 0, TRAIN, RECORDS)
    still = initial(run_of(init_augment=True), 0, TRAIN, RECORDS)
    assert torch.equal(still.images, plain.images), "an inactive augmentation changes no image"
    shown = initial(run_of(config.Augment(), init_augment=True), 0, TRAIN, RECORDS)
    assert torch.equal(shown.texts, plain.texts)
    assert all(not torch.equal(a, b) for a, b in zip(shown.images, plain.images, strict=True))
    turned = initial(run_of(config.Augment(), init_augment=True), 0, TRAIN, RECORDS[::-1])
    assert torch.equal(turned.images, shown.images.flip(0)), "records are augmented independently of their position"
    assert not torch.equal(shown.images[0], shown.images[3]), "two records of one image get different augmentations"
