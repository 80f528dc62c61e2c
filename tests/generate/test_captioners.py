"""Captioners: how answers are cleaned or dropped, and which captions of the dataset replace missing answers."""

import json

import numpy as np
import pytest
import tiny_diffusion
import torch
from PIL import Image

from rmdd.config import Captions
from rmdd.generate.captioners import (
    CaptionWriter,
    PretrainedCaptioner,
    clean_answer,
    further_captions,
    saved_captions,
    stand_ins,
)

RULE = Captions()
REAL = ["a real one", "a cat", "another real one", "a third"]


def saying(*answers):
    """Return a stand-in captioner for `further_captions(ask)`: attempt i returns `answers[i]` (or nothing)."""
    return lambda wanted, attempt: answers[attempt] if attempt < len(answers) else []


def test_answers_are_cleaned_like_captions():
    assert clean_answer('  "A Dog\n\n runs,\tfast! "\n', RULE) == "a dog runs, fast"
    assert clean_answer(" \n ", RULE) == clean_answer("!!", RULE) == ""


def test_empty_and_repeated_answers_are_refused_and_the_captioner_is_called_again():
    result = further_captions(saying(["", "A dog.", "a  dog"], ["a cat", "the hat"]), 2, "a dog", REAL, RULE, tries=3)
    assert (result.captions, result.sources, result.refused) == (["a cat", "the hat"], ["captioner"] * 2, 3)


def test_real_captions_fill_the_gap_after_the_last_try():
    result = further_captions(saying(["a cat"], [" "]), 3, "a dog", REAL, RULE, tries=2)
    assert result.captions == ["a cat", "a real one", "another real one"]
    assert result.sources == ["captioner", "real", "real"] and result.refused == 1
    with pytest.raises(ValueError, match="needs 9 more captions.*lower distill.options.captions_per_image"):
        further_captions(saying(), 9, "a dog", REAL, RULE, tries=2)


def test_real_captions_come_from_the_same_image_and_then_from_the_nearest():
    captions = ["a", "b", "c", "d", "a", "e"]
    texts = np.array([[1, 0], [0, 1], [0.9, 0.1], [-1, 0], [1, 0.01], [0.5, 0.5]], np.float32)
    result = stand_ins(captions, texts, 0, 2, np.array([0, 0, 1, 1, 2, 2]))
    assert result[0] == "b" and result[1:3] == ["c", "e"] and "a" not in result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("captioners")
    return {"blip": tiny_diffusion.blip(root / "blip"), "llava": tiny_diffusion.llava(root / "llava")}


def picture(seed=0):
    pixels = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(("backend", "prompt"), [("blip", ""), ("blip", "a red"), ("llava", "describe a dog")])
def test_pretrained_captioners_are_reproducible_for_a_seed(folders, backend, prompt):
    captioner = PretrainedCaptioner(
        backend, folders[backend], torch.device("cpu"), prompt=prompt, tokens=6, dtype="float32"
    )
    state = torch.get_rng_state()
    answers = captioner.describe(picture(), 3, seed=1)
    assert len(answers) == 3 and all(isinstance(s, str) for s in answers)
    assert answers == captioner.describe(picture(), 3, seed=1) != captioner.describe(picture(), 3, seed=2)
    assert torch.equal(torch.get_rng_state(), state), "the global random state must not change"
    assert not any(s.startswith(("USER", prompt or "USER")) for s in answers), "the answer must not contain the prompt"


def test_a_caption_writer_saves_its_captions_as_json(tmp_path):
    class Echo:
        def describe(self, image, count, seed):
            return [f"{image.size[0]} by {image.size[1]}", ""]

    picture().save(tmp_path / "000003.png")
    item = {"index": 3, "caption": "a dog", "count": 2, "real": REAL, "key": "k"}
    item |= {"picture": str(tmp_path / "000003.png"), "out": str(tmp_path / "000003.captions.json")}
    assert CaptionWriter(Echo, RULE, 0, 2, 1)(item) == {"captions": 2}
    result = saved_captions(tmp_path / "000003.captions.json", "k")
    assert result.captions == ["24 by 20", "a real one"] and result.sources == ["captioner", "real"]
    assert saved_captions(tmp_path / "000003.captions.json", "other") is None
    assert json.loads((tmp_path / "000003.captions.json").read_text())["refused"] == 3
