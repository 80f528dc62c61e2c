import json

import formats
import pytest
from formats import rows_of

from rmdd import config
from rmdd.data.ingest import ingest
from rmdd.runs.cost import known_counts


def data_of(root, **changes):
    return config.Data(source="lists", layout="textcaps", root=str(root), **changes)


@pytest.fixture
def released(root):
    formats.textcaps(root, "train", [f"{i:016x}" for i in range(40)])
    formats.textcaps(root, "val", ["00aa00aa00aa00aa", "11bb11bb11bb11bb"], captions=5)
    return root


def test_val_is_used_as_test_and_a_val_split_is_taken_from_train(released, tmp_path):
    dataset = ingest(data_of(released), tmp_path / "out")
    assert dataset.counts["test"] == {"pairs": 2, "captions": 10}
    train, val = dataset.counts["train"]["pairs"], dataset.counts["val"]["pairs"]
    assert train + val == 40 and 0 < val < train
    assert dataset.manifest["rows_merged"] == 80 - 40 + 10 - 2 and not dataset.manifest["quarantine"]
    first = next(dataset.pairs("test"))
    assert first.pair_id == "train_images/00aa00aa00aa00aa.jpg"
    assert first.captions[1] == "A sign that says 00aa00aa00aa00aa #1."


def test_one_file_is_enough_for_a_probe(released, tmp_path):
    (released / "TextCaps_0.1_train.json").unlink()
    dataset = ingest(data_of(released, annotations={"test": "TextCaps_0.1_val.json"}), tmp_path / "out")
    assert {split: n["pairs"] for split, n in dataset.counts.items()} == {"train": 0, "val": 0, "test": 2}
    with pytest.raises(ValueError, match=r"TextCaps_0.1_train.json not found"):
        rows_of(data_of(released))


def test_without_caption_str_the_references_are_read(released):
    path = released / "TextCaps_0.1_val.json"
    content = json.loads(path.read_text())
    for record in content["data"]:
        del record["caption_str"]
    path.write_text(json.dumps(content))
    rows = [row for row in rows_of(data_of(released)) if row.split == "test"]
    assert len(rows) == 10 and all(len(row.captions) == 5 for row in rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"image": "a", "caption": "b"}], r"expected an object with a list `data` \(TextCaps\), found a list of 1"),
        ({"data": [{"image_id": 3}]}, "record 0 needs a string `image_id`"),
        ({"data": [{"image_id": "a", "set_name": "test"}]}, "record 0 has no caption_str.*use TextCaps_0.1_val.json"),
    ],
)
def test_files_of_other_formats_are_refused(released, content, words):
    (released / "TextCaps_0.1_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"TextCaps_0.1_val.json: {words}"):
        rows_of(data_of(released))


def test_the_size_of_textcaps_is_known_without_its_files(tmp_path):
    absent = data_of(tmp_path / "absent")
    for data in (absent, config.Data(source="textcaps", root=absent.root)):
        assert known_counts(data)[0]["test"] == (3166, 15830)
