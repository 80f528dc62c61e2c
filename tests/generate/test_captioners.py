"""What captioners say, and what is made of it when that is no use."""

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
    further_captions,
    saved_captions,
    stand_ins,
    tidied,
)

RULE = Captions()
REAL = ["a real one", "a cat", "another real one", "a third"]


def saying(*answers):
    """A captioner that gives one list of answers per attempt."""
    return lambda wanted, attempt: answers[attempt] if attempt < len(answers) else []


def test_answers_are_tidied_as_captions_are():
    assert tidied('  "A Dog\n\n runs,\tfast! "\n', RULE) == "a dog runs, fast"
    assert tidied(" \n ", RULE) == tidied("!!", RULE) == ""


def test_empty_and_repeated_answers_are_refused_and_asked_for_again():
    found = further_captions(saying(["", "A dog.", "a  dog"], ["a cat", "the hat"]), 2, "a dog", REAL, RULE, tries=3)
    assert (found.captions, found.sources, found.refused) == (["a cat", "the hat"], ["captioner"] * 2, 3)


def test_real_captions_stand_in_at_last():
    found = further_captions(saying(["a cat"], [" "]), 3, "a dog", REAL, RULE, tries=2)
    assert found.captions == ["a cat", "a real one", "another real one"]
    assert found.sources == ["captioner", "real", "real"] and found.refused == 1
    with pytest.raises(ValueError, match="needs 9 more captions.*lower distill.options.captions_per_image"):
        further_captions(saying(), 9, "a dog", REAL, RULE, tries=2)


def test_stand_ins_are_those_of_the_same_picture_then_the_nearest():
    captions = ["a", "b", "c", "d", "a", "e"]
    texts = np.array([[1, 0], [0, 1], [0.9, 0.1], [-1, 0], [1, 0.01], [0.5, 0.5]], np.float32)
    found = stand_ins(captions, texts, 0, 2, np.array([0, 0, 1, 1, 2, 2]))
    assert found[0] == "b" and found[1:3] == ["c", "e"] and "a" not in found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    here = tmp_path_factory.mktemp("captioners")
    return {"blip": tiny_diffusion.blip(here / "blip"), "llava": tiny_diffusion.llava(here / "llava")}


def picture(seed=0):
    pixels = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(("backend", "prompt"), [("blip", ""), ("blip", "a red"), ("llava", "describe a dog")])
def test_captioners_of_transformers_speak_the_same_under_a_seed(folders, backend, prompt):
    speaker = PretrainedCaptioner(
        backend, folders[backend], torch.device("cpu"), prompt=prompt, tokens=6, dtype="float32"
    )
    state = torch.get_rng_state()
    said = speaker.describe(picture(), 3, seed=1)
    assert len(said) == 3 and all(isinstance(s, str) for s in said)
    assert said == speaker.describe(picture(), 3, seed=1) != speaker.describe(picture(), 3, seed=2)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are touched"
    assert not any(s.startswith(("USER", prompt or "USER")) for s in said), "the question is no part of the answer"


def test_a_worker_writes_what_it_gathered_beside_the_picture(tmp_path):
    class Echo:
        def describe(self, image, count, seed):
            return [f"{image.size[0]} by {image.size[1]}", ""]

    picture().save(tmp_path / "000003.png")
    item = {"index": 3, "caption": "a dog", "count": 2, "real": REAL, "key": "k"}
    item |= {"picture": str(tmp_path / "000003.png"), "out": str(tmp_path / "000003.captions.json")}
    assert CaptionWriter(Echo, RULE, 0, 2, 1)(item) == {"captions": 2}
    found = saved_captions(tmp_path / "000003.captions.json", "k")
    assert found.captions == ["24 by 20", "a real one"] and found.sources == ["captioner", "real"]
    assert saved_captions(tmp_path / "000003.captions.json", "other") is None
    assert json.loads((tmp_path / "000003.captions.json").read_text())["refused"] == 3
