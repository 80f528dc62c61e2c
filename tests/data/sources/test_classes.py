import formats
import numpy as np
import pytest

from rmdd import config
from rmdd.config import ClassData, Classes
from rmdd.data.decode import decode
from rmdd.data.ingest import ingest, quarantined
from rmdd.data.sources import classes

MAP = "n03 sprocket wheel, chain wheel\nn01 marsh heron\n\nn02 crane\n"


@pytest.fixture
def imagenet(root, put):
    formats.class_folders(root, ["n01", "n02", "n03"])
    put("LOC_synset_mapping.txt", MAP)
    return root


def data_of(root, **rule):
    return ClassData(root=str(root), classes=Classes(**rule))


def read(root, **rule):
    return classes.read(data_of(root, **rule))


def labels(labelled):
    return {row.image: row.captions[0] for row in labelled.pictures}


def test_one_folder_per_class_with_a_name_file(imagenet):
    labelled = read(imagenet, images="val", names="LOC_synset_mapping.txt")
    assert labelled.names == {
        "n01": ("marsh heron",), "n02": ("crane",), "n03": ("sprocket wheel", "chain wheel"),
    }  # fmt: skip
    assert len(labelled.pictures) == 9
    assert labels(labelled)["val/n02/ILSVRC2012_val_00000003.JPEG"] == "n02"


def test_without_a_name_file_the_class_name_is_the_folder_name(root):
    formats.class_folders(root, ["great_white", "heron"], folder="deep/down")
    assert read(root, images="deep/down").names == {"great_white": ("great white",), "heron": ("heron",)}


def test_names_may_be_json(imagenet, put):
    put("names.json", {"n01": "heron", "n02": ["crane", "lifting crane"], "n03": "sprocket"})
    assert read(imagenet, images="val", names="names.json").names["n02"] == ("crane", "lifting crane")


@pytest.mark.parametrize("written", ("n02", "1"))
def test_a_list_gives_class_ids_or_their_numbers_in_sorted_order(imagenet, put, written):
    lines = {"a b.JPEG": written, "c.JPEG": "n03"}
    put("val.txt", "".join(f"{file} {label}\n" for file, label in lines.items()))
    labelled = read(imagenet, layout="list", images="flat", file="val.txt", names="LOC_synset_mapping.txt")
    assert labels(labelled) == {"flat/a b.JPEG": "n02", "flat/c.JPEG": "n03"}


def test_the_kaggle_ground_truth_file(imagenet, put):
    put("LOC_val_solution.csv", "ImageId,PredictionString\nv_1,n03 1 2 3 4 n03 5 6 7 8 \nv_2,n01 0 0 1 1 \n")
    rule = {"layout": "list", "file": "LOC_val_solution.csv", "names": "LOC_synset_mapping.txt"}
    assert labels(read(imagenet, **rule)) == {"v_1.JPEG": "n03", "v_2.JPEG": "n01"}


@pytest.mark.parametrize(
    ("files", "rule", "words"),
    [
        ({"val.txt": "a.JPEG n01\nb.JPEG\n"}, {}, r"val.txt: line 2 is not `FILE CLASS`, found 'b.JPEG'"),
        (
            {"val.txt": "490\n361\n"},
            {},
            "line 1 is not `FILE CLASS`.*lines with only a number are the ILSVRC toolkit's format",
        ),
        (
            {"val.txt": "a.JPEG n01\nb.JPEG n09\n"},
            {},
            "val.txt: line 2 has class 'n09', which is missing from .*mapping.txt",
        ),
        ({"val.txt": "a.JPEG 3\n"}, {}, "val.txt: line 1 has class number 3, but there are only 3"),
        ({"val.txt": "a.JPEG 3\n"}, {"names": None}, "line 1 has class number 3, but data.classes.names must list"),
        ({"LOC_synset_mapping.txt": "n01 a\nn02\n"}, {}, "mapping.txt: line 2 is not `CLASS name, synonym`"),
        ({"LOC_synset_mapping.txt": "n01 a\nn01 b\n"}, {}, "mapping.txt: line 2 repeats class 'n01'"),
        ({"names.json": '{"n01": 3}'}, {"names": "names.json"}, "names.json: class 'n01' needs a name"),
        ({"names.json": "{"}, {"names": "names.json"}, "names.json is not JSON"),
        ({}, {"only": ["n01", "n07"]}, "data.classes.only names 'n07', which is no class"),
        ({}, {"number": 4}, "data.classes.number asks for 4 classes, but .* holds 3"),
        ({}, {"file": "gone.txt"}, "gone.txt not found"),
    ],
)
def test_unreadable_files_are_reported_with_file_and_line(imagenet, put, files, rule, words):
    put("val.txt", "a.JPEG n01\nb.JPEG n02\nc.JPEG n03\n")
    for name, text in files.items():
        put(name, text)
    with pytest.raises(ValueError, match=words):
        read(imagenet, **{"layout": "list", "file": "val.txt", "names": "LOC_synset_mapping.txt"} | rule)


def test_a_name_file_that_lacks_a_class_is_refused(imagenet, put):
    put("LOC_synset_mapping.txt", "n01 marsh heron\nn03 sprocket\n")
    with pytest.raises(ValueError, match="has no name for 1 classes, such as 'n02'"):
        read(imagenet, images="val", names="LOC_synset_mapping.txt")
    labelled = read(imagenet, images="val", names="LOC_synset_mapping.txt", only=["n03", "n01"])
    assert list(labelled.names) == ["n01", "n03"]


def test_folders_that_hold_no_classes_are_refused(root):
    formats.picture(root / "val" / "a.jpg")
    for images, words in (("val", "holds no folder with images"), ("test", "set data.classes.images")):
        with pytest.raises(ValueError, match=words):
            read(root, images=images)


def test_a_subset_of_classes_is_drawn_by_its_seed(root):
    names = [f"c{i:02d}" for i in range(12)]
    formats.class_folders(root, names, each=1, folder="")
    drawn = {seed: list(read(root, number=4, seed=seed).names) for seed in range(6)}
    assert drawn == {seed: list(read(root, number=4, seed=seed).names) for seed in range(6)}
    assert all(len(classes) == 4 and classes == sorted(classes) for classes in drawn.values())
    assert len({tuple(classes) for classes in drawn.values()}) > 3
    assert set(drawn[0]) < set(read(root, number=7, seed=0).names)
    labelled = read(root, number=4)
    assert {row.captions[0] for row in labelled.pictures} == set(labelled.names)


def test_cifar_images_keep_their_order_and_pixels(root, tmp_path):
    formats.cifar10(root / "cifar-10-batches-bin", [0, 2, 1, 2])
    data = data_of(root, layout="cifar10", images="cifar-10-batches-bin")
    assert list(classes.read(data).names) == ["airplane", "automobile", "bird"]
    dataset = ingest(data, tmp_path / "out")
    pairs = list(dataset.pairs("test"))
    assert [pair.captions[0] for pair in pairs] == ["airplane", "bird", "automobile", "bird"]
    pixels = np.asarray(decode(pairs[3].image, max_pixels=10_000, background=(0, 0, 0)))
    assert pixels.shape == (32, 32, 3) and (pixels == (83, 2, 3)).all()


def test_cifar100_has_a_coarse_label_before_the_fine_one(root):
    (root / "fine_label_names.txt").write_text("apple\nbeaver\n")
    (root / "test.bin").write_bytes(bytes([7, 1]) + bytes(3072) + bytes([9, 0]) + bytes(3072))
    assert [row.captions for row in read(root, layout="cifar100").pictures] == [("beaver",), ("apple",)]


def test_damaged_cifar_files_are_reported(root):
    formats.cifar10(root, [0, 1])
    content = (root / "test_batch.bin").read_bytes()
    (root / "test_batch.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="test_batch.bin has 6145 bytes, not a multiple of the record size 3073"):
        read(root, layout="cifar10")
    (root / "test_batch.bin").write_bytes(content[:3073] + bytes([9]) + content[3074:])
    with pytest.raises(ValueError, match="record 1 has class 9, but .*batches.meta.txt lists 3 classes"):
        read(root, layout="cifar10")
    with pytest.raises(
        ValueError, match=r"fine_label_names.txt not found; layout cifar100 needs the unpacked binary version"
    ):
        read(root, layout="cifar100")


def test_pictures_that_cannot_be_decoded_are_quarantined(imagenet, tmp_path):
    bad = imagenet / "val" / "n02" / "ILSVRC2012_val_00000004.JPEG"
    bad.write_bytes(b"no picture")
    dataset = ingest(data_of(imagenet, images="val"), tmp_path / "out")
    assert dataset.counts["test"]["pairs"] == 8 and dataset.manifest["quarantine"] == {"undecodable": 1}
    assert quarantined(dataset)[0]["file"] == "val/n02/ILSVRC2012_val_00000004.JPEG"


def test_a_new_image_makes_the_old_dataset_out_of_date(imagenet, tmp_path):
    data = data_of(imagenet, images="val")
    ingest(data, tmp_path / "out")
    formats.picture(imagenet / "val" / "n01" / "new.jpg")
    with pytest.raises(ValueError, match="the annotations changed"):
        ingest(data, tmp_path / "out")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"layout": "list"}, "layout: list needs data.classes.file"),
        ({"file": "val.txt"}, "layout: list needs data.classes.file"),
        ({"only": ["a", "b"], "number": 2}, "remove one of them"),
        ({"only": ["a"]}, "needs at least two different classes"),
    ],
)
def test_contradicting_settings_are_refused(rule, words):
    with pytest.raises(ValueError, match=words):
        config.Classes(**rule)
