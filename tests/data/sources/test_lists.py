import pytest
from formats import rows_of

from rmdd.config import Data
from rmdd.data.ingest import ingest
from rmdd.data.source import NO_SPLIT
from rmdd.data.sources.lists import ends
from rmdd.data.splits import load_split

TRAIN = [
    {"image": "i/1.jpg", "caption": "One.", "image_id": 0},
    {"image": "i/1.jpg", "caption": "Uno.", "image_id": 0},
    {"image": "i/2.jpg", "caption": "Two.", "image_id": 1},
]
EVAL = [{"image": "i/3.jpg", "caption": ["Three.", "Tres."]}]


def rows(root, **options):
    return rows_of(Data(source="lists", root=str(root), **options))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("flickr30k", "flickr30k_{}.json"),
        ("flickr8k", "annotations/flickr8k_{}.json"),
        ("coco", "../annotations/coco_karpathy_{}.json"),
        ("cc3m", "cc3m_captions_{}.json"),
        ("cc3m", "captions_{}zx2025.json"),
    ],
)
def test_layouts_know_their_file_names(root, put, layout, name):
    for split, content in {"train": TRAIN, "val": EVAL, "test": [{"image": "i/4.jpg", "caption": "Four."}]}.items():
        put(name.format(split), content)
    parsed = rows(root, layout=layout)
    assert [(row.image, row.captions, row.split) for row in parsed] == [
        ("i/1.jpg", ("One.",), "train"), ("i/1.jpg", ("Uno.",), "train"), ("i/2.jpg", ("Two.",), "train"),
        ("i/3.jpg", ("Three.", "Tres."), "val"), ("i/4.jpg", ("Four.",), "test"),
    ]  # fmt: skip
    assert {row.source for row in parsed} == {layout}


def test_records_of_one_image_become_one_pair(root, draw, put, tmp_path):
    draw("i/1.jpg", "i/2.jpg", "i/3.jpg")
    put("t.json", TRAIN)
    put("v.json", EVAL, encoding="utf-8-sig")
    dataset = ingest(
        Data(source="lists", root=str(root), annotations={"train": "t.json", "val": "v.json"}), tmp_path / "out"
    )
    assert [pair.captions for pair in dataset.pairs("train")] == [("One.", "Uno."), ("Two.",)]
    assert dataset.manifest["rows_in"] == 4 and dataset.manifest["rows_merged"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not JSON"),
        ('{"image": "a", "caption": "b"}\n{"image": "c", "caption": "d"}\n', "JSON lines .*source: table"),
        ({"images": [], "dataset": "coco"}, "source: karpathy"),
        (7, "expected a JSON list"),
        (["a"], "record 0 needs `image` and `caption`"),
        ([TRAIN[0], {"image": "b.jpg"}], "record 1 needs"),
        ([TRAIN[0], {"image": "i/2.jpg", "caption": "x", "image_id": 0}], "give each image one image_id"),
        ([TRAIN[0], {"image": "i/1.jpg", "caption": "x", "image_id": 9}], "give each image one image_id"),
    ],
)
def test_files_of_other_formats_are_refused(root, put, content, message):
    put("t.json", content)
    with pytest.raises(ValueError, match=message):
        rows(root, annotations={"train": "t.json"})


def test_files_of_other_encodings_are_refused(root, put):
    put("t.json", '[{"image": "é"}]', encoding="latin-1")
    with pytest.raises(ValueError, match="not UTF-8"):
        rows(root, annotations={"train": "t.json"})


def test_a_missing_list_is_reported(root, put):
    put("flickr30k_train.json", TRAIN)
    with pytest.raises(ValueError, match="the val list of layout 'flickr30k' not found"):
        rows(root, layout="flickr30k")


def test_flickr8k_as_released(root, put):
    put("Flickr8k.token.txt", "1.jpg#0\tA dog .\r\n1.jpg#1\tIt jumps .\r\n2.jpg#0\tA cat .\r\n3.jpg.1#0\tStray .\r\n")
    for word, names in {"train": "1.jpg\r\n", "dev": "2.jpg\n", "test": "\n"}.items():
        put(f"Flickr_8k.{word}Images.txt", names)
    assert [(row.image, row.captions, row.split) for row in rows(root, layout="flickr8k")] == [
        ("1.jpg", ("A dog .",), "train"), ("1.jpg", ("It jumps .",), "train"),
        ("2.jpg", ("A cat .",), "val"), ("3.jpg.1", ("Stray .",), NO_SPLIT),
    ]  # fmt: skip
    put("Flickr_8k.testImages.txt", "1.jpg\n")
    with pytest.raises(ValueError, match="also in the train list"):
        rows(root, layout="flickr8k")
    put("Flickr_8k.testImages.txt", "")
    put("Flickr8k.token.txt", "1.jpg A dog\n")
    with pytest.raises(ValueError, match="line 1 is not"):
        rows(root, layout="flickr8k")


def test_flickr8k_images_in_no_split_are_counted(root, draw, put, tmp_path):
    draw("Flicker8k_Dataset/1.jpg")
    put("Flickr8k.token.txt", "1.jpg#0\tA dog .\n3.jpg.1#0\tStray .\n")
    for word in ("train", "dev", "test"):
        put(f"Flickr_8k.{word}Images.txt", "1.jpg\n" if word == "train" else "")
    dataset = ingest(Data(source="lists", layout="flickr8k", root=str(root)), tmp_path / "out")
    assert dataset.counts["train"] == {"pairs": 1, "captions": 1}
    assert dataset.manifest["quarantine"] == {"no_split": 1}


def test_flickr8k_from_kaggle_gets_splits_by_hash(root, draw, put, tmp_path):
    names = [f"{i}.jpg" for i in range(40)]
    draw(*(f"Images/{name}" for name in names))
    lines = [f'{name},"A dog, running ."\n{name},A cat {i}\n' for i, name in enumerate(names)]
    put("captions.txt", "image,caption\n" + "".join(lines))
    data = Data(source="lists", layout="flickr8k", root=str(root), split_fractions=(0.5, 0.25, 0.25))
    dataset = ingest(data, tmp_path / "out")
    sizes = [dataset.counts[split]["pairs"] for split in ("train", "val", "test")]
    assert sum(sizes) == 40 and all(sizes) and sizes[0] > max(sizes[1:])
    assert next(dataset.pairs("train")).captions[0] == "A dog, running ."
    put("captions.txt", "file,text\n1.jpg,x\n")
    with pytest.raises(ValueError, match="expected the header `image,caption`"):
        rows(root, layout="flickr8k")


def test_flickr30k_as_released(root, put):
    put("results_20130124.token", "1.jpg#0\tA dog runs .\r\n1.jpg#1\tIt runs .\r\n2.jpg#0\tA cat .\n")
    parsed = rows(root, layout="flickr30k")
    assert [(row.image, row.captions, row.split) for row in parsed] == [
        ("1.jpg", ("A dog runs .",), None), ("1.jpg", ("It runs .",), None), ("2.jpg", ("A cat .",), None),
    ]  # fmt: skip
    put("results_20130124.token", "no token file")
    with pytest.raises(ValueError, match="line 1 is not `<file>#<number><TAB><caption>`"):
        rows(root, layout="flickr30k")


def test_cc3m_as_released(root, draw, put, tmp_path):
    draw("images/GCC_1.jpg", "images/GCC_2.jpg")
    turns = [{"from": "human", "value": "Say it.\n<image>"}, {"from": "gpt", "value": "a quiet lane ."}]
    put("chat.json", [{"id": "GCC_1", "image": "GCC_1.jpg", "conversations": turns}])
    assert [(row.image, row.captions, row.split) for row in rows(root, layout="cc3m")] == [
        ("GCC_1.jpg", ("a quiet lane .",), "train")
    ]
    facts = {"caption": "a quiet lane .", "blip_caption": None, "url": "x"}
    put("metadata.json", [{"id": f"GCC_{i}", "image": f"GCC_{i}.jpg"} | facts for i in (1, 2)])
    dataset = ingest(Data(source="lists", layout="cc3m", root=str(root)), tmp_path / "out")
    assert sum(count["pairs"] for count in dataset.counts.values()) == 2
    put("metadata.json", [{"image": "GCC_1.jpg"}])
    with pytest.raises(ValueError, match="record 0 needs `image` and `caption` or `conversations`"):
        rows(root, layout="cc3m")


def test_cc3m_gets_splits_of_exact_sizes_independent_of_the_file_order(root, draw, put, tmp_path):
    names = [f"GCC_train_{i:09d}.jpg" for i in range(25)]
    records = [{"image": name, "caption": f"caption {name}"} for name in names]
    put("metadata.json", records)
    thirds = {"split_fractions": (0.6, 0.2, 0.2)}
    cut = {row.image: row.split for row in rows(root, layout="cc3m", **thirds)}
    order = [row.image for row in rows(root, layout="cc3m", **thirds)]
    assert [list(cut.values()).count(split) for split in ("train", "val", "test")] == [15, 5, 5]
    assert order != names and sorted(order) == names
    put("metadata.json", records[::-1])
    assert {row.image: row.split for row in rows(root, layout="cc3m", **thirds)} == cut
    assert [row.image for row in rows(root, layout="cc3m", **thirds)] == order

    draw(*(f"images/{name}" for name in names))
    data = Data(source="lists", layout="cc3m", root=str(root), eval_limit=3, image_size=8, **thirds)
    dataset = ingest(data, tmp_path / "out")
    gallery = load_split(dataset, "test", data, tmp_path / "cache").pair_ids
    assert gallery == [name for name in order if cut[name] == "test"][:3]


def test_the_papers_split_of_cc3m_has_the_papers_sizes():
    assert ends(595_375, (0.6, 0.2, 0.2)) == (357_225, 357_225 + 119_075)
