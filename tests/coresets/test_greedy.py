from itertools import islice, pairwise

import features as slow
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd.coresets import greedy
from rmdd.coresets.rows import Rows, write_rows
from rmdd.coresets.shard import here

ROWS = slow.unit_rows(60, 8)
METHODS = ("herding", "k_center")


def order(method, ranks, begun=(), seed=0, start="random"):
    mu = greedy.mean(ranks, greedy.checked(ranks).largest)
    if method == "herding":
        return greedy.herding(ranks, mu, begun)
    return greedy.k_center(ranks, greedy.start_of(ranks, start, seed, mu), begun)


def picks(method, rows, k, *, ids=None, ranks=1, chunk=None, **options):
    found = here(Rows.of(rows, ids), ranks, chunk)
    return [best.id for best in islice(order(method, found, **options), k)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 7, 60])
def test_k_distinct_items_and_all_of_them_at_most(method, k):
    chosen = picks(method, ROWS, k)
    assert len(set(chosen)) == len(chosen) == k and set(chosen) <= set(range(60))
    assert len(picks(method, ROWS, 61)) == 60


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 25),
    chunk=st.integers(1, 30),
    ranks=st.integers(1, 4),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 50),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_chunks_ranks_and_the_order_of_rows_change_no_bit(count, chunk, ranks, method, seed, dtype):
    rows = slow.unit_rows(count, 5, seed, dtype)
    whole = [(b.value, b.id) for b in order(method, here(Rows.of(rows)), seed=seed)]
    shuffled = np.random.default_rng(seed).permutation(count)
    cut = here(Rows.of(rows[shuffled], shuffled), ranks, chunk)
    assert [(b.value, b.id) for b in order(method, cut, seed=seed)] == whole


@pytest.mark.parametrize("method", METHODS)
def test_fewer_are_the_first_of_more_and_a_resumed_choice_is_an_unbroken_one(method):
    whole = [(b.value, b.id) for b in islice(order(method, here(Rows.of(ROWS))), 20)]
    for done in (1, 2, 13):
        rest = order(method, here(Rows.of(ROWS), 2), begun=[number for _, number in whole[:done]])
        assert [(b.value, b.id) for b in islice(rest, 20 - done)] == whole[done:]


@pytest.mark.parametrize("method", METHODS)
def test_a_rotation_of_the_space_changes_nothing(method):
    turn, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))
    assert picks(method, (ROWS @ turn).astype(np.float32), 30) == picks(method, ROWS, 30)


@pytest.mark.parametrize("method", METHODS)
def test_equal_rows_go_by_the_smallest_id(method):
    rows = np.repeat(slow.unit_rows(6, 4, 2), 3, axis=0)
    ids = np.random.default_rng(0).permutation(18)
    chosen = picks(method, rows, 18, ids=ids, ranks=3, start="mean")
    group = {int(number): place // 3 for place, number in enumerate(ids)}
    for g in range(6):
        of_group = [i for i in chosen if group[i] == g]
        assert of_group == sorted(of_group)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_that_are_no_features_are_named(bad):
    rows = ROWS.copy()
    rows[[17, 42]] = bad
    with pytest.raises(ValueError, match=r"2 of 60 features are zero or not finite \(first ids: \[17, 42\]\)"):
        greedy.checked(here(Rows.of(rows), 3))


def test_features_are_not_modified(tmp_path):
    kept = ROWS.copy()
    found = write_rows(tmp_path / "f", [(np.arange(60), ROWS)], 8, "float32", {})
    before = (tmp_path / "f" / "part-00000.npy").read_bytes()
    for method in METHODS:
        assert [b.id for b in islice(order(method, here(found)), 9)] == picks(method, ROWS, 9)
    assert (kept == ROWS).all() and (tmp_path / "f" / "part-00000.npy").read_bytes() == before


def test_the_mean_has_the_same_bits_however_rows_lie_and_is_exact():
    rows = (np.random.default_rng(1).standard_normal((500, 7)) * [1e-3, 1, 10, 300, 1, 1, 1]).astype(np.float32)
    found = [here(Rows.of(rows[::step]), ranks, chunk) for step, ranks, chunk in ((1, 1, None), (-1, 3, 7), (1, 7, 64))]
    means = [greedy.mean(ranks, greedy.checked(ranks).largest) for ranks in found]
    assert all((m == means[0]).all() for m in means)
    assert np.allclose(means[0], rows.astype(np.float64).mean(axis=0), rtol=0, atol=1e-9)


# -- herding ---------------------------------------------------------------------------------------------------------


def test_herding_is_greedy_matching_of_the_mean_on_rows_of_equal_length():
    assert picks("herding", ROWS, 25) == slow.herding(ROWS, 25)
    assert picks("herding", ROWS, 1) == [int((ROWS.astype(np.float64) @ ROWS.mean(axis=0, dtype=np.float64)).argmax())]


def test_the_explicit_form_matches_the_mean_of_rows_of_any_length():
    rows = (ROWS * np.random.default_rng(5).uniform(0.3, 2, (60, 1))).astype(np.float32)
    ranks = here(Rows.of(rows), 2)
    mu = greedy.mean(ranks, greedy.checked(ranks).largest)
    assert [b.id for b in islice(greedy.herding(ranks, mu, explicit=True), 20)] == slow.herding(rows, 20)
    assert picks("herding", rows, 20) != slow.herding(rows, 20)


def test_herding_has_a_mean_much_nearer_than_random_and_reaches_it_in_the_end():
    rows = slow.unit_rows(600, 16, 1)
    mu = rows.astype(np.float64).mean(axis=0)
    chosen = picks("herding", rows, 600)

    def miss(some):
        return np.linalg.norm(mu - rows[some].astype(np.float64).mean(axis=0))

    draws = [np.random.default_rng(s).permutation(600)[:60] for s in range(20)]
    assert miss(chosen[:60]) < np.mean([miss(d) for d in draws]) / 5
    assert miss(chosen) < 1e-9


# -- k-center --------------------------------------------------------------------------------------------------------


def test_k_center_is_the_farthest_point_each_time():
    found = list(islice(order("k_center", here(Rows.of(ROWS)), seed=4), 20))
    chosen, far = slow.k_center(ROWS, found[0].id, 20)
    assert [b.id for b in found] == chosen
    assert np.allclose([b.value**0.5 for b in found[1:]], far, atol=1e-4)


def test_distances_fall_radii_fall_and_the_last_distance_is_the_least_between_picks():
    found = list(order("k_center", here(Rows.of(ROWS)), seed=1))
    far = [b.value**0.5 for b in found]
    assert all(a >= b for a, b in pairwise(far))
    for k in (2, 5, 30):
        chosen = [b.id for b in found[:k]]
        between = min(np.linalg.norm(ROWS[a] - ROWS[b]) for a in chosen for b in chosen if a != b)
        assert between == pytest.approx(far[k - 1], abs=1e-4)
        assert slow.radius(ROWS, chosen) == pytest.approx(far[k], abs=1e-4) and far[k] <= between


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(4, 12), k=st.integers(1, 3), seed=st.integers(0, 1000), start=st.sampled_from(["random", "mean"])
)
def test_the_radius_is_at_most_twice_the_best(count, k, seed, start):
    rows = slow.unit_rows(count, 3, seed)
    chosen = picks("k_center", rows, k, seed=seed, start=start)
    assert slow.radius(rows, chosen) <= 2 * slow.best_radius(rows, k) + 1e-4


def test_far_apart_blobs_are_each_hit_first():
    centres = 20 * slow.unit_rows(7, 6, 9)
    blob = np.repeat(np.arange(7), 12)
    rows = (centres[blob] + 0.1 * slow.unit_rows(84, 6, 8)).astype(np.float32)
    for seed in range(5):
        assert {int(blob[i]) for i in picks("k_center", rows, 7, seed=seed)} == set(range(7))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_copies_are_picked_only_once_the_radius_is_zero(dtype):
    rows = np.concatenate([slow.unit_rows(9, 5, 3, dtype)] * 3)
    found = list(order("k_center", here(Rows.of(rows), 2, 4)))
    assert {b.id % 9 for b in found[:9]} == set(range(9))
    assert [b.value for b in found[9:]] == [0.0] * 18


def test_the_first_centre_is_drawn_or_nearest_the_mean():
    nearest = np.linalg.norm(ROWS - ROWS.mean(axis=0), axis=1).argmin()
    assert picks("k_center", ROWS, 1, start="mean") == [int(nearest)]
    drawn = {picks("k_center", ROWS, 1, seed=seed)[0] for seed in range(20)}
    assert len(drawn) > 10


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_rows_come_back_from_files_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("rmdd.coresets.rows.ROWS_PER_FILE", 16)
    blocks = ((np.arange(s, min(s + 7, 60)), ROWS[s : s + 7]) for s in range(0, 60, 7))
    found = write_rows(tmp_path / "f", blocks, 8, "float16", {"what": 1})
    assert len(found) == 60 and len(found.parts) > 2 and (found.ids == np.arange(60)).all()
    half = ROWS.astype(np.float16).astype(np.float32)
    assert (np.concatenate([x.copy() for _, x in found.between(5, 41).chunks(4)]) == half[5:41]).all()
    assert (found.at([59, 0, 33]) == half[[59, 0, 33]]).all()
    with pytest.raises(ValueError, match=r"holds no features \(no rows.json\)"):
        Rows.open(tmp_path)
