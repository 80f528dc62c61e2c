"""Check trained models: embeddings, search against the recall, saving, and the commands."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUIET, changed, stored
from typer.testing import CliRunner

import rmdd
from rmdd import config
from rmdd.cli.app import app
from rmdd.core.layout import require_layout
from rmdd.core.storage import Storage
from rmdd.data.shards import Dataset
from rmdd.evaluate.students import score
from rmdd.models.dual import build
from rmdd.models.prepared import prepare_split
from rmdd.models.text import encoder_identity
from rmdd.retrieval.model import RetrievalModel

SCENES = changed(
    data={"image_size": 24, "train_limit": 150, "scenes": {"train": 160, "val": 10, "test": 30, "size": 32}},
    model={"image": {"widths": [24]}, "text": {"width": 128}, "width": 48},
    experts={"epochs": 4},
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def model(storage):
    """Fixture: a model that was trained on all pairs of drawn scenes, loaded from disk."""
    trained = rmdd.train(stored(storage / "runs", SCENES), "all", out=storage / "model", progress=QUIET)
    assert trained.path == storage / "model" and trained.trained_on["pairs"] == 150
    return rmdd.load_model(storage / "model")


@pytest.fixture(scope="module")
def unseen(model, storage):
    """Fixture: the test split of the scenes, and the folder with its pictures as files, named by their pair ids."""
    (manifest,) = (storage / "runs" / "data").glob("*/manifest.json")
    dataset = Dataset.open(manifest.parent)
    prepared = prepare_split(model.data, model.towers, dataset, "test", storage / "runs" / "cache")
    split, pictures = prepared.split, storage / "pictures"
    for number, pair_id in enumerate(split.pair_ids):
        file = pictures / f"part-{number % 3}" / f"{pair_id.replace('/', '_')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(split.encoded(number))
    return prepared, pictures


def test_search_finds_what_the_recall_says(model, unseen):
    prepared, pictures = unseen
    split, gallery = prepared.split, model.gallery(pictures)
    recalls = score(model.encoder, prepared, torch.device("cpu"))
    names = [pair_id.replace("/", "_") for pair_id in split.pair_ids]
    ranks = []
    for caption, image in zip(split.captions, split.image_of.tolist(), strict=True):
        hits = model.search(caption, gallery, top=len(split))
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        ranks.append([hit.path.stem for hit in hits].index(names[image]))
    for k in (1, 5, 10):
        assert 100 * sum(rank < k for rank in ranks) / len(ranks) == pytest.approx(recalls.ir[k])
    assert recalls.ir[5] > 3 * 100 * 5 / len(split), "the model has learned more than chance"


def test_a_model_in_a_new_process_gives_the_same_bits(model, unseen, storage):
    _, pictures = unseen
    files, texts = sorted(pictures.rglob("*.png"))[:5], ["A red ring!", "two blue squares"]
    code = (
        "import sys, json, rmdd, torch; torch.set_num_threads(int(sys.argv[2])); m = rmdd.load_model(sys.argv[1])\n"
        "files, texts = json.loads(sys.argv[3])\n"
        "vectors = torch.cat([m.encode_images(files), m.encode_texts(texts)])\n"
        "print(vectors.numpy().tobytes().hex())"
    )
    arguments = [str(storage / "model"), str(torch.get_num_threads()), json.dumps([[str(f) for f in files], texts])]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    here = torch.cat([model.encode_images(files), model.encode_texts(texts)])
    assert done.stdout.strip() == here.numpy().tobytes().hex()
    assert here.dtype == torch.float32 and here.shape == (7, model.embedding_size)
    assert here.norm(dim=1).tolist() == pytest.approx([1.0] * 7)


def test_paths_pictures_and_arrays_have_the_same_embeddings(model, unseen):
    file = min(unseen[1].rglob("*.png"))
    picture = Image.open(file)
    forms = [str(file), file, picture, np.asarray(picture.convert("RGB")), torch.tensor(np.asarray(picture))]
    embeddings = model.encode_images(forms)
    torch.testing.assert_close(embeddings, embeddings[:1].expand_as(embeddings))
    for alone in (model.encode_images(str(file)), model.encode_images(file)):
        torch.testing.assert_close(alone, embeddings[:1])
    (hit,) = model.search("a red ring", [picture], top=5)
    assert hit.path is picture
    assert (model.encode_texts(["a red ring"]) == model.encode_texts("A red  RING.")).all()
    assert model.encode_images([]).shape == model.encode_texts([]).shape == (0, model.embedding_size)


def test_unusable_images_and_texts_are_errors_and_a_folder_leaves_them_out(model, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.PNG")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    gallery = model.gallery(tmp_path)
    assert [path.name for path in gallery.images] == ["good.PNG"]
    assert list(gallery.unreadable) == [str(tmp_path / "bad.jpg")]
    with pytest.raises(ValueError, match="undecodable") as error:
        model.encode_images([tmp_path / "bad.jpg"])
    assert error.value.__notes__ == [f"while reading {tmp_path / 'bad.jpg'}"]
    with pytest.raises(ValueError, match=r"uint8 of shape \(H, W, 3\).*float64 of shape \(3, 8, 8\)"):
        model.encode_images([np.zeros((3, 8, 8))])
    with pytest.raises(ValueError, match=r"'\.\.' has no words"):
        model.encode_texts([".."])
    with pytest.raises(ValueError, match="no pictures in"):
        (tmp_path / "empty").mkdir()
        model.search("a ring", tmp_path / "empty")


def test_search_images_prints_hits_and_counts_files_that_cannot_be_read(model, unseen, storage):
    _, pictures = unseen
    (pictures / "broken.png").write_bytes(b"no picture")
    words = ["search-images", str(storage / "model"), "a red ring", str(pictures), "--top", "3"]
    facts = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    text = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    (pictures / "broken.png").unlink()
    expected = model.search("a red ring", pictures, top=3)
    assert [(hit["path"], hit["score"]) for hit in facts["hits"]] == [(str(path), score) for path, score in expected]
    assert facts["pictures"] == 30 and list(facts["unreadable"]) == [str(pictures / "broken.png")]
    assert text.splitlines()[0].split() == [f"{expected[0].score:.3f}", str(expected[0].path)]
    assert "searched 30 pictures; could not read 1 undecodable" in text
    (storage / "broken").mkdir()
    (storage / "broken" / "one.png").write_bytes(b"no picture")
    none = CliRunner().invoke(app, ["search-images", str(storage / "model"), "a ring", str(storage / "broken")])
    assert (
        none.exit_code == 1
        and f"none of the 1 pictures in {storage / 'broken'} and its subfolders can be read (1 und" in none.stderr
    )
    missing = CliRunner().invoke(app, ["search-images", str(storage / "model"), "a ring", str(storage / "no")])
    assert missing.exit_code == 2 and "this folder does not exist" in missing.stderr


def test_damage_of_a_model_is_named(model, storage, tmp_path):
    with pytest.raises(ValueError, match=r"model\.json is missing; give a folder that `rmdd train` wrote"):
        rmdd.load_model(tmp_path)
    copied = model.save(tmp_path / "copied")
    assert (copied.encode_texts(["a ring"]) == model.encode_texts(["a ring"])).all()
    assert model.save(tmp_path / "copied").path == tmp_path / "copied", "a model may be replaced"
    require_layout(Storage(storage / "runs"))
    verified = CliRunner().invoke(app, ["verify", str(tmp_path / "copied")])
    assert verified.exit_code == 0, verified.output
    weights = tmp_path / "copied" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"....")
    with pytest.raises(ValueError, match=r"copied is damaged.*copy or train the model again"):
        rmdd.load_model(tmp_path / "copied")
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "copied")]).exit_code == 1
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU that torch can use; give cpu"):
            rmdd.load_model(storage / "model", "cuda")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="has other files and is no model"):
        model.save(tmp_path / "other")
    for name, found in (("other", "has other files and is no model"), ("other/file", "is a file")):
        with pytest.raises(ValueError, match=found):
            rmdd.train(stored(tmp_path / "runs", SCENES), "all", out=tmp_path / name, progress=QUIET)
    assert not (tmp_path / "runs").exists(), "the folder is checked before the training"


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('{', "{{", "Expecting property name"),
        ('"width": 48', '"width": 48, "colour": 1', "model.colour"),
        ('"image_size": 24', '"image_size": "large"', "data.image_size"),
    ],
)  # fmt: skip
def test_a_damaged_or_newer_description_of_a_model_is_named(model, tmp_path, before, after, named):
    file = model.save(tmp_path / "copied").path / "model.json"
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(ValueError, match=f"model.json is damaged, or from another version of rmdd: .*{named}") as error:
        rmdd.load_model(file.parent)
    assert "\n" not in str(error.value) and "pydantic" not in str(error.value)


def test_a_model_is_saved_in_the_folder_that_a_link_names(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        assert model.save(tmp_path / "link").path == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "link"]


def test_the_card_shows_how_to_use_the_model(model, storage, unseen, monkeypatch, capsys):
    text = (storage / "model" / "README.md").read_text()
    assert "all training pairs; loss infonce, student 0" in text and f"{model.scores['val']['R@mean']:.1f} %" in text
    script = text.partition("```python\n")[2].partition("```")[0]
    files = sorted(map(str, unseen[1].rglob("*.png")))
    script = script.replace("folder/with/pictures", str(unseen[1]))
    script = script.replace("one.jpg", files[0]).replace("two.png", files[1])
    monkeypatch.chdir(storage / "model")
    exec(compile(script, "card", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5 + 2
    assert "\n" not in repr(model) and "convnet + hashing" in repr(model)


def test_a_timm_tower_keeps_its_running_statistics(tmp_path):
    image = {"name": "resnet10t", "weights": "random:1", "projection": "linear"}
    towers = config.Model(image=image, text={"name": "hashing", "width": 16}, width=8)
    data, constants = config.Data(image_size=32), ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    encoder = build(towers, 16, 32, 0, "student")
    with torch.no_grad():
        encoder.image_tower.bn1.running_mean.fill_(0.3)
    facts = {"kind": "random pairs", "pairs": 4, "student": 0}
    model = RetrievalModel(encoder, towers, data, *constants, 16, encoder_identity(towers.text), facts)
    loaded = rmdd.load_model(model.save(tmp_path / "model").path)
    pixels = np.arange(40 * 30 * 3, dtype=np.uint32).reshape(40, 30, 3).astype(np.uint8)
    assert torch.equal(loaded.encode_images([pixels]), model.encode_images([pixels]))
    assert loaded.encoder.image_tower.bn1.running_mean[0] == np.float32(0.3) and loaded.scores == {}
    assert "It was not scored" in (tmp_path / "model" / "README.md").read_text()
