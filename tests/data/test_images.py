import io

import numpy as np
import pytest
import torch
from PIL import Image

from rmdd.data.decode import FORMATS, is_rotated
from rmdd.data.images import ImageError, decode, denormalise, normalisation, normalise, squash

WHITE = (255, 255, 255)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(data, **options):
    return decode(data, **({"max_pixels": 10_000, "background": WHITE} | options))


def pixel(data, **options):
    image = opened(data, **options)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def palette_with_hole():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 10, 20])
    return encoded(image, transparency=1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3))), (1, 2, 3)),
        (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(Image.new("LA", (4, 4), (10, 0))), (0, 128, 255)),
        (encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 0))), (0, 128, 255)),
        (encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 255))), (200, 0, 0)),
        (palette_with_hole(), (0, 128, 255)),
        (encoded(Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16))), (100, 100, 100)),
        (encoded(Image.new("RGB", (4, 4), (5, 6, 7)), "BMP"), (5, 6, 7)),
    ],
    ids=["rgb", "grey", "bits", "grey-alpha", "rgba-clear", "rgba-opaque", "palette", "16-bit", "bmp"],
)
def test_every_mode_becomes_rgb_on_the_background(data, expected):
    assert pixel(data, background=(0, 128, 255)) == expected


def test_cmyk_and_lossy_formats():
    ink, red_light = Image.new("CMYK", (16, 16), (0, 255, 255, 0)), Image.new("RGB", (16, 16), (255, 0, 0))
    for kind, image in [("JPEG", ink), ("TIFF", ink), ("JPEG", red_light), ("WEBP", red_light), ("GIF", red_light)]:
        red, green, blue = pixel(encoded(image, kind))
        assert red > 200 and green < 60 and blue < 60, kind


def test_exif_orientation_is_followed_by_default():
    image = Image.new("RGB", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif)
    assert opened(data).size == (2, 6) and is_rotated(data)
    assert opened(data, exif_orientation=False).size == (6, 2)
    assert not is_rotated(encoded(image, "JPEG")) and not is_rotated(b"no image")


def test_avif_jpeg_2000_and_two_images_in_a_jpeg_are_decoded():
    red_light = Image.new("RGB", (16, 16), (255, 0, 0))
    for kind, options in {"AVIF": {}, "JPEG2000": {}, "MPO": {"save_all": True, "append_images": [noise(16)]}}.items():
        red, green, blue = pixel(encoded(red_light, kind, **options))
        assert red > 200 and green < 60 and blue < 60, kind


def test_every_format_of_the_list_is_known_to_pillow():
    """Pillow raises `KeyError` for an unknown name before it tries the formats after it."""
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


def noise(side=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"hello", "undecodable"),
        (encoded(noise())[:1000], "truncated"),
        (encoded(noise(), "JPEG")[:600], "truncated"),
        (encoded(Image.new("RGB", (101, 100))), "too_large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "unsupported"),
    ],
)
def test_bad_bytes_have_a_reason(data, reason):
    with pytest.raises(ImageError) as error:
        opened(data)
    assert error.value.reason == reason
    assert reason in str(error.value)


def test_the_detail_of_an_unreadable_image_says_what_it_begins_with_or_how_to_convert_it():
    with pytest.raises(ImageError, match="15 bytes of unknown image format that begin with b'<!doctype ht'"):
        opened(b"<!doctype html>")
    with pytest.raises(ImageError, match="cannot read HEIC: convert it to JPEG"):
        opened(b"\0\0\0\x18ftypheic" + bytes(99))


def test_a_decompression_bomb_is_refused_before_its_pixels_are_decoded():
    header_only = encoded(Image.new("1", (40_000, 40_000)))[:60]
    with pytest.raises(ImageError, match="too_large"):
        opened(header_only)
    with pytest.raises(ImageError, match="PIL's own limit"):
        opened(header_only, max_pixels=10**10)


def test_errors_survive_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("truncated", "half")))
    assert (error.reason, error.detail) == ("truncated", "half")


def test_squash_does_not_preserve_the_aspect_ratio():
    image = Image.new("RGB", (30, 10), (10, 20, 30))
    pixels = squash(image, 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    same = noise()
    assert (squash(same, 32) == np.asarray(same).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("name", ["clip", "imagenet", "half", ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))])
def test_normalise_round_trips(name):
    mean, std = normalisation(name)
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    values = normalise(images, mean, std)
    assert torch.equal(denormalise(values, mean, std), images)
    assert values[0, 0, 0, 0].item() == pytest.approx(-mean[0] / std[0])
    assert denormalise(values * 100, mean, std).max() == 255


def test_unknown_normalisations_are_refused():
    with pytest.raises(ValueError, match="clip, imagenet, half"):
        normalisation("none")
    with pytest.raises(ValueError, match="three means"):
        normalisation(((0.0, 0.0), (1.0, 1.0)))
