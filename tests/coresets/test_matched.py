import features as slow
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd.coresets import clusters
from rmdd.coresets.matched import match, matched
from rmdd.coresets.rows import Rows
from rmdd.coresets.shard import split_rows

WIDTH = 4


def pairs(count, seed=0):
    """Return `count` random rows: image features and text features, each of unit length, concatenated."""
    return np.concatenate([slow.unit_rows(count, WIDTH, seed), slow.unit_rows(count, 3, seed + 1)], axis=1)


def label(rows, centroids):
    return np.linalg.norm(rows[:, None].astype(np.float64) - centroids[None], axis=2).argmin(axis=1)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_matching_is_a_permutation_and_no_other_overlaps_more(size, seed):
    random = np.random.default_rng(seed)
    overlap = random.integers(0, 9, (size, size))
    partner = match(overlap)
    total = overlap[np.arange(size), partner].sum()
    assert sorted(partner) == list(range(size)) and total >= np.trace(overlap)
    assert all(total >= overlap[np.arange(size), random.permutation(size)].sum() for _ in range(20))


def test_the_row_nearest_the_prototype_of_every_matched_pair_is_chosen():
    rows, k = pairs(90), 6
    chosen, statistics = matched(split_rows(Rows.of(rows)), k, 3, WIDTH)
    image = label(rows[:, :WIDTH], clusters.fit(np.ascontiguousarray(rows[:, :WIDTH]), k, 3))
    text = label(rows[:, WIDTH:], clusters.fit(np.ascontiguousarray(rows[:, WIDTH:]), k, 3))
    overlap = np.zeros((k, k), int)
    np.add.at(overlap, (image, text), 1)
    partner = match(overlap)
    common = overlap[np.arange(k), partner]
    assert statistics == {"overlap": common.sum() / 90, "empty": 0}
    for place, cluster in enumerate(np.argsort(-common, kind="stable")):
        members = np.flatnonzero((image == cluster) & (text == partner[cluster]))
        miss = np.linalg.norm(rows[members] - rows[members].astype(np.float64).mean(axis=0), axis=1)
        assert chosen[place] == members[miss.argmin()]


@pytest.mark.parametrize(("ranks", "chunk"), [(2, 7), (3, None), (5, 1)])
def test_ranks_chunks_and_the_order_of_rows_change_nothing(ranks, chunk):
    rows = pairs(41)
    shuffled = np.random.default_rng(0).permutation(41)
    cut = split_rows(Rows.of(rows[shuffled], shuffled), ranks, chunk)
    assert matched(cut, 5, 1, WIDTH) == matched(split_rows(Rows.of(rows)), 5, 1, WIDTH)


def test_clusters_that_agree_are_matched_completely():
    group = np.repeat(np.arange(4), 10)
    image, text = 5 * slow.unit_rows(4, WIDTH, 2)[group], 5 * slow.unit_rows(4, 3, 4)[3 - group]
    rows = (np.concatenate([image, text], axis=1) + 0.01 * pairs(40)).astype(np.float32)
    chosen, statistics = matched(split_rows(Rows.of(rows), 2), 4, 0, WIDTH)
    assert sorted(group[chosen]) == [0, 1, 2, 3] and statistics == {"overlap": 1.0, "empty": 0}


@pytest.mark.parametrize("k", [0, 1, 2, 11, 12])
def test_clusters_without_a_common_row_give_an_unchosen_row(k):
    image = np.repeat(slow.unit_rows(3, WIDTH, 4), 4, axis=0)  # most matched clusters have no common row
    rows = np.concatenate([image, slow.unit_rows(12, 3, 5)], axis=1)
    chosen, statistics = matched(split_rows(Rows.of(rows), 2), k, 0, WIDTH)
    assert len(set(chosen)) == len(chosen) == k and set(chosen) <= set(range(12))
    assert statistics["empty"] >= max(0, k - 3)


def test_dropped_rows_are_ignored():
    rows = pairs(50)
    ranks, left = split_rows(Rows.of(rows), 2), np.arange(50)[10:]
    ranks.call("drop", np.arange(10))
    chosen, statistics = matched(ranks, 6, 0, WIDTH)
    assert matched(split_rows(Rows.of(rows[10:], left)), 6, 0, WIDTH) == (chosen, statistics)
