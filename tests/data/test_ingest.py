"""Check that an ingest counts every row in its manifest, resumes after a failure, and refuses unusable input."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rmdd.config import Data, Scenes, TableSource
from rmdd.data.ingest import ingest, quarantined
from rmdd.data.shards import Dataset


def adds_up(dataset):
    """Check that each input row and caption is in a shard or counted with a reason of rejection; return the dataset."""
    manifest = dataset.manifest
    pairs = sum(count["pairs"] for count in dataset.counts.values())
    captions = sum(count["captions"] for count in dataset.counts.values())
    assert manifest["rows_in"] == pairs + manifest["rows_merged"] + sum(manifest["quarantine"].values())
    assert manifest["captions_in"] == captions + sum(manifest["captions_dropped"].values())
    entries = quarantined(dataset)
    reasons = [entry["reason"] for entry in entries if entry["what"] == "pair"]
    assert {reason: reasons.count(reason) for reason in reasons} == manifest["quarantine"]
    caption_reasons = [entry["reason"] for entry in entries if entry["what"] == "caption"]
    dropped = {reason: n for reason, n in manifest["captions_dropped"].items() if reason != "image_quarantined"}
    assert {reason: caption_reasons.count(reason) for reason in caption_reasons} == dropped
    assert all({"file", "reason", "origin", "detail"} <= entry.keys() for entry in entries)
    dataset.verify()
    return dataset


@pytest.fixture
def messy(root, draw, put):
    """Fixture: config of a train list that has usable rows, and at least one row for each reason of rejection."""
    draw("a.png", "b.png", "sub/c.png", "d.png", "png_named.jpg")
    draw("huge.png", size=(90, 90))
    (root / "text.png").write_text("not an image")
    (root / "empty.png").touch()
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:80])
    for mode in ("L", "LA", "P", "RGBA"):
        Image.new(mode, (4, 4)).save(root / f"{mode}.png")
    Image.new("CMYK", (4, 4)).save(root / "CMYK.jpg")
    Image.fromarray(np.full((4, 4), 999, dtype=np.uint16)).save(root / "sixteen.png")
    rows = [
        ("a.png", "first"),
        ("b.png", "one"),
        ("a.png", "second"),
        ("a.png", "first"),  # this caption repeats the image's first caption exactly
        ("a.png", " \n"),  # this caption is only white space
        ("sub\\c.png", "with a Windows separator"),
        ("./sub//c.png", "the same image again"),
        ("d.png", ""),  # this image has no usable caption
        ("d.png", None),
        ("png_named.jpg", ["a list", 7, "in train"]),
        ("text.png", "x"),
        ("empty.png", "x"),
        ("cut.png", "x"),
        ("huge.png", "x"),
        ("missing.png", ["x", "y"]),
        (str(root / "a.png"), "absolute"),
        ("C:\\a.png", "absolute too"),
        ("../root/a.png", "escaping"),
        (None, "no path"),
        ("", "no path"),
        ("b.png", "half a pair \ud83d"),
        *((f"{mode}.png", mode) for mode in ("L", "LA", "P", "RGBA", "sixteen")),
        ("CMYK.jpg", "CMYK"),
    ]
    put("train.json", [{"image": image, "caption": caption} for image, caption in rows])
    return Data(source="lists", root=str(root), annotations={"train": "train.json"}, max_pixels=8000, max_loss=0.6)


def test_every_bad_row_is_counted_with_its_reason(messy, tmp_path):
    dataset = adds_up(ingest(messy, tmp_path / "out"))
    assert dataset.manifest["quarantine"] == {
        "absolute_path": 2,
        "escaping_path": 1,
        "missing_file": 1,
        "no_caption": 1,
        "no_path": 2,
        "too_large": 1,
        "truncated": 1,
        "undecodable": 2,
    }
    assert dataset.manifest["captions_dropped"] == {
        "caption_not_text": 3,
        "duplicate_caption": 1,
        "empty_caption": 2,
        "image_quarantined": 11,
    }
    pairs = {pair.pair_id: pair for pair in dataset.pairs("train")}
    assert list(pairs)[:4] == ["a.png", "b.png", "sub/c.png", "png_named.jpg"]
    assert pairs["a.png"].captions == ("first", "second")
    assert pairs["sub/c.png"].captions == ("with a Windows separator", "the same image again")
    assert pairs["png_named.jpg"].captions == ("a list", "in train")
    missing = next(entry for entry in quarantined(dataset) if entry["reason"] == "missing_file")
    assert missing["file"] == "missing.png" and missing["origin"] == "train.json record 14"


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG]
)
def test_a_disk_error_stops_the_ingest_but_a_path_error_is_quarantined(messy, tmp_path, monkeypatch, number):
    def read(path, real=Path.read_bytes):
        if path.name == "b.png":
            raise OSError(number, os.strerror(number))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        if number in (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG):
            assert ingest(messy, tmp_path / "out").manifest["quarantine"]["unreadable"] == 1
            return
        with pytest.raises(OSError, match=rf"part 0 .*{os.strerror(number)}.*fix this and start the ingest again"):
            ingest(messy, tmp_path / "out")
    assert "unreadable" not in ingest(messy, tmp_path / "out").manifest["quarantine"]


def test_image_bytes_are_stored_unchanged(messy, tmp_path):
    for pair in ingest(messy, tmp_path / "out").pairs("train"):
        assert pair.image == (tmp_path / "root" / pair.pair_id).read_bytes()


def test_images_can_be_reencoded_smaller(messy, tmp_path):
    import io

    small = ingest(messy.model_copy(update={"reencode": 8}), tmp_path / "out")
    for pair in small.pairs("train"):
        image = Image.open(io.BytesIO(pair.image))
        assert (image.format, image.size, image.mode) == ("PNG", (8, 8), "RGB")


def test_an_equal_ingest_returns_the_existing_dataset(messy, tmp_path):
    first = ingest(messy, tmp_path / "out")
    times = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    again = ingest(messy, tmp_path / "out")
    assert again.hash == first.hash
    assert {file: file.stat().st_mtime_ns for file in again.path.iterdir()} == times
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "out", "root"]


def test_an_image_that_was_missing_is_added_by_the_next_ingest(messy, draw, tmp_path):
    before = ingest(messy, tmp_path / "out")
    draw("missing.png")
    after = adds_up(ingest(messy, tmp_path / "out"))
    assert after.counts["train"]["pairs"] == before.counts["train"]["pairs"] + 1
    assert "missing_file" not in after.manifest["quarantine"]


def test_other_input_into_the_same_folder_is_refused(messy, put, tmp_path):
    out = tmp_path / "out"
    ingest(messy, out)
    with pytest.raises(ValueError, match="max_pixels differ"):
        ingest(messy.model_copy(update={"max_pixels": 9000}), out)
    ingest(messy.model_copy(update={"image_size": 32, "eval_limit": 5}), out)
    put("train.json", [{"image": "a.png", "caption": "changed"}])
    with pytest.raises(ValueError, match=r"annotations changed \(train.json\)"):
        ingest(messy, out)


def test_a_folder_with_other_content_is_refused(messy, tmp_path):
    (tmp_path / "precious").mkdir()
    ingest(messy, tmp_path / "precious")  # an ingest accepts an empty folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not a dataset"):
        ingest(messy, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_failed_ingest_leaves_no_dataset_and_keeps_its_finished_parts(messy, tmp_path):
    parts = []

    def broken(make, items):
        parts.extend(items)
        yield make()(items[0])
        raise RuntimeError("the machine is gone")

    fine = messy.model_copy(update={"shard_mb": 1e-4})
    with pytest.raises(RuntimeError):
        ingest(fine, tmp_path / "out", broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", ".out.parts", "root"]
    fresh = []

    def counted(make, items):
        for result in map(make(), items):
            fresh.append(result["fresh"])
            yield result

    adds_up(ingest(fine, tmp_path / "out", counted))
    assert fresh == [False] + [True] * (len(parts) - 1)


def test_the_hash_depends_on_content_and_not_on_the_folder(messy, tmp_path):
    first = ingest(messy, tmp_path / "out")
    shutil.move(tmp_path / "root", tmp_path / "elsewhere")
    moved = messy.model_copy(update={"root": str(tmp_path / "elsewhere")})
    assert ingest(moved, tmp_path / "out2").hash == first.hash
    finely = moved.model_copy(update={"shard_mb": 1e-4})
    cut = adds_up(ingest(finely, tmp_path / "out3"))
    assert len(cut.manifest["shards"]) > 3 and cut.hash == first.hash
    Image.new("RGB", (2, 2)).save(tmp_path / "elsewhere" / "a.png")
    assert ingest(moved, tmp_path / "out4").hash != first.hash


def test_one_image_in_two_splits_is_refused(root, draw, put, tmp_path):
    draw("a.png")
    put("t.json", [{"image": "a.png", "caption": "x"}])
    put("v.json", [{"image": "./a.png", "caption": ["y"]}])
    data = Data(source="lists", root=str(root), annotations={"train": "t.json", "val": "v.json"})
    with pytest.raises(ValueError, match="a.png is in train .t.json record 0. and in val .v.json record 0."):
        ingest(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_that_repeat_the_root_folder_are_reported(root, draw, put, tmp_path):
    draw("pictures/a.png")
    put("pictures/t.json", [{"image": "pictures/a.png", "caption": "x"}])
    data = Data(source="lists", root=str(root / "pictures"), annotations={"train": "t.json"})
    with pytest.raises(ValueError, match=f"set data.root to {root}$"):
        ingest(data, tmp_path / "out")


def test_missing_rows_and_a_missing_root_are_refused(root, put, tmp_path):
    put("t.json", [])
    with pytest.raises(ValueError, match="has no rows"):
        ingest(Data(source="lists", root=str(root), annotations={"train": "t.json"}), tmp_path / "out")
    with pytest.raises(ValueError, match="is not a folder"):
        ingest(Data(source="lists", root=str(root / "no"), annotations={"train": "t.json"}), tmp_path / "out")


def test_real_annotations_without_images_are_counted_and_refused(shared, tmp_path):
    real = shared / "reference" / "real_annotations"
    for layout, files, captions in [
        ("flickr30k", {"val": "flickr30k_val_first60.json", "test": "flickr30k_test_first60.json"}, 600),
        ("coco", {"test": "coco_karpathy_test_first60.json", "val": "coco_karpathy_test_six_captions.json"}, 360),
    ]:
        data = Data(source="lists", layout=layout, root=str(real), annotations=files)
        rows = sum(len(json.loads((real / file).read_text())) for file in files.values())
        for _ in range(2):  # the second call finds the dataset
            with pytest.raises(ValueError, match=rf"kept 0 of {rows} images: {rows} missing_file"):
                ingest(data, tmp_path / layout)
        dataset = adds_up(Dataset.open(tmp_path / layout))
        assert dataset.manifest["rows_in"] == rows == dataset.manifest["quarantine"]["missing_file"]
        assert dataset.manifest["captions_in"] == captions


def test_a_wrong_root_is_an_error_that_says_where_it_looked_and_what_to_set(root, draw, put, tmp_path):
    draw("pictures/a.png", "pictures/b.png")
    put("captions.csv", "image,caption,split\na.png,one,train\nb.png,two,train\n")
    data = Data(source="table", root=str(root))
    with pytest.raises(ValueError) as error:
        ingest(data, tmp_path / "out")
    message = str(error.value)
    assert "kept 0 of 2 images: 2 missing_file (such as a.png: no such file under data.root)" in message
    assert f"looked for {root / 'a.png'}, {root / 'b.png'}" in message
    assert f"set data.root to {root / 'pictures'} and data.table.file to ../captions.csv" in message
    assert f"rejected rows: {tmp_path / 'out' / 'quarantine.jsonl'}" in message
    right = data.model_copy(update={"root": str(root / "pictures"), "table": TableSource(file="../captions.csv")})
    assert sum(n["pairs"] for n in ingest(right, tmp_path / "right").counts.values()) == 2


def test_an_input_without_images_is_an_error_that_says_so(root, tmp_path):
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), root / "a.parquet"
    )
    with pytest.raises(
        ValueError, match="kept 0 of 0 images: no file that data.source 'parquet' reads below .* lists an"
    ):
        ingest(Data(source="parquet", root=str(root)), tmp_path / "out")


def test_losing_more_than_the_stated_share_is_an_error(messy, put, tmp_path):
    ingest(messy, tmp_path / "out")  # it loses 11 of its 21 images
    less = messy.model_copy(update={"max_loss": 0.2})
    with pytest.raises(ValueError, match=r"may lose 20 % of them .data.max_loss(.|\n)*; correct the input or, to acc"):
        ingest(less, tmp_path / "out")
    put("train.json", [{"image": name, "caption": "x"} for name in ("text.png", "cut.png")])
    with pytest.raises(ValueError, match="kept 0 of 2 images: 1 truncated .such as cut.png: .*; 1 undecodable"):
        ingest(messy.model_copy(update={"max_loss": 1}), tmp_path / "none")


def duplicated(root, draw, put):
    """Write a table whose train images b and c are also in val and test, and twice in train; return its config."""
    draw("a.png", "b.png", "c.png", "d.png", "e.png")
    for copy, name in {"b_val": "b", "b_again": "b", "c_test": "c", "d_again": "d"}.items():
        shutil.copy(root / f"{name}.png", root / f"{copy}.png")
    splits = {"b_val": "val", "e": "val", "c_test": "test", "b_again": "train", "d_again": "train"}
    names = ["a", "b", "c", "d", *splits]
    put("captions.csv", "image,caption,split\n" + "".join(f"{n}.png,x {n},{splits.get(n, 'train')}\n" for n in names))
    return Data(source="table", root=str(root), shard_mb=1e-4)


def test_images_in_two_splits_are_counted_and_named(root, draw, put, tmp_path):
    dataset = adds_up(ingest(duplicated(root, draw, put), tmp_path / "out"))
    assert dataset.manifest["duplicates"] == {
        "within": {"train": 2, "val": 0, "test": 0},
        "across": {"train and val": 1, "train and test": 1, "val and test": 0},
    }
    named = [json.loads(line)["pairs"] for line in (dataset.path / "duplicates.jsonl").read_text().splitlines()]
    assert sorted(named, key=str) == [
        {"train": ["b.png", "b_again.png"], "val": ["b_val.png"]}, {"train": ["c.png"], "test": ["c_test.png"]},
    ]  # fmt: skip
    (across, within) = dataset.remarks(data := Data(source="table", root=str(root)))
    reader = data.model_copy(update={"source": "dataset"})
    assert "; set data.duplicates: drop to" in across
    assert "; ingest it again with data.duplicates: drop to" in dataset.remarks(reader)[0]
    assert "1 in train and val, 1 in train and test" in across and str(dataset.path / "duplicates.jsonl") in across
    assert "2 in train" in within


def test_images_of_val_and_test_are_dropped_from_train(root, draw, put, tmp_path):
    data = duplicated(root, draw, put)
    kept = ingest(data, tmp_path / "kept")
    dropping = data.model_copy(update={"duplicates": "drop"})
    dataset = adds_up(ingest(dropping, tmp_path / "dropped"))
    assert [pair.pair_id for pair in dataset.pairs("train")] == ["a.png", "d.png", "d_again.png"]
    assert [list(dataset.pairs(split)) for split in ("val", "test")] == [
        list(kept.pairs(split)) for split in ("val", "test")
    ]
    assert dataset.manifest["quarantine"] == {"duplicate_image": 3}
    assert not any(dataset.manifest["duplicates"]["across"].values())
    assert not (dataset.path / "duplicates.jsonl").exists()
    one_shard = dropping.model_copy(update={"shard_mb": 128})
    assert ingest(one_shard, tmp_path / "one").hash == dataset.hash != kept.hash


def test_ignored_exif_orientations_are_counted(root, put, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 2)).save(root / "a.jpg", exif=exif)
    Image.new("RGB", (6, 2), "red").save(root / "b.jpg")
    put("captions.csv", "image,caption,split\na.jpg,x,train\nb.jpg,x,val\n")
    data = Data(source="table", root=str(root))
    ignoring = data.model_copy(update={"exif_orientation": False})
    for first, second in ((data, ignoring), (ignoring, data)):
        dataset = ingest(first, tmp_path / f"{first.exif_orientation}")
        (remark,) = dataset.remarks(ignoring)
        assert "1 images have an EXIF orientation" in remark and dataset.remarks(data) == []
        assert ingest(second, dataset.path).manifest == dataset.manifest
    turned = ingest(data.model_copy(update={"reencode": 8}), tmp_path / "turned")
    assert turned.remarks(ignoring) == []


def test_real_annotations_with_images_keep_five_and_six_captions(shared, root, draw, tmp_path):
    real = shared / "reference" / "real_annotations"
    files = ["coco_karpathy_test_first60.json", "coco_karpathy_test_six_captions.json"]
    records = [json.loads((real / file).read_text()) for file in files]
    draw(*(record["image"] for part in records for record in part))
    for file in files:
        shutil.copy(real / file, root)
    data = Data(source="lists", layout="coco", root=str(root), annotations={"val": files[0], "test": files[1]})
    dataset = adds_up(ingest(data, tmp_path / "out"))
    assert dataset.counts["test"] == {"pairs": 10, "captions": 60}
    assert [list(pair.captions) for pair in dataset.pairs("val")] == [record["caption"] for record in records[0]]


@pytest.mark.ray
def test_ray_and_a_single_process_write_the_same_bytes(messy, ray_local, tmp_path):
    from rmdd.execution.ray.stream import over_tasks

    for data in (messy.model_copy(update={"shard_mb": 1e-3}), Data(scenes=Scenes(train=150, val=20, test=20, size=16))):
        plain = ingest(data, tmp_path / data.source / "plain")
        streamed = adds_up(ingest(data, tmp_path / data.source / "ray", over_tasks()))
        assert streamed.manifest == plain.manifest
        for file in os.listdir(plain.path):
            assert (plain.path / file).read_bytes() == (streamed.path / file).read_bytes(), file


def test_a_damaged_dataset_is_not_opened(messy, tmp_path):
    path = ingest(messy, tmp_path / "out").path
    shard = path / "train-00000.parquet"
    good = shard.read_bytes()

    shard.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="the manifest says"):
        Dataset.open(path)
    shard.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    with pytest.raises(ValueError, match="changed after ingest"):
        Dataset.open(path).verify()
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        Dataset.open(path)
    shard.write_bytes(good)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99"):
        Dataset.open(path)
    (path / "manifest.json").write_text(json.dumps(manifest | {"data_hash": "0"}))
    with pytest.raises(ValueError, match="data_hash"):
        Dataset.open(path).verify()
    with pytest.raises(ValueError, match="not a dataset"):
        Dataset.open(tmp_path)


def test_an_ingested_dataset_is_a_source(messy, tmp_path):
    first = ingest(messy, tmp_path / "out")
    again = ingest(Data(source="dataset", root=str(first.path)), tmp_path / "unused")
    assert again.hash == first.hash and not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match="not a dataset"):
        ingest(Data(source="dataset", root=str(tmp_path)), tmp_path / "unused")
