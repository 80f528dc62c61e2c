"""Check synthetic images that are stored smaller than the input of the towers."""

from dataclasses import replace

import pytest
import torch
from toy import CPU, SIZE, encoder, first_set, run_of

from rmdd.distill.synthetic import enlarged, reduced
from rmdd.distill.trajectory.matching import Matcher
from rmdd.methods import matching_method


def test_reduced_pixels_are_means():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = reduced(images, 4)
    for y in range(4):
        for x in range(4):
            cell = images[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            torch.testing.assert_close(small[:, :, y, x], cell.mean(dim=(2, 3)))


def test_images_of_the_right_size_are_unchanged():
    images = torch.randn(2, 3, 8, 8)
    assert enlarged(images, 8) is images and reduced(images, 8) is images


@pytest.mark.parametrize("size", [6, 8])
def test_a_flat_picture_stays_flat(size):
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(enlarged(flat, size), torch.full((1, 3, size, size), 0.3))


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_the_gradient_of_small_images_is_the_backpropagated_gradient_of_large_ones(store, estimator):
    whole = replace(first_set(), images=first_set().images[:, :, ::2, ::2].clone())
    large = replace(whole, images=enlarged(whole.images, SIZE))
    matcher = Matcher(matching_method(run_of(estimator=estimator, stored_size=SIZE // 2)), 0, store, encoder(), CPU)
    drawn = matcher.draw(0)
    result, from_large = (matcher.gradient(s, drawn).gradient for s in (whole, large))
    small = whole.images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(enlarged(small, SIZE), small, from_large.images)
    torch.testing.assert_close(result.images, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.texts, from_large.texts)
