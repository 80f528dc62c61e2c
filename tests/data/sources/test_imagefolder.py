import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import rows_of

from rmdd.config import Data, ImageFolder
from rmdd.data.ingest import ingest, quarantined


def data_of(root, **rule):
    return Data(source="imagefolder", root=str(root), imagefolder=ImageFolder(**rule))


def pairs(dataset):
    return {split: {p.pair_id: p.captions for p in dataset.pairs(split)} for split in ("train", "val", "test")}


def table(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


IN_SPLITS = {
    "train": {"train/0.png": ("zero",), "train/deep/1.png": ("one, and more", "uno")},
    "val": {"validation/2.png": ("two",)},
    "test": {"test/3.png": ("three",)},
}


def test_a_table_in_each_split_folder(root, put, draw, tmp_path):
    draw("train/0.png", "train/deep/1.png", "validation/2.png", "test/3.png", "test/not_listed.png")
    put("train/metadata.csv", table([
        {"file_name": "0.png", "text": "zero"},
        {"file_name": "deep/1.png", "text": '["one, and more", "uno"]'},
    ]))  # fmt: skip
    put("validation/metadata.jsonl", json.dumps({"file_name": "./2.png", "text": ["two"]}))
    pq.write_table(pa.table({"file_name": ["3.png"], "text": ["three"]}), root / "test" / "metadata.parquet")
    dataset = ingest(data_of(root), tmp_path / "out")
    assert pairs(dataset) == IN_SPLITS
    assert next(dataset.pairs("train")).image == (root / "train/0.png").read_bytes()
    assert dataset.manifest["quarantine"] == {}


def test_a_table_at_the_top_with_other_columns_and_bad_rows(root, put, draw, tmp_path):
    draw("train/0.png", "train/deep/1.png", "validation/2.png", "test/3.png", "a/b/4.png")
    rows = [
        {"image_file_name": name, "label": 1, "prompt": "; ".join(c)}
        for s in IN_SPLITS.values()
        for name, c in s.items()
    ]
    rows += [{"image_file_name": "", "prompt": "no name"}, {"image_file_name": "../0.png", "prompt": "outside"}]
    put("metadata.csv", table([*rows, {"image_file_name": "train/9.png", "prompt": "missing"}]))
    dataset = ingest(data_of(root), tmp_path / "out")
    assert {split: set(found) for split, found in pairs(dataset).items()} == {s: set(p) for s, p in IN_SPLITS.items()}
    assert dataset.manifest["quarantine"] == {"escaping_path": 1, "missing_file": 1, "no_path": 1}
    assert quarantined(dataset)[0]["origin"] == "metadata.csv line 6"


def test_the_split_is_in_a_column_or_chosen_by_a_hash(root, put, draw, tmp_path):
    names = [f"vehicles/{i}.png" for i in range(40)]
    draw(*names)
    put("metadata.csv", table([{"file_name": n, "caption": "x", "split": "test"} for n in names]))
    assert len(pairs(ingest(data_of(root), tmp_path / "column"))["test"]) == 40
    by_hash = pairs(ingest(data_of(root, split=None), tmp_path / "hash"))
    assert all(by_hash.values()) and len(by_hash["train"]) > 20


def test_a_text_file_beside_each_image(root, put, draw, tmp_path):
    draw("train/0001.png", "train/0002.png", "val/0001.png", "test/0003.png", "train/no_text.png")
    for name, text in {
        "train/0001": "a red ring, photo\n",
        "train/0002": " \n",
        "val/0001": "b",
        "test/0003": "c",
    }.items():
        put(f"{name}.txt", text)
    put("README.txt", "about this folder")
    dataset = ingest(data_of(root), tmp_path / "out")
    assert pairs(dataset) == {
        "train": {"train/0001.png": ("a red ring, photo",)}, "val": {"val/0001.png": ("b",)},
        "test": {"test/0003.png": ("c",)},
    }  # fmt: skip
    assert dataset.manifest["quarantine"] == {"no_caption": 1}
    put("val/0001.txt", "another caption")
    with pytest.raises(ValueError, match="the annotations changed"):
        ingest(data_of(root), tmp_path / "out")


def test_a_change_in_one_of_two_tables_of_the_same_name_is_noticed(root, put, draw, tmp_path):
    draw("train/0.png", "test/0.png")
    for split in ("train", "test"):
        put(f"{split}/metadata.csv", "file_name,text,split\n0.png,x,train\n")
    ingest(data_of(root), tmp_path / "out")
    put("test/metadata.csv", "file_name,text,split\n0.png,x,val\n")
    with pytest.raises(ValueError, match="the annotations changed"):
        ingest(data_of(root), tmp_path / "out")


def test_only_the_whole_name_of_a_folder_is_the_name_of_a_split(root, put, draw, tmp_path):
    draw("Test/0.png", "my test photos/1.png", "holdout/2.png")
    for name in ("Test/0", "my test photos/1", "holdout/2"):
        put(f"{name}.txt", "x")
    data = Data(source="imagefolder", root=str(root), splits={"names": {"holdout": "test"}, "test": None})
    found = {row.image: row.split for row in rows_of(data)}
    assert found == {"Test/0.png": "Test", "my test photos/1.png": None, "holdout/2.png": "holdout"}
    images = pairs(ingest(data, tmp_path / "out"))
    assert {"Test/0.png", "holdout/2.png"} <= set(images["test"])


@pytest.mark.parametrize(
    ("path", "text", "rule", "message"),
    [
        ("other.csv", "a,b\n", {}, "has no table that matches data.imagefolder.files .*text file of the same name"),
        (
            "metadata.csv",
            "image,text\n1.png,x\n",
            {},
            "needs a column file_name.*none among image, text; set data.image",
        ),
        ("metadata.csv", "a_file_name,b_file_name,text\n1,2,x\n", {}, "found several .a_file_name, b_file_name.; set"),
        (
            "metadata.csv",
            "file_name,label\n1.png,x\n",
            {},
            "no column 'caption'; it has file_name, label; set data.imagefolder",
        ),
        ("metadata.csv", "file_name,text\n1.png,x\n", {"caption": "de"}, "no column 'de'; it has file_name, text"),
    ],
)
def test_folders_of_other_layouts_are_refused(root, put, tmp_path, path, text, rule, message):
    put(path, text)
    with pytest.raises(ValueError, match=message):
        ingest(data_of(root, **rule), tmp_path / "out")
