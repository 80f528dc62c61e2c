"""Modes of fused latents: k-means finds planted clusters, and each cluster gets the caption nearest to its mean."""

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
    modes = modes_of(Rows.of(rows), texts, 4, seed=0, components=components)
    expected = np.stack([rows[label == c].mean(0) for c in range(4)])
    order = [int(((expected - m) ** 2).sum(1).argmin()) for m in modes.latents]
    assert sorted(order) == [0, 1, 2, 3] and modes.members == [6] * 4
    np.testing.assert_allclose(modes.latents, expected[order], rtol=1e-4, atol=1e-4)
    for cluster, record in zip(order, modes.records, strict=True):
        members = np.flatnonzero(label == cluster)
        unit = texts[members] / np.linalg.norm(texts[members], axis=1, keepdims=True)
        assert record == members[(unit @ unit.mean(0)).argmax()], (
            "the record must have the caption nearest to the mean caption"
        )


def test_nearest_returns_a_latent_of_the_data():
    rows, _, texts = planted()
    modes = modes_of(Rows.of(rows), texts, 4, seed=0, kind="nearest")
    centres = modes_of(Rows.of(rows), texts, 4, seed=0)
    for mode, centre in zip(modes.latents, centres.latents, strict=True):
        assert (rows == mode).all(1).any()
        distance = ((rows - centre) ** 2).sum(1)
        assert np.array_equal(rows[distance.argmin()], mode)


def test_modes_are_reproducible_and_equal_for_rows_in_several_blocks():
    rows, _, texts = planted(seed=1)
    joined, divided = Rows.of(rows), Rows(((np.arange(9), rows[:9]), (np.arange(9, 24), rows[9:])), rows.shape[1])
    a, b = (modes_of(r, texts, 3, seed=2, components=4) for r in (joined, divided))
    assert np.array_equal(a.latents, b.latents) and a.records == b.records


def test_each_mode_of_equal_latents_has_a_record():
    rows = np.ones((6, 4), np.float32)
    modes = modes_of(Rows.of(rows), np.eye(6, dtype=np.float32), 3, seed=0)
    assert len(set(modes.records)) == 3 and sum(modes.members) == 6 and np.isfinite(modes.latents).all()
    with pytest.raises(ValueError, match="7 pairs need at least 7 latents, found 6"):
        modes_of(Rows.of(rows), np.eye(6, dtype=np.float32), 7, seed=0)


def test_modes_have_different_records_even_with_few_distinct_latents():
    rows = np.repeat(np.eye(4, dtype=np.float32), [4, 3, 2, 1], axis=0)
    modes = modes_of(Rows.of(rows), np.random.default_rng(0).standard_normal((10, 3)), 9, seed=0)
    assert len(set(modes.records)) == 9 and set(modes.records) <= set(range(10))
    assert (np.linalg.norm(modes.latents, axis=1) > 0.9).all(), "each mode must be a latent of the data"


def test_assignment_equals_a_double_loop_and_all_components_preserve_distances():
    rows, _, _ = planted(seed=3)
    centres = rows[:5] + 0.3
    slow = [min(range(5), key=lambda c: ((r - centres[c]) ** 2).sum()) for r in rows]
    assert assigned(rows, centres, chunk=7).tolist() == slow
    low = reduced(Rows.of(rows), 23, 0)
    assert ((low[0] - low[5]) ** 2).sum() == pytest.approx(((rows[0] - rows[5]) ** 2).sum(), rel=1e-3)
