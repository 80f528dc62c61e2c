import pytest
from formats import rows_of

from rmdd.config import Data
from rmdd.data.ingest import ingest


def image(name, split, *captions, **more):
    return {"filename": name, "split": split, "sentences": [{"raw": c, "tokens": ["no"]} for c in captions]} | more


def rows(root, **options):
    return rows_of(Data(source="karpathy", root=str(root), **options))


def test_coco_takes_filepath_raw_and_restval(root, put):
    put(
        "annotations/dataset_coco.json",
        {"dataset": "coco", "images": [
            image("a.jpg", "train", "A bowl of plums.", "Ripe fruit! ", filepath="train2014"),
            image("b.jpg", "restval", "A tram.", filepath="val2014"),
            image("c.jpg", "test", "A cat.", filepath="val2014"),
        ]},
    )  # fmt: skip
    coco_rows = rows(root, layout="coco")
    assert [(row.image, row.split) for row in coco_rows] == [
        ("train2014/a.jpg", "train"), ("val2014/b.jpg", "restval"), ("val2014/c.jpg", "test"),
    ]  # fmt: skip
    assert coco_rows[0].captions == ("A bowl of plums.", "Ripe fruit! ")
    assert coco_rows[0].source == "coco" and coco_rows[1].origin == "dataset_coco.json image 1"


@pytest.mark.parametrize("folder", ["", "flickr30k-images", "flickr30k_images/flickr30k_images"])
def test_flickr_images_are_found_where_the_archives_put_them(root, draw, put, tmp_path, folder):
    draw(f"{folder}/1.jpg" if folder else "1.jpg")
    put("dataset_flickr30k.json", {"dataset": "flickr30k", "images": [image("1.jpg", "train", "x")]})
    dataset = ingest(Data(source="karpathy", layout="flickr30k", root=str(root)), tmp_path / "out")
    assert [pair.pair_id for pair in dataset.pairs("train")] == ["1.jpg"]


def test_coco_2014_names_are_found_under_2017(root, draw, put, tmp_path):
    draw("train2017/000000000101.jpg", "val2017/000000000202.jpg", "train2017/000000000303.jpg")
    put("dataset_coco.json", {"dataset": "coco", "images": [
        image("COCO_train2014_000000000101.jpg", "train", "x", filepath="train2014"),
        image("COCO_val2014_000000000202.jpg", "restval", "y", filepath="val2014"),
        image("COCO_val2014_000000000303.jpg", "val", "z", filepath="val2014"),
    ]})  # fmt: skip
    dataset = ingest(Data(source="karpathy", layout="coco", root=str(root)), tmp_path / "out")
    assert dataset.counts["train"]["pairs"] == 2 and dataset.counts["val"]["pairs"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'images': 1}", "is not JSON"),
        ([{"image": "a", "caption": "b"}], "source: lists"),
        ({"images": {}}, "expected an object with a list `images`"),
        ({"images": [{"filename": "a.jpg", "split": "train"}]}, "image 0 needs filename"),
        ('{"images": []}\n{"images": []}', "JSON lines"),
    ],
)
def test_files_of_other_formats_are_refused(root, put, content, message):
    put("k.json", content)
    with pytest.raises(ValueError, match=message):
        rows(root, annotations="k.json")


def test_errors_for_missing_files_list_the_paths_that_were_tried(root):
    with pytest.raises(ValueError, match="annotations/dataset_coco.json.*data.annotations"):
        rows(root, layout="coco")
    with pytest.raises(ValueError, match="k.json not found"):
        rows(root, annotations="k.json")
    with pytest.raises(ValueError, match="'cc3m' has no Karpathy file"):
        rows(root, layout="cc3m")


def test_the_emoji_set_reads_alike_in_both_formats(shared):
    emoji = shared / "data" / "emoji"
    if not (emoji / "emoji_karpathy.json").is_file():
        pytest.skip("no emoji set")
    from_karpathy = {row.image: (row.captions, row.split) for row in rows(emoji, annotations="emoji_karpathy.json")}
    files = {split: f"emoji_{split}.json" for split in ("train", "val", "test")}
    from_lists: dict = {}
    for row in rows_of(Data(source="lists", root=str(emoji), annotations=files)):
        from_lists[row.image] = (from_lists.get(row.image, ((), ""))[0] + row.captions, row.split)
    assert from_karpathy == from_lists and len(from_karpathy) == 3767
