import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rmdd.config import Data, Parquet
from rmdd.data.ingest import ingest
from rmdd.runs.cost import known_counts


def picture(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(path, images, captions, groups=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "caption": captions, **columns}), path, row_group_size=groups)


def data_of(root, **rule):
    rest = {name: rule.pop(name) for name in ("shard_mb",) if name in rule}
    return Data(source="parquet", root=str(root), parquet=Parquet(**rule), **rest)


def pairs(dataset):
    return {split: {p.pair_id: p.captions for p in dataset.pairs(split)} for split in ("train", "val", "test")}


def test_the_layout_of_hugging_face(root, tmp_path):
    inside = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(5)]
    write(root / "data" / "train-00000-of-00002.parquet", inside[:2], ["one", "two"])
    write(root / "data" / "train-00001-of-00002.parquet", inside[2:3], ["three"])
    write(root / "data" / "validation-00000-of-00001.parquet", inside[3:4], ["four"])
    write(root / "data" / "test-00000-of-00001.parquet", inside[4:], ["five"])
    dataset = ingest(data_of(root), tmp_path / "out")
    assert pairs(dataset) == {
        "train": {
            "data/train-00000-of-00002.parquet/00000000": ("one",),
            "data/train-00000-of-00002.parquet/00000001": ("two",),
            "data/train-00001-of-00002.parquet/00000000": ("three",),
        },
        "val": {"data/validation-00000-of-00001.parquet/00000000": ("four",)},
        "test": {"data/test-00000-of-00001.parquet/00000000": ("five",)},
    }
    assert [p.image for p in dataset.pairs("train")] == [picture(i) for i in range(3)]


def test_columns_by_name_with_a_split_column_and_bad_rows(root, tmp_path):
    table = {
        "img": pa.array([picture(0), picture(1), None, b"no image", picture(4), picture(5)], pa.large_binary()),
        "texts": [["a", "b"], ["c", None], ["d"], ["e", "f"], [], ["g"]],
        "part": ["train", "dev", "train", "train", "test", "nowhere"],
    }
    pq.write_table(pa.table(table), root / "train.parquet")
    data = data_of(root, image="img", caption="texts", split="part").model_copy(update={"max_loss": 1})
    dataset = ingest(data, tmp_path / "out")
    assert pairs(dataset) == {
        "train": {"train.parquet/00000000": ("a", "b")}, "val": {"train.parquet/00000001": ("c",)}, "test": {},
    }  # fmt: skip
    assert dataset.manifest["quarantine"] == {"no_caption": 1, "no_image": 1, "no_split": 1, "undecodable": 1}
    assert dataset.manifest["captions_dropped"] == {"caption_not_text": 1, "image_quarantined": 4}
    assert dataset.manifest["rows_in"] == 6 and dataset.manifest["captions_in"] == 8


def test_a_large_file_is_read_in_ranges_of_row_groups(root, tmp_path):
    images, captions = [picture(i) for i in range(40)], [f"caption {i}" for i in range(40)]
    write(root / "all.parquet", images, captions, groups=4)
    sliced = ingest(data_of(root, shard_mb=2000 / 2**20), tmp_path / "sliced")
    assert len({shard["file"].split("-")[1] for shard in sliced.manifest["shards"]}) > 3
    unsliced = ingest(data_of(root), tmp_path / "unsliced")
    assert pairs(unsliced) == pairs(sliced) and sum(len(p) for p in pairs(unsliced).values()) == 40
    assert unsliced.hash == sliced.hash
    by_id = {p.pair_id: (p.image, p.captions) for s in ("train", "val", "test") for p in unsliced.pairs(s)}
    assert by_id == {f"all.parquet/{i:08d}": (images[i], (captions[i],)) for i in range(40)}


def test_unreadable_files_are_refused(root, tmp_path):
    write(root / "a.parquet", [picture(0)], ["x"], number=[1], sentences=[[{"id": 1, "raw": "x"}]])
    for rule, words in {
        ("pixels", "caption"): "has no column 'pixels', only image, caption, number, sentences; set data.parquet.image",
        ("image", "image"): "column 'image' is binary, expected text or a list of texts; set data.parquet.caption",
        ("number", "caption"): "column 'number' is int64, expected .bytes, path., binary or paths",
        (
            "image",
            "sentences",
        ): "column 'sentences' is .*, expected text or .*; set data.parquet.caption, such as .*s.raw",
    }.items():
        with pytest.raises(ValueError, match=words):
            ingest(data_of(root, image=rule[0], caption=rule[1]), tmp_path / "out")
    (root / "a.parquet").write_bytes((root / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="a.parquet is not a complete Parquet file: .*download the file again"):
        ingest(data_of(root), tmp_path / "out")
    with pytest.raises(ValueError, match="no file under .* matches data.parquet.files 'b"):
        ingest(data_of(root, files="b*.parquet"), tmp_path / "out")


def test_a_column_of_paths_lists_images_below_the_root(root, draw, tmp_path):
    draw("pictures/0.png", "pictures/1.png", "pictures/2.png", "pictures/3.png")
    names = ["pictures/0.png", "pictures/0.png", "pictures/1.png", "../x.png"]
    write(root / "train.parquet", names, ["a", "b", "c", "d"])
    write(root / "more" / "all.parquet", ["pictures/2.png", "pictures/3.png"], ["e", "f"], split=["dev", "test"])
    dataset = ingest(data_of(root), tmp_path / "out")
    assert pairs(dataset) == {
        "train": {"pictures/0.png": ("a", "b"), "pictures/1.png": ("c",)}, "val": {"pictures/2.png": ("e",)},
        "test": {"pictures/3.png": ("f",)},
    }  # fmt: skip
    assert next(dataset.pairs("train")).image == (root / "pictures/0.png").read_bytes()
    assert dataset.manifest["quarantine"] == {"escaping_path": 1} and dataset.manifest["rows_merged"] == 1
    assert known_counts(data_of(root))[0] == {"train": (2, 3), "val": (1, 1), "test": (1, 1)}
    write(root / "test.parquet", [picture(0)], ["x"])
    with pytest.raises(ValueError, match="test.parquet contains images, but other files list paths; separate them"):
        ingest(data_of(root), tmp_path / "mixed")


def test_an_image_without_bytes_is_read_from_its_path(root, draw, tmp_path):
    draw("pictures/1.png", "pictures/2.png")
    images = [
        {"bytes": picture(0), "path": "elsewhere.png"},
        {"bytes": None, "path": "pictures/1.png"},
        {"bytes": None, "path": str(root / "pictures" / "2.png")},
        {"bytes": None, "path": "pictures/3.png"},
        {"bytes": None, "path": "/etc/hostname"},
        {"bytes": None, "path": None},
    ]
    write(root / "train.parquet", images, list("abcdef"))
    dataset = ingest(data_of(root), tmp_path / "out")
    found = [picture(0), *((root / "pictures" / f"{i}.png").read_bytes() for i in (1, 2))]
    assert [p.image for p in dataset.pairs("train")] == found
    assert dataset.manifest["quarantine"] == {"absolute_path": 1, "missing_file": 1, "no_image": 1}
    draw("pictures/3.png")  # a missing file that turns up later is ingested, as from a table
    assert len(list(ingest(data_of(root), tmp_path / "out").pairs("train"))) == 4


def test_captions_inside_objects_and_in_several_columns(root, tmp_path):
    sentences = [[{"raw": "one", "id": 1}, {"raw": "two", "id": 2}], [{"raw": "three", "id": 3}]]
    write(root / "train.parquet", [picture(0), picture(1)], ["x", "y"], caption_1=["p", "q"], sentences=sentences)
    nested = ingest(data_of(root, caption="sentences.raw"), tmp_path / "nested")
    assert list(pairs(nested)["train"].values()) == [("one", "two"), ("three",)]
    several = ingest(data_of(root, caption="caption*"), tmp_path / "several")
    assert list(pairs(several)["train"].values()) == [("x", "p"), ("y", "q")]
