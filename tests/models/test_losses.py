import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rmdd.models.losses import FLOOR, LOSSES, infonce, wbce


def slow_wbce(logits, similarity):
    """Compute the loss `wbce` (weighted binary cross-entropy of LoRS) entry by entry."""
    size, sums, counts = len(logits), {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for i in range(size):
        for j in range(size):
            p, s = 1 / (1 + math.exp(-logits[i][j])), similarity[i][j]
            positive = s > 0.5
            sums[positive] += -s * math.log(p + 1e-6) - (1 - s) * math.log(1 - p + 1e-6)
            counts[positive] += 1
    return sum(sums[side] / (counts[side] + 1e-6) for side in sums) / 2


def slow_infonce(logits, similarity):
    size, total = len(logits), 0.0
    for i in range(size):
        row = math.log(sum(math.exp(logits[i][j]) for j in range(size)))
        column = math.log(sum(math.exp(logits[j][i]) for j in range(size)))
        for j in range(size):
            total -= similarity[i][j] * (logits[i][j] - row)
            total -= similarity[j][i] * (logits[j][i] - column)
    return total / size / 2


def slow_bce(logits, similarity):
    """Compute the loss `bce` (binary cross-entropy, averaged over all B^2 entries) entry by entry."""
    size, total = len(logits), 0.0
    for i in range(size):
        for j in range(size):
            p, s = 1 / (1 + math.exp(-logits[i][j])), similarity[i][j]
            other = 1 / (1 + math.exp(logits[i][j]))  # this is 1 - p without the rounding error of a subtraction
            total -= s * math.log(p) + (1 - s) * math.log(other)
    return total / size**2


def slow_cwcl(logits, similarity):
    """Compute the loss `cwcl` entry by entry: per image over all texts, then per text over all images."""
    size, total = len(logits), 0.0
    for z, s in ((logits, similarity), (transposed(logits), transposed(similarity))):
        for i in range(size):
            normaliser = math.log(sum(math.exp(z[i][j]) for j in range(size)))
            total -= sum(s[i][j] * (z[i][j] - normaliser) for j in range(size)) / (sum(s[i]) + 1e-6)
    return total / size / 2


def slow_kl(logits, similarity):
    """Compute the loss `kl` entry by entry: per image over all texts, then per text over all images."""
    size, total = len(logits), 0.0
    for z, s in ((logits, similarity), (transposed(logits), transposed(similarity))):
        for i in range(size):
            score_sum, target_sum = (sum(math.exp(x) for x in row) for row in (z[i], [10 * x for x in s[i]]))
            for j in range(size):
                target = math.exp(10 * s[i][j]) / target_sum
                total += target * (math.log(target) - math.log(math.exp(z[i][j]) / score_sum))
    return total / size**2 / 2


def slow_mse(logits, similarity):
    pairs = [(z, s) for row in zip(logits, similarity, strict=True) for z, s in zip(*row, strict=True)]
    return sum((1 / (1 + math.exp(-z)) - s) ** 2 for z, s in pairs) / len(pairs)


def transposed(rows):
    return [list(column) for column in zip(*rows, strict=True)]


SLOW = {
    "wbce": slow_wbce,
    "infonce": slow_infonce,
    "bce": slow_bce,
    "cwcl": slow_cwcl,
    "kl": slow_kl,
    "mse": slow_mse,
}


def draw(seed, size, spread=4.0):
    random = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(size, size, generator=random, dtype=torch.float64)
    similarity = torch.eye(size, dtype=torch.float64) + 0.4 * torch.randn(
        size, size, generator=random, dtype=torch.float64
    )
    return logits, similarity


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 9), name=st.sampled_from(sorted(LOSSES)))
def test_losses_equal_a_double_loop(seed, size, name):
    logits, similarity = draw(seed, size)
    expected = SLOW[name](logits.tolist(), similarity.tolist())
    assert LOSSES[name](logits, similarity).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 9), name=st.sampled_from(sorted(LOSSES)))
def test_the_order_of_pairs_does_not_matter(seed, size, name):
    logits, similarity = draw(seed, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    shuffled = LOSSES[name](logits[order][:, order], similarity[order][:, order])
    torch.testing.assert_close(shuffled, LOSSES[name](logits, similarity), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_in_scores_and_similarity(name):
    logits, similarity = draw(3, 5, spread=1.0)
    inputs = (logits.requires_grad_(), similarity.requires_grad_())
    assert torch.autograd.gradcheck(LOSSES[name], inputs)
    assert torch.autograd.gradgradcheck(LOSSES[name], inputs)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_all_entries_of_an_identity_similarity_get_a_gradient(name):
    similarity = torch.eye(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(LOSSES[name](draw(1, 4)[0].float(), similarity), similarity)
    assert (gradient != 0).all()


def test_infonce_with_an_identity_is_the_symmetric_cross_entropy():
    logits, _ = draw(5, 7)
    labels = torch.arange(7)
    both = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    torch.testing.assert_close(infonce(logits, torch.eye(7, dtype=torch.float64)), both / 2, rtol=1e-12, atol=0)


def test_wbce_is_finite_for_a_saturated_sigmoid():
    wrong = torch.full((3, 3), 1e4) - 2e4 * torch.eye(3)
    value = wbce(wrong, torch.eye(3))
    assert value.item() == pytest.approx(-math.log(FLOOR), rel=1e-3)
    assert wbce(-wrong, torch.eye(3)).item() == pytest.approx(0, abs=1e-5)


def test_wbce_counts_one_half_as_negative_and_works_without_positives():
    logits, _ = draw(2, 3)
    for similarity in (0.5 + 0.5 * torch.eye(3, dtype=torch.float64), torch.full((3, 3), 0.5, dtype=torch.float64)):
        expected = slow_wbce(logits.tolist(), similarity.tolist())
        assert wbce(logits, similarity).item() == pytest.approx(expected, rel=1e-12)


def test_tensor_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        infonce(torch.zeros(2, 3), torch.zeros(2, 3))
