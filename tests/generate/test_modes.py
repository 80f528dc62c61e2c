"""Modes of fused latents: planted clusters are found, and their captions speak for them."""

import numpy as np
import pytest

from rmdd.coresets.rows import Rows
from rmdd.generate.modes import assigned, modes_of, reduced


def planted(k=4, each=6, width=30, seed=0):
    random = np.random.default_rng(seed)
    centres = 10 * random.standard_normal((k, width))
    label = np.tile(np.arange(k), each)
    rows = (centres[label] + 0.1 * random.standard_normal((k * each, width))).astype(np.float32)
    return rows, label, random.standard_normal((k * each, 5)).astype(np.float32)


@pytest.mark.parametrize("components", [None, 3])
def test_centres_are_means_of_planted_clusters(components):
    rows, label, texts = planted()
    found = modes_of(Rows.of(rows), texts, 4, seed=0, components=components)
    expected = np.stack([rows[label == c].mean(0) for c in range(4)])
    order = [int(((expected - m) ** 2).sum(1).argmin()) for m in found.latents]
    assert sorted(order) == [0, 1, 2, 3] and found.members == [6] * 4
    np.testing.assert_allclose(found.latents, expected[order], rtol=1e-4, atol=1e-4)
    for cluster, record in zip(order, found.records, strict=True):
        members = np.flatnonzero(label == cluster)
        unit = texts[members] / np.linalg.norm(texts[members], axis=1, keepdims=True)
        assert record == members[(unit @ unit.mean(0)).argmax()], "the caption nearest the mean caption"


def test_nearest_takes_a_latent_that_is_there():
    rows, _, texts = planted()
    found = modes_of(Rows.of(rows), texts, 4, seed=0, kind="nearest")
    centres = modes_of(Rows.of(rows), texts, 4, seed=0)
    for mode, centre in zip(found.latents, centres.latents, strict=True):
        assert (rows == mode).all(1).any()
        distance = ((rows - centre) ** 2).sum(1)
        assert np.array_equal(rows[distance.argmin()], mode)


def test_the_same_seed_gives_the_same_and_files_give_what_memory_gives():
    rows, _, texts = planted(seed=1)
    whole, cut = Rows.of(rows), Rows(((np.arange(9), rows[:9]), (np.arange(9, 24), rows[9:])), rows.shape[1])
    a, b = (modes_of(r, texts, 3, seed=2, components=4) for r in (whole, cut))
    assert np.array_equal(a.latents, b.latents) and a.records == b.records


def test_equal_latents_leave_no_mode_without_a_record():
    rows = np.ones((6, 4), np.float32)
    found = modes_of(Rows.of(rows), np.eye(6, dtype=np.float32), 3, seed=0)
    assert len(set(found.records)) == 3 and sum(found.members) == 6 and np.isfinite(found.latents).all()
    with pytest.raises(ValueError, match="7 pairs are asked for but there are 6 latents"):
        modes_of(Rows.of(rows), np.eye(6, dtype=np.float32), 7, seed=0)


def test_fewer_distinct_latents_than_modes_leave_each_a_record_of_its_own():
    rows = np.repeat(np.eye(4, dtype=np.float32), [4, 3, 2, 1], axis=0)
    found = modes_of(Rows.of(rows), np.random.default_rng(0).standard_normal((10, 3)), 9, seed=0)
    assert len(set(found.records)) == 9 and set(found.records) <= set(range(10))
    assert (np.linalg.norm(found.latents, axis=1) > 0.9).all(), "a latent that is there"


def test_assignment_against_a_double_loop_and_all_components_keep_distances():
    rows, _, _ = planted(seed=3)
    centres = rows[:5] + 0.3
    slow = [min(range(5), key=lambda c: ((r - centres[c]) ** 2).sum()) for r in rows]
    assert assigned(rows, centres, chunk=7).tolist() == slow
    low = reduced(Rows.of(rows), 23, 0)
    assert ((low[0] - low[5]) ** 2).sum() == pytest.approx(((rows[0] - rows[5]) ** 2).sum(), rel=1e-3)
