"""Diffusion decoders with tiny random weights, and the files to which generated images are written."""

import functools

import numpy as np
import pytest
import tiny_parts
import torch
from PIL import Image

from rmdd.generate.decode import Karlo, PictureWriter, StableUnclip, is_drawn, picture_of, read_requests, write_requests

CPU = torch.device("cpu")
WIDTH = {StableUnclip: tiny_parts.D, Karlo: 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    return {StableUnclip: tiny_parts.stable_unclip(root / "unclip"), Karlo: tiny_parts.karlo(root / "karlo")}


@pytest.fixture(scope="module")
def unclip(folders):
    return StableUnclip(folders[StableUnclip], CPU, steps=2)


def requests(count, width, seed=0):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    return [{"index": i, "seed": seed, "caption": f"thing {i}", "embedding": rows[i]} for i in range(count)]


def pixels(images):
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("kind", [StableUnclip, Karlo])
def test_images_depend_only_on_their_request_and_seed(folders, kind):
    decoder, batch = kind(folders[kind], CPU, steps=2), requests(3, WIDTH[kind])
    together = pixels(decoder.decode(batch))
    assert len({image.tobytes() for image in together}) == 3 and together[0].shape[2] == 3
    again = pixels(kind(folders[kind], CPU, steps=2).decode(batch))
    assert all((a == b).all() for a, b in zip(together, again, strict=True))
    swapped = pixels(decoder.decode([batch[2], batch[0]]))  # in a different batch, only rounding changes an image
    assert np.abs(swapped[0].astype(int) - together[2]).max() <= 1
    other = pixels(decoder.decode(requests(3, WIDTH[kind], seed=1)))
    assert not any((a == b).all() for a, b in zip(together, other, strict=True))


def test_unclip_reads_the_embedding_and_the_caption(unclip):
    (first, *_), plain = requests(1, tiny_parts.D), {}
    for name, value in (("caption", "something else"), ("embedding", -first["embedding"]), ("none", None)):
        plain[name] = pixels(unclip.decode([first | {name: value}]))[0]
    assert not (plain["caption"] == plain["none"]).all() and not (plain["embedding"] == plain["none"]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_reaches_every_part(folders, dtype):
    half, (request,) = StableUnclip(folders[StableUnclip], CPU, steps=2, dtype=dtype), requests(1, tiny_parts.D)
    assert {p.dtype for name in ("unet", "vae", "text_encoder") for p in getattr(half.pipeline, name).parameters()} == {
        getattr(torch, dtype)
    }
    (image,) = pixels(half.decode([request]))
    assert image.shape == (16, 16, 3) and image.std() > 1 and (image == pixels(half.decode([request]))[0]).all()


def test_wrong_widths_and_non_finite_embeddings_are_refused(unclip):
    with pytest.raises(ValueError, match="the decoder takes embeddings of width 24, found 25"):
        unclip.decode(requests(1, 25))
    (broken,) = requests(1, tiny_parts.D)
    with pytest.raises(ValueError, match="embedding of pair 0 is not finite"):
        unclip.decode([broken | {"embedding": broken["embedding"] * torch.nan}])


def test_non_finite_images_are_refused(folders):
    broken = StableUnclip(folders[StableUnclip], CPU, steps=1)
    torch.nn.init.constant_(broken.pipeline.vae.decoder.conv_out.bias, torch.nan)
    with pytest.raises(ValueError, match=r"the image of pair 0 is not finite; use dtype bfloat16"):
        broken.decode(requests(1, tiny_parts.D))


class StripesDecoder:
    """A stand-in decoder: draws stripes (black for pairs in `flat`) and adds the pair numbers of each call to `log`."""

    def __init__(self, log, size=12, flat=()):
        self.log, self.size, self.flat = log, size, flat

    def decode(self, requests):
        self.log.append([r["index"] for r in requests])
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[::2] = 255
        return [Image.fromarray(image * (r["index"] not in self.flat) // (1 + len(requests))) for r in requests]


def writer(folder, log, **options):
    return PictureWriter(functools.partial(StripesDecoder, log, **options), folder, 2, 6, 1)


def test_a_damaged_block_is_generated_again_with_the_same_bytes(tmp_path):
    write_requests(tmp_path, [{"index": i, "seed": 0} for i in range(5)], {"embedding": torch.arange(5.0)[:, None]})
    log = []
    work = writer(tmp_path, log)
    assert [work({"block": b})["pictures"] for b in range(3)] == [2, 2, 1] and log == [[0, 1], [2, 3], [4]]
    batch = read_requests(tmp_path)
    assert all(is_drawn(tmp_path, r) for r in batch) and Image.open(picture_of(tmp_path, 3)).size == (6, 6)
    before = {i: picture_of(tmp_path, i).read_bytes() for i in range(5)}
    stamp = picture_of(tmp_path, 3).stat().st_mtime_ns
    picture_of(tmp_path, 2).with_suffix(".json").unlink()  # like a kill after the PNG file was written
    writer(tmp_path, log)({"block": 1})
    assert log[-1] == [2, 3] and {i: picture_of(tmp_path, i).read_bytes() for i in range(5)} == before
    assert picture_of(tmp_path, 3).stat().st_mtime_ns == stamp
    write_requests(tmp_path, [{"index": i, "seed": 0} for i in range(5)], {"embedding": torch.ones(5, 1)})
    assert [is_drawn(tmp_path, r) for r in read_requests(tmp_path)] == [False, True, False, False, False]


def test_images_of_one_colour_are_refused(tmp_path):
    write_requests(tmp_path, [{"index": i, "seed": 0} for i in range(2)], {})
    with pytest.raises(ValueError, match="the image of pair 1 is empty or has one colour"):
        writer(tmp_path, [], flat=(1,))({"block": 0})
    assert picture_of(tmp_path, 0).is_file() and not picture_of(tmp_path, 1).is_file()
    with pytest.raises(ValueError, match="2 pairs, found rows"):
        write_requests(tmp_path, [{"index": 0}, {"index": 1}], {"embedding": torch.ones(3, 1)})
