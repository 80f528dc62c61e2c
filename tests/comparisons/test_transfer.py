"""One set, students with other towers: which rates, which texts, and what counts as transfer."""

import json
import statistics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import rmdd
from rmdd import config
from rmdd.artefact.distilled import DistilledSet
from rmdd.cli import app as cli
from rmdd.comparisons.transfer import begin, target
from rmdd.core.progress import Progress
from rmdd.models.dual import build
from rmdd.models.text import embed

QUIET = Progress(quiet=True)
IMAGES = ("test_resnet", "test_nfnet", "test_efficientnet", "test_vit")


@pytest.fixture(scope="module")
def moved(made, bert, tmp_path_factory):
    """Four timm families, another text encoder, and both changed at once, with random pairs."""
    import shutil

    storage = shutil.copytree(made, tmp_path_factory.mktemp("transfer") / "runs")
    one = next(storage.glob("one-*"))
    to = [*IMAGES, f"text:{bert}@mean", f"test_resnet@random+text:{bert}"]
    return rmdd.transfer(one, to, overrides=["model.text.max_tokens=40"], random=True, progress=QUIET), one


def test_the_matrix_has_every_tower_with_both_kinds_of_rates(moved, bert):
    found, _ = moved
    towers = [
        ("convnet", "hashing"),
        *((i, "hashing") for i in IMAGES),
        ("convnet", str(bert)),
        ("test_resnet", str(bert)),
    ]
    expected = [(i, t, rates, kind) for i, t in towers for rates, kind in
                (("learned", "set"), ("tuned", "set"), ("tuned", "random"))]  # fmt: skip
    assert [(r["tower"], r["text"], r["rates"], r["kind"]) for r in found.rows] == expected and not found.failed
    assert [r["source"] for r in found.rows] == [True] * 3 + [False] * 18
    tuned = [r for r in found.rows if r["rates"] == "tuned" and r["kind"] == "set"]
    assert all(r["chosen"]["lr"] in (0.03, 0.3) and r["chosen"]["loss"] == "wbce" for r in tuned)
    assert all(r["difference"]["to"].endswith("random pairs") for r in found.rows if r["kind"] == "set")
    assert len({tuple(r["students"]) for r in found.rows}) > 10


def test_the_source_is_that_of_its_run_and_stands_apart(moved):
    found, one = moved
    table = json.loads((one / "evaluation.json").read_text())["table"]
    assert found.rows[0]["test_last"] == table["ptm_st"]["test_last"], "hashing reads no tokens"
    assert found.rows[2]["test_last"] == table["random"]["test_last"]
    for rates in ("learned", "tuned"):
        others = [r for r in found.rows[3:] if (r["kind"], r["rates"]) == ("set", rates)]
        assert found.mean[rates]["towers"] == len(others) == 6
        for metric in ("R@mean", "IR@1", "TR@10"):
            mean = statistics.fmean(r["test_last"][metric]["mean"] for r in others)
            assert found.mean[rates]["test_last"][metric] == pytest.approx(mean)
    text = (found.folder / "table.md").read_text()
    first, second = text.split("## the towers that it was made for")
    assert "| convnet | hashing |" in second and "| convnet | hashing |" not in first and "mean of 6" in first
    kept = json.loads((found.folder / "results.json").read_text())
    assert kept["rows"] == found.rows and kept["transfer_mean"] == found.mean
    assert (found.folder / "table.csv").read_text().count("\n") == 1 + 21


def test_choices_of_rates_never_read_test(moved):
    found, _ = moved
    students = found.folder.parents[0] / "students"
    records = {p: json.loads(p.read_text()) for p in students.glob("*/*.json")}
    selected = [r for p, r in records.items() if p.name.startswith("select")]
    assert len(selected) == 7 * 2 and all("test" not in str(r) for r in selected)


def test_texts_are_the_nearest_real_captions_encoded_anew(moved, bert, tmp_path):
    found, one = moved
    own = DistilledSet.load(one / "set")
    run = config.load(one / "run.yaml")
    real = [json.loads(json.dumps(c)) for c in _train_captions(one)]
    space = embed(real, run.model.text, tmp_path)
    captions = [c for s in own.subsets for c in s.captions]
    texts = torch.cat([s.texts for s in own.subsets])
    cosine = torch.nn.functional.normalize(texts) @ torch.nn.functional.normalize(torch.tensor(space)).T
    for row, caption in enumerate(captions):
        best = {real[i] for i in torch.nonzero(cosine[row] > cosine[row].max() - 1e-6).flatten().tolist()}
        assert caption in best, "by cosine in the source space"
    tower = run.model.text.model_copy(update={"name": str(bert), "pooling": "mean", "max_tokens": 40})
    anew = embed(captions, tower, tmp_path)
    files = [load_file(p) for p in (one.parent / "comparisons" / "pairs").glob("*.safetensors")]
    ours = [torch.cat([f["0.texts"], f["1.texts"]]).numpy() for f in files if f["0.texts"].shape[1] == 12]
    assert any(np.array_equal(anew, each) for each in ours)
    twice = len(captions) - len(set(captions))
    rows = [r for r in found.rows if r["kind"] == "set"]
    assert all(r["costs"].get("duplicates") == (twice if r["text"] == str(bert) else None) for r in rows)
    assert any(f"{twice} of 7 are the caption of an earlier pair" in m for r in rows for m in r["remarks"])


def _train_captions(one):
    from rmdd.data.shards import Dataset
    from rmdd.data.splits import load_split

    (manifest,) = one.parent.glob("data/*/manifest.json")
    data = config.load(one / "run.yaml").data
    return load_split(Dataset.open(manifest.parent), "train", data, one.parent / "cache").captions


@pytest.mark.parametrize("name", IMAGES)
def test_towers_are_pooled_features(made, name):
    import timm

    run = target(config.load(next(made.glob("one-*")) / "run.yaml"), name)
    model = build(run.model, 16, run.data.image_size, 0, "student")
    width = timm.create_model(name, num_classes=0).num_features
    assert model.image_tower.width == width != 1000


def test_words_of_towers(made, tmp_path):
    run = config.load(next(made.glob("one-*")) / "run.yaml")
    assert target(run, "resnet18").model.image.weights == "random:0", "it starts as the source does"
    assert target(run, "resnet18@pretrained").model.image.weights == "pretrained"
    other = target(run, "convnet@random:7+text:bert-base-uncased@mean").model
    assert (other.image.name, other.image.weights, other.image.widths) == ("convnet", "random:7", (4,))
    assert (other.text.name, other.text.pooling, other.text.width) == ("bert-base-uncased", "mean", 16)
    (tmp_path / "with+text:in").mkdir()
    assert target(run, f"text:{tmp_path}/with+text:in").model.text.name == f"{tmp_path}/with+text:in"
    assert target(run, "resnet18").distill == run.distill and target(run, "resnet18").evaluate == run.evaluate
    for wrong in ("", "@random", "text:", "+text:x", "resnet18+text:"):
        with pytest.raises(ValueError, match="write a tower as IMAGE"):
            target(run, wrong)


def test_wrong_towers_are_all_named_before_anything_starts(storage, tmp_path):
    one = next(storage.glob("one-*"))
    to = [
        "resnet81",
        "test_vit",
        "test_vit",
        "convnet",
        "text:/no/such/folder",
        "resnet18@missing.pt",
        "text:",
        "inception_v3",
        "test_maxvit",
    ]
    words = [w for name in to for w in ("--to", name)]
    done = CliRunner().invoke(cli.app, ["transfer", str(one), *words, "--quiet"])
    assert done.exit_code == 2 and not (storage / "comparisons").exists()
    for told in (
        "--to resnet81: no image tower 'resnet81'",
        "--to test_vit: is there twice",
        "--to convnet: these are the towers that the set was made for",
        "--to text:/no/such/folder: no text tower folder",
        "--to resnet18@missing.pt: no weights file",
        "--to text:: write a tower as",
        "--to test_maxvit: image tower 'test_maxvit'",
        "--to inception_v3: image tower 'inception_v3' does not take images of 16 pixels",
    ):
        assert told in done.stderr, told
    assert "8 mistake(s)" in done.stderr, "and nothing of the one that is right"
    done = CliRunner().invoke(cli.app, ["transfer", str(one), "--quiet"])
    assert done.exit_code == 2 and "no tower to go to" in done.stderr
    done = CliRunner().invoke(cli.app, ["transfer", "random", "--to", "test_vit", "--quiet"])
    assert done.exit_code == 2 and "random is no distilled set" in done.stderr


def test_a_transfer_is_added_to_and_resumed(storage):
    one = next(storage.glob("one-*"))
    rmdd.transfer(one, ["test_resnet"], progress=QUIET)
    before = {p: p.stat().st_mtime_ns for p in storage.glob("comparisons/students/*/*.json")}
    done = CliRunner().invoke(
        cli.app, ["transfer", str(one), "--to", "test_resnet", "--to", "test_vit", "--json", "--quiet"]
    )
    assert done.exit_code == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in storage.glob("comparisons/students/*/*.json")}
    assert {p: after[p] for p in before} == before and len(after) == len(before) * 3 // 2
    found = json.loads(done.stdout)
    again = CliRunner().invoke(cli.app, ["resume", found["comparison"], "--json", "--quiet"])
    assert again.exit_code == 0 and json.loads(again.stdout) == found
    assert {p: p.stat().st_mtime_ns for p in storage.glob("comparisons/students/*/*.json")} == after


def test_full_data_is_a_row_of_every_tower_on_request(storage):
    one = next(storage.glob("one-*"))
    found = rmdd.transfer(one, ["test_resnet"], full=True, progress=QUIET)
    full = [r for r in found.rows if r["kind"] == "full"]
    assert [r["tower"] for r in full] == ["convnet", "test_resnet"] and all(
        r["test_last"]["R@mean"]["n"] == 2 for r in full
    )
    for row in found.rows:
        bound = next(r for r in full if r["tower"] == row["tower"])["test_last"]["R@mean"]["mean"]
        if row["kind"] == "set":
            assert row["of_full"] == pytest.approx(100 * row["test_last"]["R@mean"]["mean"] / bound)


def test_a_set_without_captions_goes_to_no_other_text_encoder(storage, bert):
    one = next(storage.glob("one-*"))
    run = config.load(one / "run.yaml", [f"runtime.storage={storage}", "model.text.max_tokens=40"])
    with pytest.raises(config.ConfigError, match="has no captions"):
        begin(str(one / "set" / "tensors.safetensors"), [f"text:{bert}"], run, [])


@pytest.mark.ray
def test_ray_changes_no_number(ray_local, moved, storage, bert):
    found, _ = moved
    on = ["runtime.ray=on", "runtime.workers=2", "model.text.max_tokens=40"]
    again = rmdd.transfer(next(storage.glob("one-*")), ["test_resnet"], overrides=on, progress=QUIET)
    alike = [r for r in found.rows if r["kind"] == "set" and (r["tower"], r["text"]) in
             (("convnet", "hashing"), ("test_resnet", "hashing"))]  # fmt: skip
    assert [r["students"] for r in again.rows] == [r["students"] for r in alike]
