"""Compare MDM's losses on the sphere with slow float64 loops over all points; check edge cases like equal points."""

import itertools
import math

import pytest
import torch

from rmdd.distill.distribution.sphere import agreement, contrastive, discrepancy, energy, kernel, unit

D = 5


def points(n, seed, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, D, generator=random, dtype=dtype), dim=1)


def slow_kernel(a, b, sigma, kind):
    cosine = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    if kind == "chordal":
        return math.exp(-sum(float(x - y) ** 2 for x, y in zip(a, b, strict=True)) / (2 * sigma**2))
    phi = math.acos(max(-1 + 1e-6, min(1 - 1e-6, cosine)))
    return math.exp(-phi / sigma) if kind == "laplacian" else math.exp(-(phi**2) / (2 * sigma**2))


def slow_energy(a, b, sigma, kind, statistic, root):
    def mean(xs, ys, skip):
        places = [(i, j) for i in range(len(xs)) for j in range(len(ys)) if not (skip and i == j)]
        return sum(slow_kernel(xs[i], ys[j], sigma, kind) for i, j in places) / len(places)

    own = statistic == "u"
    squared = mean(a, a, own) + mean(b, b, own) - 2 * mean(a, b, False)
    return math.sqrt(max(squared, 0) + 1e-8) if root else squared


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("statistic", ["v", "u"])
@pytest.mark.parametrize("kind", ["geodesic", "laplacian", "chordal"])
def test_energy_is_the_double_loop(kind, statistic, root):
    a, b = points(6, 0), points(4, 1)
    result = energy(a, b, 0.7, kind, statistic, root)
    assert result.item() == pytest.approx(slow_energy(a, b, 0.7, kind, statistic, root), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["geodesic", "laplacian", "chordal"])
def test_the_gradient_of_the_energy_is_that_of_finite_differences(kind):
    a = points(4, 2)
    assert torch.autograd.gradcheck(lambda b: energy(a, unit(b), 0.7, kind), points(3, 3).requires_grad_())


def test_joint_features_equal_the_published_formula():
    v, t = points(6, 4), points(6, 5)
    for made, sign in ((agreement(v, t), 1), (discrepancy(v, t), -1)):
        for row, (x, y) in zip(made, zip(v, t, strict=True), strict=True):
            length = math.sqrt(2 + sign * 2 * float(x @ y))
            assert row.tolist() == pytest.approx(((x + sign * y) / length).tolist(), abs=1e-5)
    assert (agreement(v, t) * discrepancy(v, t)).sum(dim=1).abs().max() < 1e-12, "they are orthogonal"


def test_contrastive_is_the_double_loop():
    v, t, tau = points(5, 6), points(5, 7), 0.3
    z = [[float(x @ y) / tau for y in t] for x in v]
    rows = [-z[i][i] + math.log(sum(math.exp(c) for c in z[i])) for i in range(5)]
    columns = [-z[i][i] + math.log(sum(math.exp(z[j][i]) for j in range(5))) for i in range(5)]
    assert contrastive(v, t, tau).item() == pytest.approx((sum(rows) + sum(columns)) / 10, rel=1e-12)


@pytest.mark.parametrize("statistic", ["v", "u"])
def test_energy_is_invariant_to_order_and_rotation(statistic):
    a, b = points(6, 8), points(4, 9)
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    full = energy(a, b, 0.5, statistic=statistic)
    torch.testing.assert_close(energy(a @ q, b @ q, 0.5, statistic=statistic), full)
    torch.testing.assert_close(energy(a.flip(0), b[[2, 0, 3, 1]], 0.5, statistic=statistic), full)


def test_the_energy_of_equal_sets_is_the_floor():
    a = points(6, 10)
    assert energy(a, a, 0.5, root=False).abs() < 1e-12
    assert energy(a, a, 0.5).item() == pytest.approx(1e-4), "the energy of equal sets is the square root of FLOOR"


def test_two_samples_of_one_distribution_have_a_gradient_by_the_v_statistic_and_may_have_none_by_the_u():
    a, dead = points(8, 11), []
    for seed in range(12, 20):
        b = points(8, seed).requires_grad_()
        (v,) = torch.autograd.grad(energy(a, b, 0.5), b)
        (u,) = torch.autograd.grad(energy(a, b, 0.5, statistic="u"), b)
        assert v.norm() > 1e-3
        dead.append(bool((u == 0).all()))
    assert any(dead)


def test_kernels_of_blocks_are_blocks_of_the_kernel():
    a, b = points(6, 20), points(5, 21)
    rows = [torch.cat([kernel(x, y, 0.5) for y in b.split(2)], dim=1) for x in a.split(4)]
    torch.testing.assert_close(torch.cat(rows), kernel(a, b, 0.5))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_and_opposite_points_have_finite_gradients(sign, dtype):
    a = points(1000, 22, dtype)
    b = (sign * a).requires_grad_()
    k = kernel(a, b, 0.5)
    (gradient,) = torch.autograd.grad(k.diagonal().sum(), b)
    assert torch.isfinite(k).all() and torch.isfinite(gradient).all()
    assert k.diagonal().mean().item() == pytest.approx(1 if sign > 0 else math.exp(-2 * math.pi**2), abs=1e-4)


@pytest.mark.parametrize("joint", [agreement, discrepancy])
def test_joint_features_of_one_direction_have_small_gradients(joint):
    v = points(3, 23, torch.float32)
    t = (-v if joint is agreement else v.clone()).requires_grad_()
    made = joint(v, t)
    for i, j in itertools.product(range(3), range(D)):
        (gradient,) = torch.autograd.grad(made[i, j], t, retain_graph=True)
        assert gradient.abs().max() <= 1e3 + 1
