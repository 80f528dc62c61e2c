from itertools import pairwise

import features as slow
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmdd.coresets import clusters
from rmdd.coresets.draws import permuted
from rmdd.coresets.rows import Rows
from rmdd.coresets.shard import split_rows

ROWS = slow.unit_rows(80, 6, 4)


def nearest(rows, centroids):
    return np.linalg.norm(rows[:, None].astype(np.float64) - centroids[None], axis=2)


def test_inertia_does_not_rise_over_iterations():
    result = [clusters.fit(ROWS, 6, 0, iterations=i, starts=1) for i in range(1, 9)]
    inertia = [(nearest(ROWS, c).min(axis=1) ** 2).sum() for c in result]
    assert all(a >= b - 1e-5 for a, b in pairwise(inertia)) and inertia[0] > inertia[-1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_row_goes_to_its_nearest_centroid(ranks):
    centroids = clusters.fit(ROWS[:30], 7, 1)
    parts = split_rows(Rows.of(ROWS), ranks, 9).call("assigned", centroids)
    ids, label, distance = (np.concatenate([p[i] for p in parts]) for i in range(3))
    assert (ids == np.arange(80)).all() and (label == nearest(ROWS, centroids).argmin(axis=1)).all()
    assert np.allclose(distance, nearest(ROWS, centroids).min(axis=1) ** 2, atol=1e-5)


def test_medoids_are_the_members_nearest_their_centroids_whatever_the_ranks():
    chosen = clusters.medoids(split_rows(Rows.of(ROWS)), 12, 3)
    distance = nearest(ROWS, clusters.fit(ROWS, 12, 3))
    label = distance.argmin(axis=1)
    assert [int(label[i]) for i in chosen] == list(range(12))
    assert all(distance[i, c] == distance[label == c, c].min() for c, i in enumerate(chosen))
    shuffled = np.random.default_rng(0).permutation(80)
    for ranks, chunk in ((2, 5), (3, None)):
        assert clusters.medoids(split_rows(Rows.of(ROWS[shuffled], shuffled), ranks, chunk), 12, 3) == chosen


def test_empty_clusters_give_an_item_that_was_not_chosen():
    rows = np.repeat(slow.unit_rows(3, 4), 4, axis=0)
    chosen = clusters.medoids(split_rows(Rows.of(rows), 2), 7, 0)
    assert len(set(chosen)) == 7 and {i // 4 for i in chosen} == {0, 1, 2}
    assert sorted(clusters.medoids(split_rows(Rows.of(rows)), 12, 0)) == list(range(12))
    assert clusters.medoids(split_rows(Rows.of(rows)), 0, 0) == []
    with pytest.raises(ValueError, match="12 rows cannot be put into 13 clusters"):
        clusters.medoids(split_rows(Rows.of(rows)), 13, 0)


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    rule=st.sampled_from(["equal", "proportional", "sqrt"]),
    data=st.data(),
)
def test_quotas_sum_to_k_and_never_exceed_a_cluster(sizes, rule, data):
    k = data.draw(st.integers(0, sum(sizes)))
    result = clusters.quotas(sizes, k, rule)
    assert sum(result) == k and all(0 <= q <= size for q, size in zip(result, sizes, strict=True))


def test_quotas_follow_their_rule_and_redistribute_the_rest():
    assert clusters.quotas([90, 10], 10, "proportional") == [9, 1]
    assert clusters.quotas([90, 10], 10, "equal") == [5, 5]
    assert clusters.quotas([81, 9], 8, "sqrt") == [6, 2]
    assert clusters.quotas([90, 2, 50], 12, "equal") == [5, 2, 5]
    with pytest.raises(ValueError, match="clusters with 5 items in total cannot give 6"):
        clusters.quotas([2, 3], 6, "equal")


def test_balanced_choices_take_their_quota_of_every_cluster():
    sizes = (40, 20, 3)
    rows = np.concatenate([slow.unit_rows(1, 5, s) * 9 + slow.unit_rows(n, 5, s) for s, n in enumerate(sizes)])

    def method(own):
        return iter(permuted(np.concatenate(own.call("ids")), 0).tolist())

    result = [clusters.balanced(split_rows(Rows.of(rows), ranks), 15, 3, "equal", 0, method) for ranks in (1, 2)]
    assert result[0] == result[1] and len(set(result[0])) == 15
    assert sorted(np.bincount(np.digitize(result[0], [40, 60]), minlength=3)) == [3, 6, 6]


def test_outliers_are_far_from_every_centroid():
    centres = 3 * slow.unit_rows(4, 6)
    blobs = np.repeat(centres, 25, axis=0) + 0.01 * slow.unit_rows(100, 6, 1)
    rows = np.concatenate([blobs, centres[[0, 1, 2, 3, 0]] + ROWS[:5]]).astype(np.float32)
    assert clusters.outliers(split_rows(Rows.of(rows), 2), 0.05, 0, centroids=4).tolist() == list(range(100, 105))
    assert clusters.worst(np.array([3, 1, 2, 0]), np.array([0.5, 0.1, 0.1, 0.1], np.float32), 0.5).tolist() == [1, 2]
