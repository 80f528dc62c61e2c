import pytest
import torch

from rmdd import config
from rmdd.distill import similarity

KINDS = ("full", "low_rank", "identity")


def start(kind, pairs=6, **rule):
    return similarity.initial(config.Similarity(kind=kind, rank=2, **rule), pairs, torch.Generator().manual_seed(0))


def moved(kind, pairs=6):
    random = torch.Generator().manual_seed(1)
    return {n: t + torch.randn(t.shape, generator=random) for n, t in start(kind, pairs).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_the_identity(kind):
    tensors = start(kind)
    assert torch.equal(similarity.dense(tensors, 3.0, torch.zeros(6, 1)), torch.eye(6))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gathered_block_equals_the_block_of_the_matrix(kind):
    tensors, index = moved(kind), torch.tensor([4, 0, 3])
    full = similarity.dense(tensors, 0.7, torch.zeros(6, 1))
    block = similarity.dense(similarity.gather(tensors, index), 0.7, torch.zeros(3, 1))
    torch.testing.assert_close(block, full[index][:, index])


def test_low_rank_equals_the_published_formula():
    t = moved("low_rank")
    expected = torch.empty(6, 6)
    for i in range(6):
        for j in range(6):
            expected[i, j] = (
                0.7 / 2 * sum(t["left"][i, r] * t["right"][j, r] for r in range(2)) + (i == j) * t["scale"][i]
            )
    torch.testing.assert_close(similarity.dense(t, 0.7, torch.zeros(6, 1)), expected)


@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_the_diagonal_is_one_number_or_one_per_pair(kind):
    initial_set = start("low_rank", diagonal=kind)
    assert initial_set["scale"].shape == ((6,) if kind == "vector" else ())
    assert torch.equal(similarity.dense(initial_set, 3.0, torch.zeros(6, 1)), torch.eye(6))
    moved = initial_set | {"scale": initial_set["scale"] * 0.4, "right": torch.ones(6, 2)}
    full = similarity.dense(moved, 0.7, torch.zeros(6, 1))
    expected = 0.4 * torch.eye(6) + 0.7 / 2 * moved["left"] @ moved["right"].T
    torch.testing.assert_close(full, expected)
    index = torch.tensor([4, 0, 3])
    block = similarity.dense(similarity.gather(moved, index), 0.7, torch.zeros(3, 1))
    torch.testing.assert_close(block, full[index][:, index])
    stored = similarity.per_pair(moved)
    assert stored["scale"].shape == (6,) and moved["scale"].shape == initial_set["scale"].shape
    assert torch.equal(similarity.dense(stored, 0.7, torch.zeros(6, 1)), full)


def test_a_scalar_diagonal_gathers_the_gradients_of_all_batches():
    scale = torch.tensor(1.0, requires_grad=True)
    tensors = start("low_rank", diagonal="scalar") | {"scale": scale}
    total = {n: torch.zeros_like(t) for n, t in tensors.items()}
    value = torch.zeros(())
    for index in (torch.tensor([4, 0, 3]), torch.tensor([3, 5])):
        block = similarity.dense(similarity.gather(tensors, index), 0.7, torch.zeros(len(index), 1))
        value = value + block.square().sum()
        parts = similarity.gather({n: t.detach().requires_grad_() for n, t in tensors.items()}, index)
        again = similarity.dense(parts, 0.7, torch.zeros(len(index), 1)).square().sum()
        similarity.scatter_add(total, index, dict(zip(parts, torch.autograd.grad(again, parts.values()), strict=True)))
    torch.testing.assert_close(total["scale"], torch.autograd.grad(value, scale)[0])


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_scatter_is_the_gradient_of_gather(kind):
    tensors = {n: t.requires_grad_() for n, t in moved(kind).items()}
    total = {n: torch.zeros_like(t) for n, t in tensors.items()}
    value = torch.zeros(())
    for index in (torch.tensor([4, 0, 3]), torch.tensor([3, 4, 1])):
        parts = similarity.gather(tensors, index)
        weights = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) for n, p in parts.items()}
        value = value + sum((parts[n] * w).sum() for n, w in weights.items())
        similarity.scatter_add(total, index, weights)
    for result, expected in zip(total.values(), torch.autograd.grad(value, list(tensors.values())), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_has_the_type_of_the_pairs(kind):
    tensors = {n: t.double() for n, t in start(kind).items()}
    assert similarity.dense(tensors, 1.0, torch.zeros(6, 1, dtype=torch.float64)).dtype == torch.float64
