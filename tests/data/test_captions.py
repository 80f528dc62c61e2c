import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmdd.config import Captions, Data
from rmdd.data.captions import SplitCaptions, clean
from rmdd.data.ingest import ingest
from rmdd.data.splits import load_split

GOLDEN_WORDS = [
    ("A Dog, running!  Fast.", "a dog, running fast"),
    ("...", ""),
    ("  \n", ""),
    ("x #1: (red) *star*", "x 1 red star"),
    ("it's 3:45 p.m.", "it's 3 45 p m"),
    ("T-shirt & 50% off?", "t-shirt & 50% off?"),
    ("two\nlines", "two\nlines"),
    ("a\tb", "a\tb"),
    ("a\t\tb", "a b"),
    ("a\u00a0b", "a\u00a0b"),
    ("a\u00a0\u00a0b", "a b"),
    ("\n lead", "lead"),
    (" ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(30))),
]
GOLDEN_HASHES = [
    ("flickr30k_test_first60", 30, "30f2f01f957f2d9030288b7ec7c9a58571892088f158c82b782744f75b7bb579"),
    ("flickr30k_test_first60", 50, "6cc7caadd8adf8f0b5a093bf5a44ba2b250581fe6a562fe6c9179a1072313d8c"),
    ("flickr30k_val_first60", 30, "44ea49c5c63b5deb25ac477955f5450397ae87046f0b0d1de07dce228a95fc21"),
    ("flickr30k_val_first60", 50, "e1d89fa457ef857f75ac052b824247c4d43a96ff1b968a9f9bbb4d7b74128fc0"),
    ("coco_karpathy_test_first60", 30, "d02f8b6a384c84effb3c241660806b6590bd68b865ad5fc7026d30f346384ef2"),
    ("coco_karpathy_test_six_captions", 30, "303dcbe96bdf35ed8f242ab23deff6eb734060af218d2e89d075777838eb7fcd"),
]


@pytest.mark.parametrize(("caption", "expected"), GOLDEN_WORDS)
def test_the_published_rule(caption, expected):
    assert clean(caption, Captions()) == expected


@pytest.mark.parametrize(("name", "max_words", "expected"), GOLDEN_HASHES)
def test_real_captions_hash_as_published(shared, name, max_words, expected):
    records = json.loads((shared / "reference" / "real_annotations" / f"{name}.json").read_text())
    rule = Captions(max_words=max_words)
    cleaned = "\x1e".join(clean(caption, rule) for record in records for caption in record["caption"])
    assert hashlib.sha256(cleaned.encode()).hexdigest() == expected


@given(st.text())
def test_cleaning_twice_changes_nothing(caption):
    once = clean(caption, Captions())
    assert clean(once, Captions()) == once


def test_cleaning_steps_can_be_switched_off():
    assert clean("A Dog. #1", Captions(lowercase=False)) == "A Dog 1"
    assert clean("A Dog. #1", Captions(strip_punctuation=False)) == "a dog. #1"
    assert len(clean("w " * 99, Captions(max_words=None)).split()) == 99


def test_split_captions_equal_the_captions_of_the_loaded_split(root, draw, put, tmp_path):
    names = [f"{i}.png" for i in range(9)]
    draw(*names)
    records = [{"image": n, "caption": ["...", f"A {n}!", "Two."] if i % 3 else ["..."]} for i, n in enumerate(names)]
    put("list.json", records)
    for split in ("train", "val"):
        data = Data(source="lists", root=str(root), annotations={split: "list.json"}, eval_limit=4, image_size=8)
        dataset = ingest(data, tmp_path / split)
        captions = SplitCaptions(dataset, split, data)
        loaded = load_split(dataset, split, data, tmp_path / "cache").captions
        assert list(captions) == loaded == list(captions) and len(loaded) == (12 if split == "train" else 8)
