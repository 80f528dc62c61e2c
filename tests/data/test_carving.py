"""Check `data.splits`: which images of a source become val and test, for every kind of source."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rmdd.config import Data, Splits
from rmdd.data.ingest import ingest, shaping
from rmdd.data.plan import make_plan
from rmdd.data.source import AnnotationRow, hash_split
from rmdd.runs.cost import known_counts

NAMES = [f"{i:03d}.png" for i in range(200)]


def splits_of(data, names=NAMES, split="train"):
    """Return the split of each image, as the plan of an ingest chooses it; all images have the same split at first."""
    plan = make_plan((AnnotationRow(name, ("a caption",), split, "table", name) for name in names), data)
    return {pair["pair_id"]: split for split, pairs in plan.pairs.items() for pair in pairs}


def table(**splits):
    return Data(source="table", root=".", splits=Splits(**splits))


def count(split_of):
    return {split: list(split_of.values()).count(split) for split in ("train", "val", "test")}


def test_a_share_of_train_is_stable_when_images_are_added():
    data = table(val=0.2, test=0.1)
    few, all_of_them = splits_of(data, NAMES[:80]), splits_of(data)
    assert few == {name: all_of_them[name] for name in few}
    assert 20 < count(all_of_them)["val"] < 60 and 8 < count(all_of_them)["test"] < 35


def test_shares_of_a_source_with_and_without_splits_are_those_of_split_fractions():
    expected = {name: hash_split(name, (0.7, 0.2, 0.1)) for name in NAMES}
    assert splits_of(table(val=0.2, test=0.1)) == splits_of(table(val=0.2, test=0.1), split=None) == expected
    assert splits_of(Data(source="table", root=".", split_fractions=(0.7, 0.2, 0.1)), split=None) == expected


@pytest.mark.parametrize("split", ["train", None])
def test_a_number_is_exact_and_adding_an_image_moves_at_most_two_images(split):
    data = table(val=17, test=30)
    before, after = splits_of(data, NAMES[:-1], split), splits_of(data, NAMES, split)
    assert (count(before)["val"], count(before)["test"]) == (count(after)["val"], count(after)["test"]) == (17, 30)
    assert sum(before[name] != after[name] for name in before) <= 2


def test_a_share_and_a_number_together():
    only_val, both = splits_of(table(val=0.2)), splits_of(table(val=0.2, test=30))
    val = {name for name, split in only_val.items() if split == "val"}
    assert val == {name for name, split in both.items() if split == "val"} and count(both)["test"] == 30


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"val": 20}, {"train": 80, "val": 20, "test": 50}),  # the source's 50 images of val are in train again
        ({"val": 0}, {"train": 100, "val": 0, "test": 50}),
        ({"from_source": False, "val": 20, "test": 30}, {"train": 100, "val": 20, "test": 30}),
        ({"names": {"dev": "test", "TEST": "none"}}, {"train": 50, "val": 0, "test": 50}),
        ({"names": {"val": "test", "test": "val"}}, {"train": 50, "val": 50, "test": 50}),
    ],
)
def test_the_splits_of_the_source_are_replaced_renamed_or_ignored(splits, expected):
    words = {"train": NAMES[:50], "dev": NAMES[50:100], "test": NAMES[100:150]}
    rows = (AnnotationRow(name, ("x",), word, "table", name) for word, names in words.items() for name in names)
    plan = make_plan(rows, table(**splits))
    assert {split: len(pairs) for split, pairs in plan.pairs.items()} == expected


def test_captions_of_an_image_stay_together_even_if_the_source_puts_them_in_two_splits():
    rows = [AnnotationRow(f"{i % 9}.png", (f"caption {i}",), ("train", "test")[i % 2], "table", "") for i in range(36)]
    with pytest.raises(ValueError, match="data.splits.from_source: false to choose splits by a hash"):
        make_plan(rows, table())
    pairs = [pair for each in make_plan(rows, table(from_source=False, val=3, test=2)).pairs.values() for pair in each]
    assert len(pairs) == 9 and all(len(pair["captions"]) == 4 for pair in pairs)


def test_a_number_that_leaves_nothing_for_train_is_refused():
    with pytest.raises(
        ValueError, match="data.splits.test: 20 and data.splits.val: 180 would leave no image for train"
    ):
        splits_of(table(val=180, test=20))


def test_the_defaults_leave_the_hash_of_a_dataset_as_it_was(root):
    assert "splits" not in shaping(Data(source="table", root=str(root)))
    assert shaping(table(val=0.1))["splits"]["val"] == 0.1


def image(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_parquet(root):
    """Write a row per caption: each of 24 images is in three rows, of two files."""
    rows = [(image(i // 3), f"caption {i}") for i in range(72)]
    for name, part in (("train-0.parquet", rows[:40]), ("train-1.parquet", rows[40:])):
        pq.write_table(pa.table({"image": [i for i, _ in part], "caption": [c for _, c in part]}), root / name)
    return Data(source="parquet", root=str(root))


def write_tars(root):
    for name, first in (("train-0.tar", 0), ("train-1.tar", 12)):
        with tarfile.open(root / name, "w") as archive:
            for i in range(first, first + 12):
                for suffix, content in (("png", image(i)), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return Data(source="webdataset", root=str(root))


def write_lists(root):
    for i in range(24):
        (root / f"{i}.png").write_bytes(image(i))
    (root / "all.json").write_text(json.dumps([{"image": f"{i}.png", "caption": ["x", "y"]} for i in range(24)]))
    return Data(source="lists", root=str(root), annotations={"train": "all.json"})


def write_karpathy(root):
    write_lists(root)
    records = [{"filename": f"{i}.png", "split": "restval", "sentences": [{"raw": "x"}]} for i in range(24)]
    (root / "k.json").write_text(json.dumps({"images": records}))
    return Data(source="karpathy", root=str(root), annotations="k.json")


@pytest.mark.parametrize("write", [write_parquet, write_tars, write_lists, write_karpathy])
def test_val_and_test_are_carved_from_every_source(root, tmp_path, write):
    data = write(root).model_copy(update={"splits": Splits(val=5, test=4)})
    dataset = ingest(data, tmp_path / "out")
    images = {split: {pair.image for pair in dataset.pairs(split)} for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in images.items()} == {"train": 15, "val": 5, "test": 4}
    shares = data.model_copy(update={"splits": Splits(from_source=False, val=0.2, test=0.2)})
    dataset = ingest(shares, tmp_path / "shares")
    images = [{pair.image for pair in dataset.pairs(split)} for split in ("train", "val", "test")]
    assert sum(map(len, images)) == len(set.union(*images)) == 24 and all(images)
    if data.source in ("lists", "karpathy"):
        assert known_counts(data)[0] | {"train": None} == {"train": None, "val": (5, 5 * (1 + (write is write_lists))),
            "test": (4, 4 * (1 + (write is write_lists)))}  # fmt: skip


def test_files_of_other_names_are_given_a_split(root, tmp_path):
    write_tars(root)
    (root / "train-1.tar").rename(root / "holdout-1.tar")
    data = Data(source="webdataset", root=str(root), splits=Splits(names={"holdout": "val"}))
    counts = ingest(data, tmp_path / "out").counts
    assert {split: n["pairs"] for split, n in counts.items()} == {"train": 12, "val": 12, "test": 0}


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"val": 1.5}, "data.splits.val is a share such as 0.1 or a number of images such as 500, found 1.5"),
        ({"test": -1}, "data.splits.test is a share"),
        ({"val": 0.5, "test": 0.5}, "leave no image for train"),
        ({"names": {"x": "dev"}}, "names.x"),
    ],
)
def test_sizes_that_cannot_work_are_refused(splits, words):
    with pytest.raises(ValueError, match=words):
        Splits(**splits)


def test_an_ingested_dataset_keeps_its_splits(tmp_path):
    with pytest.raises(ValueError, match="data.splits has no effect on an ingested dataset"):
        Data(source="dataset", root=str(tmp_path), splits=Splits(val=0.1))
