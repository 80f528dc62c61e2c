from itertools import islice, pairwise

import features as slow
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd.coresets import greedy
from rmdd.coresets.rows import Rows, write_rows
from rmdd.coresets.shard import split_rows

ROWS = slow.unit_rows(60, 8)
METHODS = ("herding", "k_center")


def order(method, ranks, earlier=(), seed=0, start="random"):
    mu = greedy.mean(ranks, greedy.checked(ranks).largest)
    if method == "herding":
        return greedy.herding(ranks, mu, earlier)
    return greedy.k_center(ranks, greedy.start_of(ranks, start, seed, mu), earlier)


def picks(method, rows, k, *, ids=None, ranks=1, chunk=None, **options):
    result = split_rows(Rows.of(rows, ids), ranks, chunk)
    return [best.id for best in islice(order(method, result, **options), k)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 7, 60])
def test_picks_are_distinct_and_end_when_no_item_is_left(method, k):
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
def test_results_do_not_depend_on_chunks_ranks_and_order(count, chunk, ranks, method, seed, dtype):
    rows = slow.unit_rows(count, 5, seed, dtype)
    full = [(b.value, b.id) for b in order(method, split_rows(Rows.of(rows)), seed=seed)]
    shuffled = np.random.default_rng(seed).permutation(count)
    cut = split_rows(Rows.of(rows[shuffled], shuffled), ranks, chunk)
    assert [(b.value, b.id) for b in order(method, cut, seed=seed)] == full


@pytest.mark.parametrize("method", METHODS)
def test_smaller_choices_are_prefixes_and_resuming_changes_nothing(method):
    full = [(b.value, b.id) for b in islice(order(method, split_rows(Rows.of(ROWS))), 20)]
    for done in (1, 2, 13):
        rest = order(method, split_rows(Rows.of(ROWS), 2), earlier=[number for _, number in full[:done]])
        assert [(b.value, b.id) for b in islice(rest, 20 - done)] == full[done:]


@pytest.mark.parametrize("method", METHODS)
def test_a_rotation_of_the_space_changes_nothing(method):
    turn, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))
    assert picks(method, (ROWS @ turn).astype(np.float32), 30) == picks(method, ROWS, 30)


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_smallest_id(method):
    rows = np.repeat(slow.unit_rows(6, 4, 2), 3, axis=0)
    ids = np.random.default_rng(0).permutation(18)
    chosen = picks(method, rows, 18, ids=ids, ranks=3, start="mean")
    group = {int(number): place // 3 for place, number in enumerate(ids)}
    for g in range(6):
        of_group = [i for i in chosen if group[i] == g]
        assert of_group == sorted(of_group)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_zero_or_infinite_rows_are_named(bad):
    rows = ROWS.copy()
    rows[[17, 42]] = bad
    with pytest.raises(ValueError, match=r"2 of 60 features are zero or not finite \(first ids: \[17, 42\]\)"):
        greedy.checked(split_rows(Rows.of(rows), 3))


def test_features_are_not_modified(tmp_path):
    kept = ROWS.copy()
    result = write_rows(tmp_path / "f", [(np.arange(60), ROWS)], 8, "float32", {})
    before = (tmp_path / "f" / "part-00000.npy").read_bytes()
    for method in METHODS:
        assert [b.id for b in islice(order(method, split_rows(result)), 9)] == picks(method, ROWS, 9)
    assert (kept == ROWS).all() and (tmp_path / "f" / "part-00000.npy").read_bytes() == before


def test_the_mean_is_exact_and_independent_of_row_order():
    rows = (np.random.default_rng(1).standard_normal((500, 7)) * [1e-3, 1, 10, 300, 1, 1, 1]).astype(np.float32)
    result = [
        split_rows(Rows.of(rows[::step]), ranks, chunk) for step, ranks, chunk in ((1, 1, None), (-1, 3, 7), (1, 7, 64))
    ]
    means = [greedy.mean(ranks, greedy.checked(ranks).largest) for ranks in result]
    assert all((m == means[0]).all() for m in means)
    assert np.allclose(means[0], rows.astype(np.float64).mean(axis=0), rtol=0, atol=1e-9)


# -- herding ---------------------------------------------------------------------------------------------------------


def test_herding_is_greedy_matching_of_the_mean_on_rows_of_equal_length():
    assert picks("herding", ROWS, 25) == slow.herding(ROWS, 25)
    assert picks("herding", ROWS, 1) == [int((ROWS.astype(np.float64) @ ROWS.mean(axis=0, dtype=np.float64)).argmax())]


def test_the_explicit_form_matches_the_mean_of_rows_of_any_length():
    rows = (ROWS * np.random.default_rng(5).uniform(0.3, 2, (60, 1))).astype(np.float32)
    ranks = split_rows(Rows.of(rows), 2)
    mu = greedy.mean(ranks, greedy.checked(ranks).largest)
    assert [b.id for b in islice(greedy.herding(ranks, mu, explicit=True), 20)] == slow.herding(rows, 20)
    assert picks("herding", rows, 20) != slow.herding(rows, 20)


def test_herding_approaches_the_mean_faster_than_random_picks():
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
    result = list(islice(order("k_center", split_rows(Rows.of(ROWS)), seed=4), 20))
    chosen, far = slow.k_center(ROWS, result[0].id, 20)
    assert [b.id for b in result] == chosen
    assert np.allclose([b.value**0.5 for b in result[1:]], far, atol=1e-4)


def test_distances_fall_radii_fall_and_the_last_distance_is_the_least_between_picks():
    result = list(order("k_center", split_rows(Rows.of(ROWS)), seed=1))
    far = [b.value**0.5 for b in result]
    assert all(a >= b for a, b in pairwise(far))
    for k in (2, 5, 30):
        chosen = [b.id for b in result[:k]]
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


def test_the_first_picks_cover_separate_blobs():
    centres = 20 * slow.unit_rows(7, 6, 9)
    blob = np.repeat(np.arange(7), 12)
    rows = (centres[blob] + 0.1 * slow.unit_rows(84, 6, 8)).astype(np.float32)
    for seed in range(5):
        assert {int(blob[i]) for i in picks("k_center", rows, 7, seed=seed)} == set(range(7))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_copies_are_picked_only_once_the_radius_is_zero(dtype):
    rows = np.concatenate([slow.unit_rows(9, 5, 3, dtype)] * 3)
    result = list(order("k_center", split_rows(Rows.of(rows), 2, 4)))
    assert {b.id % 9 for b in result[:9]} == set(range(9))
    assert [b.value for b in result[9:]] == [0.0] * 18


def test_the_first_centre_is_drawn_or_nearest_the_mean():
    nearest = np.linalg.norm(ROWS - ROWS.mean(axis=0), axis=1).argmin()
    assert picks("k_center", ROWS, 1, start="mean") == [int(nearest)]
    drawn = {picks("k_center", ROWS, 1, seed=seed)[0] for seed in range(20)}
    assert len(drawn) > 10


# -- feature rows on disk ---------------------------------------------------------------------------------------------


def test_rows_are_read_back_from_files_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("rmdd.coresets.rows.ROWS_PER_FILE", 16)
    blocks = ((np.arange(s, min(s + 7, 60)), ROWS[s : s + 7]) for s in range(0, 60, 7))
    result = write_rows(tmp_path / "f", blocks, 8, "float16", {"what": 1})
    assert len(result) == 60 and len(result.parts) > 2 and (result.ids == np.arange(60)).all()
    half = ROWS.astype(np.float16).astype(np.float32)
    assert (np.concatenate([x.copy() for _, x in result.between(5, 41).chunks(4)]) == half[5:41]).all()
    assert (result.at([59, 0, 33]) == half[[59, 0, 33]]).all()
    with pytest.raises(ValueError, match=r"holds no features \(no rows.json\)"):
        Rows.open(tmp_path)
