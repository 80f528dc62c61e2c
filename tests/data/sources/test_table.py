import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import rows_of

from rmdd.config import Data, Splits, TableSource
from rmdd.data.carving import meaning
from rmdd.data.ingest import ingest
from rmdd.data.source import NO_SPLIT

EXPECTED = [("1.png", ("A, b", "c")), ("1.png", ("d",)), ("2.png", ("e",)), ("3.png", ("f",))]
CSV = """image,caption,split
1.png,"[""A, b"", ""c""]",train
1.png,d,train
2.png,e,dev
3.png,f,Test
"""
SEMICOLONS = """image; caption ;split
1.png;["A, b", "c"];train
1.png;d;train
2.png;e;valid
3.png;f;test
"""
JSON_LINES = """{"image": "1.png", "caption": ["A, b", "c"], "split": "train"}
{"image": "1.png", "caption": "d", "split": "train"}

{"image": "2.png", "caption": "e", "split": "val"}
{"image": "3.png", "caption": "f", "split": "test"}"""


def test_a_table_per_split_puts_its_rows_in_this_split(root, put):
    put("a.csv", "image,caption,split\n1.png,x,test\n")
    put("b.csv", "image,caption\n2.png,y\n")
    found = [(row.image, row.split, row.origin) for row in rows(root, file={"train": "a.csv", "val": "b.csv"})]
    assert found == [("1.png", "train", "a.csv line 2"), ("2.png", "val", "b.csv line 2")]


def rows(root, **table):
    return rows_of(Data(source="table", root=str(root), table=TableSource(**table)))


def values(parsed):
    return [(row.image, row.captions) for row in parsed]


def write_parquet(path):
    columns = {"image": ["1.png", "1.png", "2.png", "3.png"], "caption": [["A, b", "c"], ["d"], ["e"], ["f"]]}
    pq.write_table(pa.table(columns | {"split": ["train", "train", "dev", "test"]}), path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", CSV),
        ("t.csv", SEMICOLONS.replace("\n", "\r\n")),
        ("t.tsv", SEMICOLONS.replace(";", "\t")),
        ("t.jsonl", JSON_LINES),
        ("t.parquet", None),
    ],
)
def test_every_format_gives_the_same_rows(root, put, name, text):
    if text is None:
        write_parquet(root / name)
    else:
        put(name, text)
    parsed = rows(root, file=name)
    assert values(parsed) == EXPECTED
    data = Data(source="table", root=str(root), table=TableSource(file=name))
    assert [meaning(row.split, data) for row in parsed] == ["train", "train", "val", "test"]


def test_rows_of_one_image_become_one_pair(root, draw, tmp_path):
    draw("1.png", "2.png", "3.png")
    write_parquet(root / "t.parquet")
    dataset = ingest(Data(source="table", root=str(root), table=TableSource(file="t.parquet")), tmp_path / "out")
    assert next(dataset.pairs("train")).captions == ("A, b", "c", "d")
    assert [dataset.counts[split]["pairs"] for split in ("train", "val", "test")] == [1, 1, 1]


def test_without_a_split_column_the_hash_of_the_path_decides(root, draw, put, tmp_path):
    names = [f"{i}.png" for i in range(60)]
    draw(*names)
    put("captions.csv", "image,caption\n" + "".join(f"{name},x\n" for name in names))
    data = Data(source="table", root=str(root), split_fractions=(0.6, 0.2, 0.2))
    first = ingest(data, tmp_path / "one")
    split_of = {pair.pair_id: split for split in ("train", "val", "test") for pair in first.pairs(split)}
    assert len(split_of) == 60 and len(set(split_of.values())) == 3
    put("captions.csv", "image,caption\n" + "".join(f"{name},x\n" for name in reversed(names[:30])))
    second = ingest(data, tmp_path / "two")
    assert all(split_of[pair.pair_id] == split for split in ("train", "val", "test") for pair in second.pairs(split))


def test_rows_with_bad_cells_are_quarantined(root, put, draw, tmp_path):
    draw("1.png")
    put("captions.csv", "image,caption,split\n1.png,good,train\n1.png\n2.png,x,\n,y,train\n", encoding="utf-8-sig")
    assert [row.split for row in rows(root)] == ["train", NO_SPLIT, NO_SPLIT, "train"]
    manifest = ingest(Data(source="table", root=str(root)), tmp_path / "out").manifest
    assert manifest["quarantine"] == {"no_path": 1, "no_split": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "file,caption\n1.png,x\n", "no column 'image'; it has file, caption; set data.table.image"),
        ("captions.csv", "image,image,caption\n1,2,x\n", "two of the columns image, image, caption have the same name"),
        ("captions.csv", 'image,caption\n1.png,"open\n', "cannot be read"),
        ("t.jsonl", "[1]\n", "line 1 is a list of 1.*source: lists"),
        ("t.jsonl", '{"image": 1}\n{"image"\n', "no column 'caption'"),
        ("t.jsonl", '{"image": 1, "caption": 2}\n{"image"\n', "line 2 is not JSON"),
        ("t.parquet", "no parquet", "is not a Parquet file"),
        ("t.xlsx", "", "unknown extension '.xlsx'"),
    ],
)
def test_files_of_other_formats_are_refused(root, put, name, text, message):
    put(name, text)
    with pytest.raises(ValueError, match=message):
        rows(root, file=name)


def test_an_unknown_split_is_refused_until_it_is_named(root, draw, put, tmp_path):
    draw("1.png", "2.png", "3.png")
    put("captions.csv", "image,caption,split\n1.png,x,train\n2.png,x,Hold out\n3.png,x,extra\n")
    data = Data(source="table", root=str(root))
    with pytest.raises(
        ValueError, match=r"captions.csv line 3: 'Hold out' is not .* data.splits.names: {hold out: val}"
    ):
        ingest(data, tmp_path / "out")
    named = data.model_copy(update={"splits": Splits(names={"Hold out": "val", "extra": "none"})})
    dataset = ingest(named, tmp_path / "out")
    assert {split: n["pairs"] for split, n in dataset.counts.items()} == {"train": 1, "val": 1, "test": 0}
    assert dataset.manifest["quarantine"] == {"no_split": 1}


def test_a_missing_table_is_reported(root):
    with pytest.raises(ValueError, match="captions.csv not found; set data.table.file"):
        rows(root)
