"""Compare cross-covariances with plain sums; check the minimum of the linear loss, and gradients computed in chunks."""

import pytest
import torch

from rmdd.distill.distribution.chunks import gradient_in_chunks
from rmdd.distill.distribution.covariance import covariance_loss, cross_covariance, linear_contrast, mean_loss


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_covariance(image, text):
    n, mean_v, mean_l = len(image), sum(image) / len(image), sum(text) / len(text)
    result = torch.zeros(image.shape[1], text.shape[1], dtype=torch.float64)
    for i in range(n):
        for a in range(image.shape[1]):
            for b in range(text.shape[1]):
                result[a, b] += (image[i, a] - mean_v[a]) * (text[i, b] - mean_l[b]) / (n - 1)
    return result


def test_equals_the_plain_sum():
    image, text = drawn(7, 4), drawn(7, 3, seed=1)
    torch.testing.assert_close(cross_covariance(image, text), slow_covariance(image, text))


def test_one_pair_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 pairs, found 1; raise the batch size"):
        cross_covariance(drawn(1, 4), drawn(1, 3))


def test_losses_against_plain_sums():
    real, own = drawn(4, 3), drawn(4, 3, seed=1)
    slow = sum((2.0 * float(real[a, b]) - float(own[a, b])) ** 2 for a in range(4) for b in range(3))
    assert float(covariance_loss(real, own, 2.0)) == pytest.approx(slow)
    u, v = drawn(5, 3), drawn(2, 3, seed=1)
    slow = sum((sum(float(r[a]) for r in u) / 5 - sum(float(r[a]) for r in v) / 2) ** 2 for a in range(3))
    assert float(mean_loss(u, v)) == pytest.approx(slow)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_learned_heads_reach_the_covariance_over_rho(rho):
    """The loss -Tr(G_v C G_l^T) + rho/2 ||G_v^T G_l||^2 is smallest at G_v^T G_l = C / rho, if the rank allows it."""
    covariance = cross_covariance(drawn(9, 4), drawn(9, 3, seed=1))
    heads = [drawn(5, 4, seed=2).requires_grad_(), drawn(5, 3, seed=3).requires_grad_()]
    optimiser = torch.optim.LBFGS(heads, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = linear_contrast(*heads, covariance, rho)
        loss.backward()
        return loss

    optimiser.step(closure)
    product = heads[0].T @ heads[1]
    torch.testing.assert_close(product.detach(), covariance / rho, atol=1e-5, rtol=1e-5)
    slow = -torch.trace(heads[0] @ covariance @ heads[1].T) + rho / 2 * product.square().sum()
    assert float(linear_contrast(*heads, covariance, rho).detach()) == pytest.approx(float(slow.detach()))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 99])
@pytest.mark.parametrize("learned", [True, False])
def test_the_gradient_in_chunks_equals_the_full_gradient(chunk, learned):
    """Check a loss that depends on all pairs, both for texts that are encoded and for texts used without encoding."""
    w_v, w_l, target = drawn(12, 4), drawn(5, 3, seed=1), drawn(4, 3 if learned else 5, seed=2)
    images, texts = drawn(6, 3, 2, 2, seed=3), drawn(6, 5, seed=4)

    def encode(x, y):
        return (x.flatten(1) @ w_v).tanh(), (y @ w_l).sin() if learned else y

    def loss_of(u, v):
        loss = covariance_loss(target, cross_covariance(u, v), 2.0)
        return loss, {"loss": loss}

    leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
    full, _ = loss_of(*encode(*leaves))
    wanted = torch.autograd.grad(full, leaves)
    *result, parts = gradient_in_chunks(encode, images, texts, loss_of, chunk)
    for a, b in zip(result, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert float(parts["loss"]) == pytest.approx(float(full.detach())) and not parts["loss"].requires_grad
