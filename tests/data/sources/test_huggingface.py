"""Tests with files that the library `datasets` itself writes, and with its own code for datasets of the hub."""

import io
import sys
from itertools import chain

import datasets
import numpy as np
import pytest
from PIL import Image

from rmdd.config import Data, HuggingFace
from rmdd.data.ingest import ingest
from rmdd.runs.cost import known_counts

SPLITS = {"train": range(6), "validation": (7, 6), "test": range(8, 10)}


def picture(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def ten():
    """A dataset of ten images, with captions as a list of texts and as a list of objects."""
    columns = {
        "image": [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(10)],
        "caption": [[f"c {i}", f"d {i}"] for i in range(10)],
        "sentences": [[{"raw": f"e {i}", "id": i}] for i in range(10)],
    }
    texts = datasets.List(datasets.Value("string"))
    sentences = datasets.List({"raw": datasets.Value("string"), "id": datasets.Value("int64")})
    features = datasets.Features({"image": datasets.Image(), "caption": texts, "sentences": sentences})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The library's cache, in a folder of this module; without a network."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield folder
        datasets.enable_progress_bars()


def data_of(root, **rule):
    rest = {name: rule.pop(name) for name in ("shard_mb",) if name in rule}
    return Data(source="huggingface", root=None if root is None else str(root), huggingface=HuggingFace(**rule), **rest)


def images(dataset):
    return {split: [p.image for p in dataset.pairs(split)] for split in ("train", "val", "test")}


def captions(dataset):
    return {p.pair_id: p.captions for split in ("train", "val", "test") for p in dataset.pairs(split)}


def in_splits(dataset):
    return datasets.DatasetDict({split: dataset.select(rows) for split, rows in SPLITS.items()})


EXPECTED = {
    split: [picture(i) for i in rows] for split, rows in zip(("train", "val", "test"), SPLITS.values(), strict=True)
}


def test_a_saved_dataset_dict_keeps_its_splits_and_the_bytes_of_its_images(ten, root, tmp_path, monkeypatch):
    in_splits(ten).save_to_disk(root / "saved", num_shards={"train": 2, "validation": 1, "test": 1})
    monkeypatch.setitem(sys.modules, "datasets", None)  # a saved folder is read without the library
    dataset = ingest(data_of(root, folder="saved"), tmp_path / "out")
    assert images(dataset) == EXPECTED
    assert captions(dataset)["saved/train/data-00001-of-00002.arrow/00000001"] == ("c 4", "d 4")
    nested = ingest(data_of(root / "saved", caption="sentences.raw"), tmp_path / "nested")
    assert captions(nested)["validation/data-00000-of-00001.arrow/00000000"] == ("e 7",)


def test_a_saved_dataset_without_splits_is_split_by_a_hash_and_read_in_ranges(root, tmp_path):
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(60)], "text": [f"c {i}" for i in range(60)]}
    whole = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "ARROW_RECORD_BATCH_SIZE_FOR_IMAGE_DATASETS", 8)
        whole.save_to_disk(root, num_shards=2)
    one = ingest(data_of(root, caption="text"), tmp_path / "one")
    parts = ingest(data_of(root, caption="text", shard_mb=0.004), tmp_path / "parts")
    assert len(parts.manifest["shards"]) > 2 * len(one.manifest["shards"]) >= 6
    assert one.hash == parts.hash and captions(one) == captions(parts)
    assert all(images(one).values()) and sorted(chain(*images(one).values())) == sorted(picture(i) for i in range(60))


def test_a_saved_dataset_of_paths_lists_images_below_the_root(root, draw, tmp_path):
    draw("pictures/0.png", "pictures/1.png")
    paths = ["pictures/0.png", "pictures/0.png", "pictures/1.png"]
    listed = {"image": paths, "caption": ["a", "b", "c"], "split": ["train", "train", "val"]}
    datasets.Dataset.from_dict(listed).save_to_disk(root / "saved")
    dataset = ingest(data_of(root, folder="saved"), tmp_path / "out")
    assert captions(dataset) == {"pictures/0.png": ("a", "b"), "pictures/1.png": ("c",)}
    assert images(dataset)["val"] == [(root / "pictures/1.png").read_bytes()]


def test_a_dataset_of_the_hub_is_read_from_the_cache_of_the_library(ten, cache, tmp_path):
    repository = tmp_path / "name"
    for split, rows in in_splits(ten).items():
        rows.to_parquet(repository / "data" / f"{split}-00000-of-00001.parquet")
    datasets.load_dataset(str(repository))
    (cache / "name").rename(cache / "user___name")  # the place of the dataset user/name
    dataset = ingest(data_of(None, hub="user/name"), tmp_path / "out")
    assert images(dataset) == EXPECTED
    assert captions(dataset)["train/name-train.arrow/00000005"] == ("c 5", "d 5")
    with pytest.raises(ValueError, match="cannot count the pairs of 'user/other' before they are downloaded"):
        known_counts(data_of(None, hub="user/other"))
    with pytest.raises(ValueError, match="cannot load 'user/other', config None.*correct data.huggingface.hub"):
        ingest(data_of(None, hub="user/other"), tmp_path / "other")


def test_images_that_the_library_did_not_copy_are_read_from_their_files(root, put, draw, tmp_path):
    draw("train/0.png", "test/1.png")
    put("train/metadata.csv", "file_name,caption\n0.png,a\n")
    put("test/metadata.csv", "file_name,caption\n1.png,b\n")
    dataset = ingest(data_of(root, hub=str(root)), tmp_path / "out")  # the id may be a folder, as in load_dataset
    assert images(dataset)["test"] == [(root / "test/1.png").read_bytes()]
    with pytest.raises(ValueError, match="kept 0 of 2 images: 2 absolute_path"):
        ingest(data_of(None, hub=str(root)), tmp_path / "outside")


def test_mistakes_are_reported_with_what_to_do(ten, root, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs data.root .a folder of save_to_disk. or data.huggingface.hub"):
        data_of(None)
    with pytest.raises(ValueError, match="neither dataset_dict.json nor state.json.*set data.huggingface.hub"):
        ingest(data_of(root), tmp_path / "out")
    with pytest.raises(ValueError, match="user/name is not a folder.*of the hub, set data.huggingface.hub to its id"):
        ingest(data_of("user/name"), tmp_path / "out")
    ten.save_to_disk(root)
    with pytest.raises(ValueError, match="no column 'text', only image, caption, sentences; set data.huggingface.capt"):
        ingest(data_of(root, caption="text"), tmp_path / "out")
    (root / "data-00000-of-00001.arrow").write_bytes((root / "data-00000-of-00001.arrow").read_bytes()[:-2000])
    with pytest.raises(ValueError, match="data-00000-of-00001.arrow is not a complete Arrow file"):
        ingest(data_of(root), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the library `datasets`, which is not installed: pip install 'rmdd.hub"):
        ingest(data_of(None, hub="user/absent"), tmp_path / "out")
