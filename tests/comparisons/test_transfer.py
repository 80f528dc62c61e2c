"""Tests of `rmdd transfer`: learning rates and texts of different towers, the two tables, and rejected towers."""

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
from rmdd.comparisons.transfer import prepare_transfer, target
from rmdd.core.progress import Progress
from rmdd.models.dual import build
from rmdd.models.text import embed

QUIET = Progress(quiet=True)
IMAGES = ("test_resnet", "test_nfnet", "test_efficientnet", "test_vit")


@pytest.fixture(scope="module")
def transferred(two_runs, bert, tmp_path_factory):
    """Fixture: a transfer to four timm towers, to a different text encoder, and to both at once, with random pairs."""
    import shutil

    storage = shutil.copytree(two_runs, tmp_path_factory.mktemp("transfer") / "runs")
    one = next(storage.glob("one-*/"))
    to = [*IMAGES, f"text:{bert}@mean", f"test_resnet@random+text:{bert}"]
    return rmdd.transfer(one, to, overrides=["model.text.max_tokens=40"], random=True, progress=QUIET), one


def test_the_matrix_has_every_tower_with_both_kinds_of_rates(transferred, bert):
    result, _ = transferred
    towers = [
        ("convnet", "hashing"),
        *((i, "hashing") for i in IMAGES),
        ("convnet", str(bert)),
        ("test_resnet", str(bert)),
    ]
    expected = [(i, t, rates, kind) for i, t in towers for rates, kind in
                (("learned", "set"), ("tuned", "set"), ("tuned", "random"))]  # fmt: skip
    assert [(r["tower"], r["text"], r["rates"], r["kind"]) for r in result.rows] == expected and not result.failed
    assert [r["source"] for r in result.rows] == [True] * 3 + [False] * 18
    tuned = [r for r in result.rows if r["rates"] == "tuned" and r["kind"] == "set"]
    assert all(r["chosen"]["lr"] in (0.03, 0.3) and r["chosen"]["loss"] == "wbce" for r in tuned)
    assert all(r["difference"]["to"].endswith("random pairs") for r in result.rows if r["kind"] == "set")
    assert len({tuple(r["students"]) for r in result.rows}) > 10


def test_the_towers_of_the_set_have_the_scores_of_its_run_and_a_separate_table(transferred):
    result, one = transferred
    table = json.loads((one / "evaluation.json").read_text())["table"]
    assert result.rows[0]["test_last"] == table["ptm_st"]["test_last"], "hashing ignores max_tokens"
    assert result.rows[2]["test_last"] == table["random"]["test_last"]
    for rates in ("learned", "tuned"):
        others = [r for r in result.rows[3:] if (r["kind"], r["rates"]) == ("set", rates)]
        assert result.mean[rates]["towers"] == len(others) == 6
        for metric in ("R@mean", "IR@1", "TR@10"):
            mean = statistics.fmean(r["test_last"][metric]["mean"] for r in others)
            assert result.mean[rates]["test_last"][metric] == pytest.approx(mean)
    text = (result.folder / "table.md").read_text()
    first, second = text.split("## towers of the set")
    assert "| convnet | hashing |" in second and "| convnet | hashing |" not in first and "mean of 6" in first
    stored = json.loads((result.folder / "results.json").read_text())
    assert stored["rows"] == result.rows and stored["transfer_mean"] == result.mean
    assert (result.folder / "table.csv").read_text().count("\n") == 1 + 21


def test_choices_of_rates_never_read_test(transferred):
    result, _ = transferred
    students = result.folder.parents[0] / "students"
    records = {p: json.loads(p.read_text()) for p in students.glob("*/*.json")}
    selected = [r for p, r in records.items() if p.name.startswith("select")]
    assert len(selected) == 7 * 2 and all("test" not in str(r) for r in selected)


def test_texts_for_another_encoder_are_the_nearest_real_captions(transferred, bert, tmp_path):
    result, one = transferred
    distilled = DistilledSet.load(one / "set")
    run = config.load(one / "run.yaml")
    real = [json.loads(json.dumps(c)) for c in _train_captions(one)]
    space = embed(real, run.model.text, tmp_path)
    captions = [c for s in distilled.subsets for c in s.captions]
    texts = torch.cat([s.texts for s in distilled.subsets])
    cosine = torch.nn.functional.normalize(texts) @ torch.nn.functional.normalize(torch.tensor(space)).T
    for row, caption in enumerate(captions):
        best = {real[i] for i in torch.nonzero(cosine[row] > cosine[row].max() - 1e-6).flatten().tolist()}
        assert caption in best, "the caption must be the nearest by cosine in the embedding space of the set's encoder"
    tower = run.model.text.model_copy(update={"name": str(bert), "pooling": "mean", "max_tokens": 40})
    expected = embed(captions, tower, tmp_path)
    files = [load_file(p) for p in (one.parent / "comparisons" / "pairs").glob("*.safetensors")]
    ours = [torch.cat([f["0.texts"], f["1.texts"]]).numpy() for f in files if f["0.texts"].shape[1] == 12]
    assert any(np.array_equal(expected, each) for each in ours)
    twice = len(captions) - len(set(captions))
    rows = [r for r in result.rows if r["kind"] == "set"]
    assert all(r["costs"].get("duplicates") == (twice if r["text"] == str(bert) else None) for r in rows)
    assert any(f"{twice} of 7 pairs have the same caption as an earlier pair" in m for r in rows for m in r["remarks"])


def _train_captions(one):
    from rmdd.data.shards import Dataset
    from rmdd.data.splits import load_split

    (manifest,) = one.parent.glob("data/*/manifest.json")
    data = config.load(one / "run.yaml").data
    return load_split(Dataset.open(manifest.parent), "train", data, one.parent / "cache").captions


@pytest.mark.parametrize("name", IMAGES)
def test_timm_towers_give_pooled_features(two_runs, name):
    import timm

    run = target(config.load(next(two_runs.glob("one-*/")) / "run.yaml"), name)
    model = build(run.model, 16, run.data.image_size, 0, "student")
    width = timm.create_model(name, num_classes=0).num_features
    assert model.image_tower.width == width != 1000


def test_target_parses_the_words_for_towers(two_runs, tmp_path):
    run = config.load(next(two_runs.glob("one-*/")) / "run.yaml")
    assert target(run, "resnet18").model.image.weights == "random:0", "the seed must be that of the set's tower"
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


def test_all_wrong_towers_are_reported_before_training(storage, tmp_path):
    one = next(storage.glob("one-*/"))
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
    for message in (
        "--to resnet81: unknown image tower 'resnet81'",
        "--to test_vit: given twice",
        "--to convnet: the set was made for these towers",
        "--to text:/no/such/folder: no text tower folder",
        "--to resnet18@missing.pt: no weights file",
        "--to text:: write a tower as",
        "--to test_maxvit: image tower 'test_maxvit'",
        "--to inception_v3: image tower 'inception_v3' does not accept images of 16 pixels",
    ):
        assert message in done.stderr, message
    assert "8 mistake(s)" in done.stderr, "the valid tower test_vit must not be listed as a mistake"
    done = CliRunner().invoke(cli.app, ["transfer", str(one), "--quiet"])
    assert done.exit_code == 2 and "no target tower" in done.stderr
    done = CliRunner().invoke(cli.app, ["transfer", "random", "--to", "test_vit", "--quiet"])
    assert done.exit_code == 2 and "random is no distilled set" in done.stderr


def test_a_transfer_can_be_extended_and_resumed(storage):
    one = next(storage.glob("one-*/"))
    rmdd.transfer(one, ["test_resnet"], progress=QUIET)
    before = {p: p.stat().st_mtime_ns for p in storage.glob("comparisons/students/*/*.json")}
    done = CliRunner().invoke(
        cli.app, ["transfer", str(one), "--to", "test_resnet", "--to", "test_vit", "--json", "--quiet"]
    )
    assert done.exit_code == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in storage.glob("comparisons/students/*/*.json")}
    assert {p: after[p] for p in before} == before and len(after) == len(before) * 3 // 2
    result = json.loads(done.stdout)
    again = CliRunner().invoke(cli.app, ["resume", result["comparison"], "--json", "--quiet"])
    assert again.exit_code == 0 and json.loads(again.stdout) == result
    assert {p: p.stat().st_mtime_ns for p in storage.glob("comparisons/students/*/*.json")} == after


def test_full_adds_a_row_of_full_data_for_every_tower(storage):
    one = next(storage.glob("one-*/"))
    result = rmdd.transfer(one, ["test_resnet"], full=True, progress=QUIET)
    full = [r for r in result.rows if r["kind"] == "full"]
    assert [r["tower"] for r in full] == ["convnet", "test_resnet"] and all(
        r["test_last"]["R@mean"]["n"] == 2 for r in full
    )
    for row in result.rows:
        bound = next(r for r in full if r["tower"] == row["tower"])["test_last"]["R@mean"]["mean"]
        if row["kind"] == "set":
            assert row["of_full"] == pytest.approx(100 * row["test_last"]["R@mean"]["mean"] / bound)


def test_a_set_without_captions_cannot_change_the_text_encoder(storage, bert):
    one = next(storage.glob("one-*/"))
    run = config.load(one / "run.yaml", [f"runtime.storage={storage}", "model.text.max_tokens=40"])
    with pytest.raises(config.ConfigError, match="has no captions"):
        prepare_transfer(str(one / "set" / "tensors.safetensors"), [f"text:{bert}"], run, [])


@pytest.mark.ray
def test_ray_changes_no_number(ray_local, transferred, storage, bert):
    result, _ = transferred
    with_ray = ["runtime.ray=on", "runtime.workers=2", "model.text.max_tokens=40"]
    again = rmdd.transfer(next(storage.glob("one-*/")), ["test_resnet"], overrides=with_ray, progress=QUIET)
    expected = [r for r in result.rows if r["kind"] == "set" and (r["tower"], r["text"]) in
             (("convnet", "hashing"), ("test_resnet", "hashing"))]  # fmt: skip
    assert [r["students"] for r in again.rows] == [r["students"] for r in expected]
