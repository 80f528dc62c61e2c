import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmdd.config import Data
from rmdd.data.ingest import ingest
from rmdd.data.look import look
from rmdd.data.shards import SPLITS

NAMES = [f"{i}.png" for i in range(10)]
SPLIT_OF = ["train"] * 6 + ["val"] * 2 + ["test"] * 2


@pytest.fixture
def build(root, draw, put, tmp_path):
    """Fixture: a function that writes ten images, each with two captions, in the format of this name below `root`."""
    captions = [[f"a picture of number {i}", f"a drawing of number {i}"] for i in range(10)]

    def rows(prefix=""):
        return [
            {"id": str(i), "photo": f"{prefix}{name}", "words": caption, "part": split}
            for i, (name, of_image, split) in enumerate(zip(NAMES, captions, SPLIT_OF, strict=True))
            for caption in of_image
        ]

    def csv(table, separator=","):
        return "\n".join(separator.join(row) for row in [table[0].keys(), *(row.values() for row in table)])

    def content(i):
        return (root / "images" / NAMES[i]).read_bytes()

    def write(kind):
        draw(*(f"images/{name}" for name in NAMES))
        if kind == "table":
            put("list.csv", csv(rows("images/")))
        elif kind == "table beside a folder":
            put("list.tsv", csv(rows(), "\t"))
        elif kind == "table in a folder":
            put("lists/all.jsonl", "\n".join(json.dumps(row) for row in rows("images/")))
        elif kind == "tables named after splits":
            for split in SPLITS:
                put(f"{split}.csv", csv([{**row, "part": row["id"]} for row in rows() if row["part"] == split]))
        elif kind == "parquet of paths":
            for split in SPLITS:
                table = [row for row in rows("images/") if row["part"] == split]
                pq.write_table(pa.Table.from_pylist(table).drop(["part"]), root / f"{split}.parquet")
        elif kind == "parquet without bytes":
            (root / "data").mkdir()
            for split in SPLITS:
                chosen = [i for i in range(10) if SPLIT_OF[i] == split]
                table = [{"jpg": {"bytes": None, "path": f"images/{NAMES[i]}"}, "txt": captions[i]} for i in chosen]
                pq.write_table(pa.Table.from_pylist(table), root / "data" / f"{split}.parquet")
            return root / "data"
        elif kind == "table of paths":
            pq.write_table(pa.Table.from_pylist(rows("images/")), root / "list.parquet")
        elif kind == "numbered columns":
            table = [
                {"path": r["photo"], "caption_0": r["words"], "caption_1": f"{r['words']}!"}
                for r in rows("images/")[::2]
            ]
            put("list.csv", csv(table))
        elif kind == "imagefolder":
            for split in SPLITS:
                chosen = [i for i in range(10) if SPLIT_OF[i] == split]
                draw(*(f"folders/{split}/{NAMES[i]}" for i in chosen))
                table = [{"file_name": NAMES[i], "text": captions[i]} for i in chosen]
                put(f"folders/{split}/metadata.jsonl", "\n".join(map(json.dumps, table)))
            return root / "folders"
        elif kind == "a text beside each image":
            for name, caption in zip(NAMES, captions, strict=True):
                put(f"images/{name[:-4]}.txt", caption[0])
        elif kind == "karpathy":
            images = [
                {"filename": name, "split": split, "sentences": [{"raw": text} for text in of_image]}
                for name, of_image, split in zip(NAMES, captions, SPLIT_OF, strict=True)
            ]
            put("dataset_mine.json", {"images": images})
        elif kind == "lists":
            for split in SPLITS:
                chosen = [i for i in range(10) if SPLIT_OF[i] == split]
                put(f"mine_{split}.json", [{"image": f"images/{NAMES[i]}", "caption": captions[i]} for i in chosen])
        elif kind == "tars":
            with tarfile.open(root / "00000.tar", "w") as tar:
                for i in range(10):
                    for name, data in ((NAMES[i], content(i)), (f"{i}.txt", captions[i][0].encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        elif kind == "parquet":
            for split in SPLITS:
                chosen = [i for i in range(10) if SPLIT_OF[i] == split]
                table = [{"jpg": {"bytes": content(i), "path": NAMES[i]}, "n": i, "txt": captions[i]} for i in chosen]
                pq.write_table(pa.Table.from_pylist(table), root / f"{split}-00000.parquet")
        elif kind == "saved":
            datasets = pytest.importorskip("datasets")
            table = datasets.Dataset.from_dict({"photo": [content(i) for i in range(10)], "text": captions})
            table = table.cast_column("photo", datasets.Image())
            table.save_to_disk(root / "saved")
            return root / "saved"
        elif kind == "dataset":
            put("list.csv", csv(rows("images/")))
            values = {"file": "list.csv", "image": "photo", "caption": "words", "split": "part"}
            return ingest(Data(source="table", root=str(root), table=values), tmp_path / "ingested").path
        return root

    return write


KINDS = {
    "table": ("table", "named"),
    "table beside a folder": ("table", "named"),
    "table in a folder": ("table", "named"),
    "table of paths": ("table", "named"),
    "tables named after splits": ("table", "named"),
    "parquet of paths": ("parquet", "named"),
    "parquet without bytes": ("parquet", "named"),
    "numbered columns": ("table", "unnamed"),
    "imagefolder": ("imagefolder", "named"),
    "a text beside each image": ("imagefolder", "unnamed"),
    "karpathy": ("karpathy", "named"),
    "lists": ("lists", "named"),
    "tars": ("webdataset", "unnamed"),
    "parquet": ("parquet", "named"),
    "saved": ("huggingface", "unnamed"),
    "dataset": ("dataset", "named"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_that_a_look_finds_ingest_what_it_has_counted(kind, build, tmp_path):
    source, splits = KINDS[kind]
    found = look(str(build(kind)))
    assert found.values["source"] == source
    data = Data(**found.values)
    dataset = ingest(data, tmp_path / "out") if source != "dataset" else None
    each = 1 if kind in ("a text beside each image", "tars") else 2
    sizes = {"train": 6, "val": 2, "test": 2}
    assert found.counts == {split: (n, each * n) for split, n in sizes.items()}
    assert dataset is None or {s: (c["pairs"], c["captions"]) for s, c in dataset.counts.items()} == found.counts
    assert source == "dataset" or (set(found.sides) == {(6, 5)} and not found.unreadable)
    assert (found.values.get("splits") is None) == (splits == "named")
    text = "\n".join(found.lines())
    assert f"source    {source}" in text and "10, with" in text and "train 6, val 2, test 2" in text


def test_a_split_that_the_data_lacks_is_taken_from_train(root, draw, put):
    draw(*NAMES)
    put("a.csv", "file_name,text,split\n" + "\n".join(f"{n},a text,{'test' if n < '2' else 'train'}" for n in NAMES))
    found = look(str(root / "a.csv"))
    assert found.values["splits"] == {"val": 1} and {s: n for s, (n, _) in found.counts.items()} == {
        "train": 7,
        "val": 1,
        "test": 2,
    }
    assert "only the splits test and train" in "\n".join(found.remarks)


def test_val_and_test_are_a_part_of_the_train_images_and_never_empty(root, draw, put):
    names = [f"{i}.png" for i in range(20)]
    draw(*names)
    put(
        "a.csv",
        "file_name,text,split\n" + "\n".join(f"{n},a text,{'val' if i > 5 else 'train'}" for i, n in enumerate(names)),
    )
    found = look(str(root / "a.csv"))
    assert found.values["splits"] == {"test": 1} and [n for n, _ in found.counts.values()] == [5, 14, 1]
    put("b.csv", "file_name,text\n" + "\n".join(f"{n},a text" for n in names[:4]))
    found = look(str(root / "b.csv"))
    assert found.values["splits"] == {"val": 1, "test": 1} and [n for n, _ in found.counts.values()] == [2, 1, 1]


def test_many_images_in_tars_are_split_by_shares_so_that_an_ingest_reads_them_once(build, monkeypatch):
    monkeypatch.setattr("rmdd.data.look.COUNTED", 10)
    found = look(str(build("tars")))
    assert found.values["splits"] == {"val": 0.2, "test": 0.2} and "splits    about train 6" in "\n".join(found.lines())


def test_images_of_the_sample_that_cannot_be_opened_are_named(root, draw, put):
    draw(*NAMES[:8])
    put("a.csv", "file_name,text\n" + "\n".join(f"{n},a text" for n in NAMES))
    found = look(str(root))
    assert f"2 of the 10 images looked at cannot be opened: {root}" in "\n".join(found.lines())


def test_tables_named_after_splits_without_captions_or_with_other_folders(root, draw, put):
    draw(*(f"images/{n}" for n in NAMES), *(f"more/{n}" for n in ("a.png", "b.png")))
    put("my_train.csv", "file_name,text\n" + "\n".join(f"images/{n},a text" for n in NAMES[:8]))
    put("my_val.csv", "file_name,text\n" + "\n".join(f"images/{n},a text" for n in NAMES[8:]))
    put("my_test.csv", "file_name\nimages/0.png")
    found = look(str(root))
    assert found.values["table"]["file"] == {"train": "my_train.csv", "val": "my_val.csv"}
    assert found.values["splits"] == {"test": 1} and [n for n, _ in found.counts.values()] == [7, 2, 1]
    assert "my_test.csv is not read, because it has no column text" in "\n".join(found.remarks)
    put("my_train.csv", "file_name,text\n" + "\n".join(f"{n},a text" for n in NAMES))
    put("my_test.csv", "file_name,text\na.png,a text\nb.png,a text\n")
    with pytest.raises(ValueError, match="my_val.csv to .*; write one table with a column split"):
        look(str(root))


def test_the_largest_of_several_tables_is_read(root, draw, put):
    draw(*NAMES)
    put("a.csv", "file_name,text\n0.png,a text")
    put("b.csv", "file_name,text\n" + "\n".join(f"{n},a text" for n in NAMES))
    found = look(str(root))
    assert found.images == 10 and "the largest table is read, and not a.csv" in "\n".join(found.remarks)


def test_absolute_paths_of_images_are_refused_with_a_relative_path_to_write(root, draw, put):
    draw("images/0.png")
    put("a.csv", f"file_name,text\n{root / 'images' / '0.png'},a text")
    with pytest.raises(ValueError, match="are absolute, such as .*: write images/0.png and so on, relative to"):
        look(str(root))


def test_unknown_names_of_splits_are_not_used(root, draw, put):
    draw(*NAMES)
    put("a.csv", "file_name,text,split\n" + "\n".join(f"{n},a text,fold {n[0]}" for n in NAMES))
    found = look(str(root))
    assert found.values["table"]["split"] is None and "fold 0" in "\n".join(found.remarks)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no table, JSON list, tar or Parquet file was found"),
        ({"a.csv": "path,text\n/abs/0.png,a text"}, "the images of column path do not exist, such as /abs/0.png"),
        ({"a.csv": "path,number\n0.png,3"}, "a.csv has the columns path, number; no column holds captions"),
        (
            {"captions_val2014.json": {"images": [{"id": 1}], "annotations": []}},
            "an object with images and no sentences",
        ),
    ],
)
def test_data_that_no_source_reads_is_refused_with_the_reason(root, draw, put, files, words):
    draw(*(["0.png"] if files else []))
    for name, content in files.items():
        put(name, content)
    with pytest.raises(ValueError, match="no data source can read") as error:
        look(str(root))
    assert words in str(error.value) and "rmdd docs data" in str(error.value)


def test_images_without_captions_and_a_missing_path_are_refused(root, draw):
    draw("0.png")
    with pytest.raises(ValueError, match="has images and no captions; write a table"):
        look(str(root))
    with pytest.raises(ValueError, match="does not exist"):
        look(str(root / "nothing"))
