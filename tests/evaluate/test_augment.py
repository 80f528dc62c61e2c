"""Tests that the augmentations of students are reproducible and that each transform has the right effect."""

import pytest
import torch

from rmdd.core.seeding import generator
from rmdd.data.images import denormalise, normalise
from rmdd.evaluate.augment import CUT, FAMILIES, augmentation, dsa

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def pictures(number=6, size=16):
    g = torch.Generator().manual_seed(0)
    return normalise(torch.randint(0, 256, (number, 3, size, size), generator=g).to(torch.uint8), MEAN, STD)


@pytest.mark.parametrize("name", ["dsa", "randaugment"])
def test_views_depend_on_the_generator_alone(name):
    view, images = augmentation(name, MEAN, STD), pictures()
    first = [view(images, generator(0, "views", i)) for i in range(8)]
    torch.manual_seed(5)
    assert all(torch.equal(view(images, generator(0, "views", i)), first[i]) for i in range(8))
    assert all(v.shape == images.shape and v.dtype == images.dtype and v.isfinite().all() for v in first)
    assert sum(not torch.equal(a, b) for a in first for b in first) > 40 and not torch.equal(first[0], images)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_a_batch_get_different_strengths(name):
    images = pictures(1).expand(6, -1, -1, -1)
    views = FAMILIES[name](images, generator(1, "views"))
    assert any(not torch.equal(views[0], v) for v in views[1:])


def test_dsa_draws_one_family_per_batch():
    images, expected = pictures(), set()
    for i in range(40):
        random = generator(3, "views", i)
        name = list(FAMILIES)[int(torch.randint(len(FAMILIES), (), generator=random))]
        assert torch.equal(dsa(images, generator(3, "views", i)), FAMILIES[name](images, random))
        expected.add(name)
    assert expected == set(FAMILIES)


def test_the_effect_of_each_transform():
    images = pictures(40)
    flipped = FAMILIES["flip"](images, generator(0, "f"))
    either = [torch.equal(v, x) or torch.equal(v, x.flip(2)) for v, x in zip(flipped, images, strict=True)]
    assert all(either) and 8 < sum(torch.equal(v, x) for v, x in zip(flipped, images, strict=True)) < 32
    cut = FAMILIES["cutout"](images, generator(0, "c"))
    erased = (cut != images).any(1).flatten(1).sum(1)
    assert ((cut == images) | (cut == 0)).all() and erased.max() <= (16 * CUT) ** 2 and erased.min() > 0
    cropped = FAMILIES["crop"](torch.ones(40, 3, 16, 16), generator(0, "p"))
    assert set(cropped.unique().tolist()) == {0.0, 1.0} and cropped.mean() > 0.7
    coloured = FAMILIES["colour"](images, generator(0, "k"))
    edges = [x.flatten(1).argmax(1) for x in (images.mean(1), coloured.mean(1))]
    assert torch.equal(*edges), "colour must not move the brightest pixel"
    for name in ("scale", "rotate"):
        still = torch.zeros(1, 3, 17, 17)
        still[..., 8, 8] = 1
        assert FAMILIES[name](still, generator(0, name))[..., 8, 8].min() > 0.5, "the centre of the image must not move"


def test_randaugment_is_that_of_the_experts_on_8_bits():
    images = pictures(20)
    views = augmentation("randaugment", MEAN, STD)(images, generator(0, "r"))
    assert torch.allclose(normalise(denormalise(views, MEAN, STD), MEAN, STD), views, atol=1e-6)


def test_unknown_augmentations_are_rejected():
    with pytest.raises(ValueError, match="unknown augmentation 'mixup'; available: dsa, randaugment"):
        augmentation("mixup")
    with pytest.raises(ValueError, match="give the mean and std"):
        augmentation("randaugment")
