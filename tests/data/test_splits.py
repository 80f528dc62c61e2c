import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from rmdd.config import NO_AUGMENT, Augment, Captions, Data, Experts, Model, Run, Scenes, TextTower
from rmdd.data.captions import SplitCaptions, clean
from rmdd.data.images import squash
from rmdd.data.ingest import ingest
from rmdd.data.source import hash_position
from rmdd.data.splits import load_split, read_rows
from rmdd.experts.feed import prepare
from rmdd.models.prepared import prepare_split


@pytest.fixture
def scenes(tmp_path):
    data = Data(scenes=Scenes(train=70, val=6, test=5, size=16), image_size=12)
    return ingest(data, tmp_path / "out"), data


def test_a_split_has_the_resized_images_and_cleaned_captions_of_its_shards(scenes, tmp_path):
    dataset, data = scenes
    split = load_split(dataset, "train", data, tmp_path / "cache")
    pairs = list(dataset.pairs("train"))
    assert len(split) == 70 and split.images.shape == (70, 3, 12, 12) and split.images.dtype == np.uint8
    assert split.pair_ids == [pair.pair_id for pair in pairs]
    assert split.captions == [clean(c, data.captions) for pair in pairs for c in pair.captions]
    assert split.image_of.dtype == np.int64
    assert split.image_of.tolist() == [i for i, pair in enumerate(pairs) for _ in pair.captions]
    for i in (0, 69, 3):
        assert split.encoded(i) == pairs[i].image
        assert (split.images[i] == squash(Image.open(io.BytesIO(pairs[i].image)), 12)).all()
    assert split.dropped == {"captions": 0, "pairs": 0}
    assert split.facts() == {"pairs": 70, "captions": 350, "dropped_captions": 0, "dropped_pairs": 0}


def test_the_cache_is_reused_and_depends_on_the_settings(scenes, tmp_path):
    dataset, data = scenes
    cache = tmp_path / "cache"
    first = load_split(dataset, "val", data, cache)
    assert not cache.exists(), "images must not be decoded before the first access"
    assert first.encoded(0) and len(first.images) == len(first)
    files = lambda: {p: p.stat().st_mtime_ns for p in cache.iterdir() if p.suffix in (".npy", ".bin")}  # noqa: E731
    before = files()
    assert len(before) == 3
    again = load_split(dataset, "val", data, cache)
    assert again.encoded(5) == list(dataset.pairs("val"))[5].image
    assert isinstance(again.images, np.memmap) and not again.images.flags.writeable
    assert files() == before
    for change in ({"image_size": 8}, {"background": (0, 0, 0)}, {"exif_orientation": False}):
        assert len(load_split(dataset, "val", data.model_copy(update=change), cache).images)
    assert len(files()) == 6
    assert len(load_split(dataset, "val", data.model_copy(update={"captions": Captions(max_words=3)}), cache).images)
    assert len(files()) == 6  # changed caption cleaning adds no file to the image cache


def test_several_workers_may_build_the_cache_at_the_same_time(scenes, tmp_path, monkeypatch):
    dataset, data = scenes
    reads = []

    def counted(*arguments, real=read_rows):
        reads.append(arguments)
        yield from real(*arguments)

    monkeypatch.setattr("rmdd.data.splits.read_rows", counted)
    splits = [load_split(dataset, "train", data, tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda split: [split.encoded(i) for i in range(len(split))], splits))
        images = list(pool.map(lambda split: split.images, splits))
    assert read == [[pair.image for pair in dataset.pairs("train")]] * 4
    assert all(np.array_equal(images[0], each) for each in images)
    assert len(reads) == 2, "only one worker may decode the images, and only one may copy the encoded images"
    assert not [file.name for file in (tmp_path / "cache").iterdir() if file.name.endswith(".tmp")]


@pytest.mark.parametrize("augmented", [True, False])
def test_only_the_cache_that_experts_read_is_built_before_training(scenes, tmp_path, augmented):
    dataset, data = scenes
    text = TextTower(name="hashing", width=8)
    run = Run(data=data, experts=Experts(augment=Augment() if augmented else NO_AUGMENT), model=Model(text=text))
    train = prepare_split(run.data, run.model, dataset, "train", tmp_path)
    assert not [*tmp_path.glob("train-*.npy"), *tmp_path.glob("*.bin")]
    prepare(train, run.experts.augment, run.runtime.cache_gb)
    assert bool(list(tmp_path.glob("*.bin"))) == augmented
    assert len([p for p in tmp_path.glob("train-*.npy") if "offsets" not in p.name]) == (not augmented)
    prepare_split(run.data, run.model, dataset, "val", tmp_path)
    assert len(list(tmp_path.glob("val-*.npy"))) == 1


def test_some_images_are_the_same_with_and_without_the_cache(scenes, tmp_path):
    dataset, data = scenes
    index = np.array([3, 0, 3])
    split = load_split(dataset, "train", data, tmp_path / "cache")
    few = split.some_images(index)
    assert not (tmp_path / "cache").exists(), "only the requested images may be decoded"
    assert np.array_equal(few, split.images[index]) and np.array_equal(few, split.some_images(index))


def test_rows_are_read_by_row_group(scenes):
    dataset, _ = scenes
    images = [pair.image for pair in dataset.pairs("train")]
    wanted = np.array([7, 0, len(images) - 1, 7])
    assert list(read_rows(dataset, "train", wanted)) == [(int(r), images[r]) for r in np.unique(wanted)]
    assert list(read_rows(dataset, "train", np.array([], dtype=np.int64))) == []


def test_eval_limit_applies_to_val_and_test_only(scenes, tmp_path):
    dataset, data = scenes
    limited = data.model_copy(update={"eval_limit": 4})
    sizes = {s: len(load_split(dataset, s, limited, tmp_path / "cache")) for s in ("train", "val", "test")}
    assert sizes == {"train": 70, "val": 4, "test": 4}
    split = load_split(dataset, "val", limited, tmp_path / "cache")
    assert split.captions == load_split(dataset, "val", data, tmp_path / "cache").captions[:20]


def test_train_limit_applies_to_train_only_and_leaves_hashes_alone_at_its_default(scenes, tmp_path):
    dataset, data = scenes
    limited = data.model_copy(update={"train_limit": 6})
    sizes = {s: len(load_split(dataset, s, limited, tmp_path / "cache")) for s in ("train", "val", "test")}
    assert sizes == {"train": 6, "val": 6, "test": 5}
    first = load_split(dataset, "train", limited, tmp_path / "cache")
    every = load_split(dataset, "train", data, tmp_path / "cache")
    drawn = sorted(sorted(every.pair_ids, key=hash_position)[:6], key=every.pair_ids.index)
    assert first.pair_ids == drawn != every.pair_ids[:6] and len(first.captions) == 30
    assert list(SplitCaptions(dataset, "train", limited)) == first.captions
    assert "train_limit" not in data.not_hashed("ingest") and "train_limit" in data.not_hashed("view")
    assert "train_limit" not in limited.not_hashed("view")


def test_captions_that_the_rule_empties_are_counted(root, draw, put, tmp_path):
    draw("a.png", "b.png", "c.png")
    put("t.json", [{"image": "a.png", "caption": ["..."]}, {"image": "b.png", "caption": ["!", "Fine."]}])
    put("v.json", [{"image": "c.png", "caption": ["(*)"]}])
    data = Data(source="lists", root=str(root), annotations={"train": "t.json", "val": "v.json"}, image_size=8)
    dataset = ingest(data, tmp_path / "out")
    train = load_split(dataset, "train", data, tmp_path / "cache")
    assert train.captions == ["fine"] and train.pair_ids == ["b.png"] and train.image_of.tolist() == [0]
    assert train.dropped == {"captions": 2, "pairs": 1}
    assert train.encoded(0) == (root / "b.png").read_bytes()
    empty = load_split(dataset, "val", data, tmp_path / "cache")
    assert empty.images.shape == (0, 3, 8, 8) and empty.dropped == {"captions": 1, "pairs": 1}
    unstripped = data.model_copy(update={"captions": Captions(strip_punctuation=False)})
    assert load_split(dataset, "train", unstripped, tmp_path / "cache").captions == ["...", "!", "fine."]


def test_an_unknown_split_is_refused(scenes, tmp_path):
    with pytest.raises(ValueError, match="train, val, test"):
        load_split(*scenes[:1], "dev", scenes[1], tmp_path)
