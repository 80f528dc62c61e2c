"""Compare characteristic functions with double loops over points and frequencies; check properties from the paper."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd.distill.distribution.characteristic import (
    FLOOR,
    REPEATS,
    FrequencyNet,
    characteristic,
    frequency_count_error,
    ncfd,
    terms,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_phi(points, t):
    total = 0j
    for a in points.tolist():
        total += cmath.exp(1j * sum(x * y for x, y in zip(a, t.tolist(), strict=True)))
    return total / len(points)


def slow_ncfd(real, synthetic, frequencies, w_amplitude, w_phase):
    total = 0.0
    for t in frequencies:
        r, s = slow_phi(real, t), slow_phi(synthetic, t)
        amplitude = (abs(r) - abs(s)) ** 2
        phase = 2 * abs(r) * abs(s) * (1 - math.cos(cmath.phase(r) - cmath.phase(s)))
        total += math.sqrt(w_amplitude * amplitude + w_phase * phase)
    return total / len(frequencies)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 1.0), (0.8, 0.2), (0.3, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_equals_the_double_loop(weights):
    real, synthetic, t = drawn(9, 4), 0.5 + drawn(5, 4, seed=1), drawn(7, 4, seed=2)
    assert float(ncfd(real, synthetic, t, *weights)) == pytest.approx(slow_ncfd(real, synthetic, t, *weights), rel=1e-6)


def test_amplitude_and_phase_add_up_to_the_squared_distance():
    a, b = characteristic(drawn(9, 4), drawn(7, 4, seed=2)), characteristic(drawn(5, 4, seed=1), drawn(7, 4, seed=2))
    torch.testing.assert_close(sum(terms(a, b)), (a - b).square().sum(dim=1), atol=3 * FLOOR, rtol=0)


def test_equal_weights_equal_the_two_term_form():
    real, synthetic, t = drawn(9, 4), drawn(5, 4, seed=1), drawn(7, 4, seed=2)
    a, b = characteristic(real, t), characteristic(synthetic, t)
    amplitude, phase = terms(a, b)
    general = (0.5 * amplitude + 0.5 * phase + FLOOR).sqrt().mean()
    assert float(ncfd(real, synthetic, t)) == pytest.approx(float(general), rel=1e-7)


def test_the_discrepancy_of_equal_sets_is_the_floor():
    a, t = drawn(9, 4), drawn(7, 4, seed=2)
    for weights in ((0.5, 0.5), (0.8, 0.2)):
        points = a.clone().requires_grad_()
        result = ncfd(a, points, t, *weights)
        assert float(result.detach()) == pytest.approx(FLOOR**0.5, rel=0.3)
        (grad,) = torch.autograd.grad(result, points)
        assert torch.isfinite(grad).all()


def test_a_translated_set_differs_only_in_phase():
    a, t = drawn(9, 4), drawn(7, 4, seed=2)
    amplitude, phase = terms(characteristic(a, t), characteristic(a + 0.7, t))
    assert amplitude.max() < 1e-12 and phase.max() > 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_order_and_repetition_of_rows_change_nothing(rows, times, seed):
    a, b, t = drawn(rows, 3, seed=seed), drawn(4, 3, seed=seed + 1), drawn(5, 3, seed=seed + 2)
    again = a.repeat(times, 1)[torch.randperm(rows * times, generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(ncfd(b, again, t), ncfd(b, a, t), rtol=1e-7, atol=1e-9)


def test_a_single_point_has_modulus_one():
    phi = characteristic(drawn(1, 4), drawn(50, 4, seed=1))
    torch.testing.assert_close(phi.square().sum(dim=1), torch.ones(50, dtype=torch.float64))


def test_a_modulus_of_zero_has_a_finite_gradient():
    """The set of the two points 0 and pi has Phi(1) = 0, because exp(0) + exp(i pi) = 0."""
    points = torch.tensor([[0.0], [math.pi]], dtype=torch.float64, requires_grad=True)
    for weights in ((0.5, 0.5), (0.8, 0.2)):
        (grad,) = torch.autograd.grad(
            ncfd(drawn(5, 1), points, torch.ones(1, 1, dtype=torch.float64), *weights), points
        )
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2)])
def test_gradients_in_points_and_frequencies(weights):
    real, points, t = drawn(6, 3), drawn(4, 3, seed=1).requires_grad_(), drawn(5, 3, seed=2).requires_grad_()
    torch.autograd.gradcheck(lambda p, f: ncfd(real, p, f, *weights), (points, t))


def net(width=4, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FrequencyNet(width, **{"norm": "layer", **options})


def test_a_row_scales_fresh_noise_or_is_repeated():
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    assert len(net(norm="batch", repeat=True)(512, draw()).detach().unique(dim=0)) == 512 // REPEATS
    made = net()(64, draw())
    assert made.shape == (64, 4) and len(made.detach().unique(dim=0)) == 64
    random = draw()
    torch.randn(4, 4, generator=random)
    noise = torch.randn(64, 4, generator=random)
    torch.testing.assert_close(made / noise, net(repeat=True)(64, draw()), rtol=1e-4, atol=1e-5)
    assert torch.equal(made, net()(64, draw())), "equal generators give equal frequencies"
    assert net(repeat=True)(64, draw()).abs().max() <= 1, "tanh"


def test_a_learned_scale_reaches_higher_frequencies():
    psi = net(learned_scale=True)
    psi.log_scale.data.fill_(math.log(3.0))
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    torch.testing.assert_close(psi(32, draw()), 3 * net()(32, draw()))
    assert not net().log_scale.requires_grad


def test_batch_norm_needs_two_rows():
    assert frequency_count_error(16, "layer") is None and frequency_count_error(32, "batch") is None
    assert "a multiple of 16, at least 32" in frequency_count_error(16, "batch")
    assert "a multiple of 16, at least 16" in frequency_count_error(40, "layer")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(norm="batch")(16, torch.Generator())
    assert net()(16, torch.Generator()).shape == (16, 4)


def test_a_step_of_the_network_raises_and_a_step_of_the_points_lowers():
    real, points = drawn(30, 4).float(), (0.3 + drawn(5, 4, seed=1)).float().requires_grad_()
    psi, draw = net(), lambda: torch.Generator().manual_seed(5)
    before = ncfd(real, points, psi(64, draw()))
    for p, g in zip(psi.layers.parameters(), torch.autograd.grad(before, list(psi.layers.parameters())), strict=True):
        p.data += 0.05 * g
    raised = ncfd(real, points, psi(64, draw()))
    assert float(raised.detach()) > float(before.detach())
    (grad,) = torch.autograd.grad(raised, points)
    assert float(ncfd(real, points - 0.05 * grad, psi(64, draw())).detach()) < float(raised.detach())
