import numpy as np
import pytest
import torch
from PIL import Image

from rmdd.config import NO_AUGMENT, Augment
from rmdd.data.augment import OPERATIONS, augment, autocontrast
from rmdd.data.images import squash


def picture(low=0, high=256, size=(20, 14), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(low, high, (size[1], size[0], 3), dtype=np.uint8))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_gives_the_same_view():
    views = [augment(picture(), Augment(), 16, seeded(s)) for s in (1, 1, 2)]
    assert views[0].shape == (3, 16, 16) and views[0].dtype == np.uint8
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


def test_augmentation_off_equals_the_evaluation_transform():
    image = picture()
    assert (augment(image, NO_AUGMENT, 16, seeded()) == squash(image, 16)).all()
    idle = Augment(crop=False, flip=0, randaugment_ops=2, randaugment_probability=0)
    assert (augment(image, idle, 16, seeded()) == squash(image, 16)).all()


def test_flip_mirrors():
    image = picture()
    flipped = augment(image, Augment(crop=False, flip=1, randaugment_ops=0), 16, seeded())
    assert (flipped == squash(image, 16)[:, :, ::-1]).all()


def test_crops_respect_their_scale_and_ratio():
    from rmdd.data.augment import _crop_box

    rule, draws = Augment(), seeded()
    for size in [(100, 80), (80, 100), (300, 20), (1, 1)]:
        for _ in range(50):
            left, top, right, bottom = _crop_box(size, rule, draws)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    areas = []
    for _ in range(200):
        left, top, right, bottom = _crop_box((1000, 1000), rule, draws)
        areas.append((right - left) * (bottom - top) / 1e6)
        assert 0.74 < (right - left) / (bottom - top) < 1.34
    assert 0.49 < min(areas) < 0.55 and 0.9 < max(areas) <= 1.0


@pytest.mark.parametrize(("low", "high"), [(0, 256), (50, 201), (130, 251), (200, 202)])
def test_autocontrast_equals_a_slow_stretch(low, high):
    image = picture(low, high)
    pixels = np.asarray(image)
    slow = np.empty_like(pixels)
    for c in range(3):
        channel = pixels[:, :, c]
        least, most = int(channel.min()), int(channel.max())
        for y in range(channel.shape[0]):
            for x in range(channel.shape[1]):
                value = int(channel[y, x])
                slow[y, x, c] = round((value - least) * 255 / (most - least)) if most > least else value
    assert (np.asarray(autocontrast(image)) == slow).all()


def test_autocontrast_does_not_change_a_constant_channel():
    image = Image.new("RGB", (4, 4), (200, 0, 255))
    assert (np.asarray(autocontrast(image)) == np.asarray(image)).all()


def test_operations_at_the_published_magnitude():
    image = picture(20, 200, size=(16, 16))
    names = [
        "identity", "autocontrast", "brightness", "sharpness", "equalize",
        "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    ]  # fmt: skip
    assert list(OPERATIONS) == names
    for name, operation in OPERATIONS.items():
        result = operation(image, 0.5, seeded())
        assert result.size == image.size and result.mode == "RGB"
        untouched = (np.asarray(result) == np.asarray(image)).all()
        assert untouched == (name in ("identity", "brightness", "sharpness"))


def test_translation_moves_by_whole_pixels_over_grey():
    image = picture(size=(16, 16))
    moved = np.asarray(OPERATIONS["translate_x"](image, 0.5, seeded()))
    pixels = np.asarray(image)
    right = (moved[:, 5:] == pixels[:, :-5]).all() and (moved[:, :5] == 128).all()
    left = (moved[:, :-5] == pixels[:, 5:]).all() and (moved[:, -5:] == 128).all()
    assert right or left
