import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from rmdd.coresets.draws import merged, permuted, smallest

IDS = np.arange(30)


def by_permutation(ids, k, seed):
    return permuted(ids, seed)[:k]


def test_every_item_is_drawn_as_often_as_any_other():
    for draw in (by_permutation, smallest):
        seeds, k = 2000, 6
        count = np.bincount(np.concatenate([draw(IDS, k, seed) for seed in range(seeds)]), minlength=30)
        expected = seeds * k / 30
        statistic = ((count - expected) ** 2 / (expected * (1 - k / 30))).sum() * 29 / 30
        assert statistic < chi2.ppf(0.999, 29), draw


def test_draws_are_distinct_seeded_prefixes_for_any_order_of_ids():
    for draw in (by_permutation, smallest):
        full = draw(IDS, 30, 1).tolist()
        assert sorted(full) == IDS.tolist() and full != draw(IDS, 30, 2).tolist()
        assert draw(IDS, 7, 1).tolist() == full[:7] == draw(IDS[::-1].copy(), 7, 1).tolist()
        assert draw(IDS, 0, 1).tolist() == []


@given(cuts=st.lists(st.integers(0, 30), max_size=4), k=st.integers(0, 30), seed=st.integers(0, 9))
def test_hash_draws_of_shards_merge_to_the_draw_of_all(cuts, k, seed):
    parts = np.split(np.random.default_rng(seed).permutation(30), sorted(cuts))
    assert merged([smallest(p, k, seed) for p in parts], k, seed).tolist() == smallest(IDS, k, seed).tolist()
