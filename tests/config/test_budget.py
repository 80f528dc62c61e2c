import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmdd.config.budget import check, cost, largest, pair_parameters, similarity_parameters, split

PAPER = {"image_size": 224, "text_width": 768}


def test_the_numbers_in_one_pair_are_those_of_the_papers():
    assert pair_parameters(224, 768) == 151_296


@pytest.mark.parametrize(
    ("budget", "rank", "parameters"),
    [(100, 10, 2_079), (200, 5, 2_189), (500, 20, 20_459), (200, 20, 8_159), (500, 40, 40_419)],
)
def test_a_low_rank_similarity_costs_one_pair_as_in_lors(budget, rank, parameters):
    assert largest(budget, **PAPER, kind="low_rank", rank=rank) == budget - 1
    assert similarity_parameters(budget - 1, "low_rank", rank) == parameters


@pytest.mark.parametrize(
    ("pairs", "budget", "parameters"),
    [((99,), 100, 9_801), ((99, 100), 200, 19_801), ((200, 299), 500, 129_401), ((332, 332, 333), 1000, 331_337)],
)
def test_the_full_similarities_of_ptm_st_fit_their_budgets(pairs, budget, parameters):
    assert sum(similarity_parameters(m, "full") for m in pairs) == parameters
    assert check(pairs, budget, **PAPER, kind="full") is None
    assert largest(budget, **PAPER, kind="full", phases=len(pairs)) == sum(pairs)


def test_ptm_st_on_coco_with_1000_pairs_exceeds_its_budget():
    pairs = (200, 299, 499)
    message = check(pairs, 1000, **PAPER, kind="full")
    assert message is not None
    for words in ("200+299+499 = 998", "378,402", "over by 75,816", "333+332+332 = 997"):
        assert words in message
    rates = 6  # the published table does not count the learning rates
    assert cost(pairs, 224, 768, "full") - 1000 * 151_296 - rates == 75_810


def test_a_single_full_matrix_costs_one_pair_up_to_388():
    assert check((388,), 389, **PAPER, kind="full") is None
    assert "at most 388 pairs fit; set phases.0.pairs to 388" in str(check((389,), 390, **PAPER, kind="full"))


def test_pairs_without_a_learned_similarity_have_no_extra_cost():
    assert cost((10,), 8, 4, "identity") == 10 * 196
    assert largest(10, 8, 4, "identity") == 10


def test_the_error_if_no_phases_fit_the_budget():
    assert "use fewer phases" in str(check((2, 2, 2), 4, **PAPER, kind="full"))


@given(
    budget=st.integers(1, 3000),
    size=st.integers(8, 64),
    width=st.integers(1, 512),
    kind=st.sampled_from(["full", "low_rank", "identity"]),
    rank=st.integers(1, 20),
    phases=st.integers(1, 4),
)
def test_the_largest_number_of_pairs_fits_and_one_more_does_not(budget, size, width, kind, rank, phases):
    n = largest(budget, size, width, kind, rank, phases)
    if n:
        assert check(split(n, phases), budget, size, width, kind, rank) is None
    assert check(split(n + 1, phases), budget, size, width, kind, rank) is not None


def test_smaller_stored_images_allow_more_pairs():
    unit, small = 3 * 32**2 + 384, 3 * 16**2 + 384
    fits = largest(100, 32, 384, "low_rank", 4, stored_size=16)
    assert fits * (small + 1 + 2 * 4) + 2 <= 100 * unit < (fits + 1) * (small + 1 + 2 * 4) + 2
    assert fits == 297 and check((297,), 100, 32, 384, "low_rank", 4, stored_size=16) is None
    assert "at most 297 pairs fit" in str(check((298,), 100, 32, 384, "low_rank", 4, stored_size=16))
