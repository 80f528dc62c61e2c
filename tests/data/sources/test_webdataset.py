import gc
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from rmdd.config import Data, Tars
from rmdd.data.ingest import ingest, quarantined
from rmdd.data.sources.webdataset import samples


def picture(seed, kind="JPEG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def pack(root):
    """Fixture: a function that writes a tar file below `root` with the given members, (name, content) pairs."""

    def write(path, members, mode="w"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / path, mode) as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return root / path

    return write


def sample(key, caption, seed=0, **facts):
    """Return the tar members (name, content) of a sample, as img2dataset writes them."""
    metadata = json.dumps({"caption": caption, "url": "x", "status": "success", **facts}).encode()
    return [(f"{key}.jpg", picture(seed)), (f"{key}.json", metadata), (f"{key}.txt", caption.encode())]


def tars(root, **rule):
    return Data(source="webdataset", root=str(root), webdataset=Tars(**rule))


def adds_up(dataset):
    manifest = dataset.manifest
    pairs, captions = (sum(count[k] for count in dataset.counts.values()) for k in ("pairs", "captions"))
    assert manifest["rows_in"] == pairs + sum(manifest["quarantine"].values())
    assert manifest["captions_in"] == captions + sum(manifest["captions_dropped"].values())
    dataset.verify()
    return dataset


def test_the_layouts_of_laion_and_datacomp(root, pack, tmp_path):
    members = sample("000000001", "one") + sample("000000003", "three", 3)
    pack("train/00000.tar", members)
    pack("train/00001.tar.gz", [("d/5.png", picture(5, "PNG")), ("d/5.json", b'{"caption": "five"}')], "w:gz")
    pack("coco-val-0.tar", [("7.JPG", picture(7)), ("7.json", b'{"captions": ["a", "b", "a"], "cocoid": 7}')])
    pack("test-0.tar", [("9.webp", picture(9, "WEBP")), ("9.txt", b"nine\n")])
    dataset = adds_up(ingest(tars(root, files="**/*.tar*"), tmp_path / "out"))
    captions = {split: {p.pair_id: p.captions for p in dataset.pairs(split)} for split in ("train", "val", "test")}
    assert captions == {
        "train": {
            "train/00000.tar/000000001": ("one",),
            "train/00000.tar/000000003": ("three",),
            "train/00001.tar.gz/d/5": ("five",),
        },
        "val": {"coco-val-0.tar/7": ("a", "b")},
        "test": {"test-0.tar/9": ("nine",)},
    }
    assert next(dataset.pairs("train")).image == picture(0)
    assert dataset.manifest["captions_dropped"] == {"duplicate_caption": 1}


def test_without_split_names_a_hash_chooses_the_split(root, pack, tmp_path):
    pack("00000.tar", [m for i in range(60) for m in sample(f"{i:04d}", f"caption {i}", i)])
    first = adds_up(ingest(tars(root), tmp_path / "one"))
    assert all(first.counts[split]["pairs"] for split in ("train", "val", "test"))
    assert first.counts["train"]["pairs"] > 35
    pack("train-00000.tar", sample("1", "one"))
    by_name = ingest(tars(root), tmp_path / "two").counts["train"]["pairs"]
    unnamed = ingest(tars(root, split_by_name=False), tmp_path / "three")
    assert by_name == first.counts["train"]["pairs"] + 1
    assert {p.pair_id for p in first.pairs("val")} <= {p.pair_id for p in unnamed.pairs("val")}


def test_malformed_samples_are_quarantined(root, pack, tmp_path):
    members = [
        *sample("0", "good"),
        ("1.jpg", b"no image"), ("1.txt", b"x"),
        ("2.jpg", picture(2)),
        ("3.txt", b"no image"),
        ("4.jpg", picture(4)), ("4.json", b"{broken"),
        ("5.jpg", picture(5)), ("5.txt", b"\xff\xfe\xfa"),
        ("6.jpg", picture(6)[:200]), ("6.txt", b"cut"),
        ("7.jpg", b""), ("7.txt", b"empty"),
        ("8.jpg", picture(8)), ("8.json", b'{"caption": null}'),
        ("9.jpg", picture(9)), ("9.json", b'["a list"]'),
        *sample("0", "again"),
        ("README", b"no key"), (".hidden.txt", b"x"),
        ("10.jpg", picture(10)), ("10.txt", b" \n"), ("10.json", b'{"caption": "text comes first"}'),
        ("../11.jpg", picture(11)), ("../11.txt", b"a name is only a name"),
    ]  # fmt: skip
    pack("0.tar", members)
    dataset = adds_up(ingest(tars(root, split_by_name=False).model_copy(update={"max_loss": 1}), tmp_path / "out"))
    assert dataset.manifest["quarantine"] == {
        "duplicate_key": 1, "no_caption": 6, "no_image": 1, "truncated": 2, "undecodable": 1,
    }  # fmt: skip
    assert dataset.manifest["captions_dropped"] == {"caption_not_text": 1, "empty_caption": 1, "image_quarantined": 5}
    entry = next(e for e in quarantined(dataset) if e["reason"] == "duplicate_key")
    assert entry["file"] == "0.tar/0" and entry["origin"] == "0.tar 0"
    assert sum(c["pairs"] for c in dataset.counts.values()) == 2


def test_a_truncated_tar_is_quarantined_with_the_number_of_good_samples(root, pack, tmp_path):
    pack("1.tar", [m for i in range(4) for m in sample(f"{i}", f"caption {i}", i)])
    content = (root / "1.tar").read_bytes()
    with tarfile.open(root / "1.tar") as archive:
        offsets = [m.offset for m in archive.getmembers()] + [archive.offset]
    damaged = bytearray(content)
    damaged[offsets[6] + 20] ^= 1  # the checksum of this tar header is now wrong
    for number, (cut, pairs) in enumerate(
        {
            content[: offsets[6]]: 2,  # the tar ends between two samples
            content[: offsets[6] + 100]: 2,  # the tar ends within a header
            content[: offsets[6] + 700]: 2,  # the tar ends within an image
            bytes(damaged): 2,
            content[: offsets[12]]: 4,  # the tar lacks only its end mark
            content[:300]: None,
        }.items()
    ):
        pack("0.tar", sample("a", "a whole tar", 9))
        (root / "1.tar").write_bytes(cut)
        dataset = adds_up(ingest(tars(root), tmp_path / str(number)))
        assert dataset.manifest["quarantine"] == {"truncated_tar": 1}
        kept_pairs = sum(c["pairs"] for c in dataset.counts.values()) - 1
        (entry,) = quarantined(dataset)
        assert entry["file"] == "1.tar"
        # If the last sample before the cut is incomplete, it is not kept as a pair.
        expected = f"everything after {kept_pairs} samples"
        assert pairs is None or (kept_pairs in (pairs - 1, pairs) and expected in entry["detail"])


def test_reading_a_tar_does_not_keep_its_members_in_memory(root, pack):
    tar = pack("a.tar", [(f"{i:04d}.txt", b"x") for i in range(200)])
    for number, _ in enumerate(samples(tar), 1):
        if number in (100, 200):  # two checks suffice; listing all objects of the process is slow
            assert sum(issubclass(type(item), tarfile.TarInfo) for item in gc.get_objects()) < 10


def test_tars_of_other_formats_are_refused(root, pack, tmp_path):
    with pytest.raises(ValueError, match=r"no file under .* matches data.webdataset.files '\*\*/\*.tar'"):
        ingest(tars(root), tmp_path / "out")
    pack("0.tar", [("0.npy", b"x"), ("0.cls", b"1")])
    with pytest.raises(ValueError, match="an image .* and a caption .*; found members of type cls, npy"):
        ingest(tars(root), tmp_path / "out")
    (root / "0.tar").write_bytes(b"<html>not found</html>" * 99)
    with pytest.raises(ValueError, match="is not a tar file"):
        ingest(tars(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_ray_and_a_single_process_write_the_same_bytes(root, pack, ray_local, tmp_path):
    from rmdd.execution.ray.stream import over_tasks

    for tar in range(4):
        pack(f"{tar}.tar", [m for i in range(20) for m in sample(f"{tar}{i}", f"caption {tar} {i}", i)])
    plain, streamed = ingest(tars(root), tmp_path / "plain"), ingest(tars(root), tmp_path / "ray", over_tasks())
    assert plain.manifest == streamed.manifest
    for file in plain.path.iterdir():
        assert file.read_bytes() == (streamed.path / file.name).read_bytes()
