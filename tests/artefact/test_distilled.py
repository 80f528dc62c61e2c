import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import rmdd
from rmdd.artefact import card
from rmdd.artefact.distilled import DistilledSet, Subset
from rmdd.config.budget import cost
from rmdd.core.files import sha256_file
from rmdd.models.losses import LOSSES

KINDS = ("full", "low_rank", "identity")


def make_subset(pairs, seed, kind="full", size=16, width=12, rank=2):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    similarity = {
        "full": {"matrix": torch.eye(pairs) + 0.1 * randn(pairs, pairs)},
        "low_rank": {"scale": torch.ones(pairs), "left": randn(pairs, rank), "right": 0.1 * randn(pairs, rank)},
        "identity": {},
    }[kind]
    return Subset(
        images=randn(pairs, 3, size, size),
        texts=randn(pairs, width),
        similarity=similarity,
        alpha=0.3,
        lr_image=0.1 + seed / 7,
        lr_text=1 / 3,
        captions=[f"a captión {seed} {i}" for i in range(pairs)],
        source_ids=[f"img{i}.jpg" for i in range(pairs)],
        captions_before=[f"before {i}" for i in range(pairs)] if kind == "full" else (),
    )


def make_set(kind="full", loss="wbce", pairs=(6, 5), **change):
    return DistilledSet(
        subsets=tuple(make_subset(m, seed, kind) for seed, m in enumerate(pairs)),
        mean=(0.48, 0.45, 0.4),
        std=(0.26, 0.25, 0.27),
        model={"image": {"name": "convnet", "weights": "random"}, "text": {"name": "hashing"}, "temperature": 0.07},
        method="ptm_st",
        loss=loss,
        config={"name": "small", "data": {"source": "scenes", "layout": None}, "seed": 3},
        provenance={"data": "abc", "seed": 3},
        metrics={"test_last": {"R@mean": 31.25, "curve": [1.0, 2.0]}},
        **change,
    )


@pytest.fixture
def saved(tmp_path):
    return card.export(make_set(), tmp_path / "set")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(tmp_path, kind):
    before = make_set(kind)
    after = rmdd.load(before.save(tmp_path / "set"))
    for old, new in zip(before.subsets, after.subsets, strict=True):
        assert old.tensors().keys() == new.tensors().keys()
        for name, t in old.tensors().items():
            assert t.dtype == new.tensors()[name].dtype and torch.equal(t, new.tensors()[name])
        assert torch.equal(old.matrix, new.matrix)
        for name in ("alpha", "lr_image", "lr_text", "kind", "rank"):
            assert getattr(old, name) == getattr(new, name)
        for name in ("captions", "source_ids", "captions_before"):
            assert list(getattr(old, name)) == list(getattr(new, name))
    for name in ("mean", "std", "model", "method", "loss", "config", "provenance", "metrics"):
        assert getattr(before, name) == getattr(after, name)


def test_the_order_of_training_is_saved(tmp_path):
    folder = make_set(pairs=(6, 5, 3), order="cumulative", between="masked").save(tmp_path / "set")
    info, after = json.loads((folder / "set.json").read_text()), rmdd.load(folder)
    assert info["training"] == {"order": "cumulative", "between": "masked"}
    assert info["stages"] == [[0], [0, 1], [0, 1, 2]]
    assert (after.order, after.between, after.stages) == ("cumulative", "masked", ((0,), (0, 1), (0, 1, 2)))
    edit(folder, lambda info: (info.pop("training"), info.pop("stages")))
    old = rmdd.load(folder)
    assert (old.order, old.between, old.stages) == ("sequence", "zeros", ((0,), (1,), (2,)))
    edit(folder, lambda info: info.update(training={"order": "backwards"}))
    with pytest.raises(ValueError, match="order must be one of sequence, cumulative, union; found 'backwards'"):
        rmdd.load(folder)
    with pytest.raises(ValueError, match="between must be one of zeros, masked; found 'ones'"):
        make_set(between="ones")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_has_the_pairs_and_the_similarity_of_its_subsets(kind):
    distilled = make_set(kind, pairs=(3, 2, 4), order="cumulative")
    for number, stage in enumerate(distilled.stages):
        pairs, similarity = distilled.as_dataset(number), distilled.similarity_of(number)
        assert len(pairs) == len(similarity) == (3, 5, 9)[number]
        assert sorted({pair["subset"] for pair in pairs}) == list(stage)
        for row, pair in enumerate(pairs):
            k, i = pair["subset"], pair["index"]
            assert torch.equal(pair["text"], distilled.subsets[k].texts[i])
            for column, other in enumerate(pairs):
                matrix = distilled.subsets[k].matrix
                expected = matrix[i, other["index"]] if other["subset"] == k else torch.tensor(0.0)
                assert torch.equal(similarity[row, column], expected)
    with pytest.raises(ValueError, match="stage must be from 0 to 2; found 3"):
        distilled.as_dataset(3)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    one, two = make_set().save(tmp_path / "one"), make_set().save(tmp_path / "two")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_matrix_of_each_kind():
    low = make_subset(4, 0, "low_rank")
    expected = torch.diag(low.similarity["scale"]) + 0.3 / 2 * low.similarity["left"] @ low.similarity["right"].T
    torch.testing.assert_close(low.matrix, expected)
    assert torch.equal(make_subset(4, 0, "identity").matrix, torch.eye(4))


def test_folder(saved):
    names = {"tensors.safetensors", "set.json", "captions.parquet", "preview.png", "README.md"}
    assert {f.name for f in saved.iterdir()} == names
    assert [f.name for f in saved.parent.iterdir()] == ["set"]
    with Image.open(saved / "preview.png") as preview:
        assert preview.size == (4 * 66 + 2, 3 * 66 + 2)
    assert len({f.stat().st_mode for f in saved.iterdir()}) == 1
    info = json.loads((saved / "set.json").read_text())
    assert info["schema_version"] == 2 and info["num_pairs"] == 11
    assert [s["pairs"] for s in info["subsets"]] == [6, 5]
    text = (saved / "README.md").read_text()
    assert (
        "| test_last.R@mean | 31.25 |" in text
        and "rmdd train FOLDER" in text
        and "licence" in text
        and "{" not in text.split("```")[0]
    )


def test_the_card_has_one_row_of_scores_per_training_set():
    def scores(mean, std, count):
        recalls = {recall: {"mean": mean, "std": std, "n": count} for recall in card.RECALLS}
        return {"val": {"R@mean": {"mean": mean + 1, "std": std, "n": count}}, "test_last": recalls}

    metrics = {"random": scores(15.33, 1.63, 5), "ptm_st": scores(23.57, 3.05, 5), "full": scores(92.44, math.nan, 1)}
    metrics["ptm_st"]["test_best_reference"] = {"R@mean": {"mean": 24.5, "std": 1.0, "n": 5}}
    provenance = {"data": {"counts": {"train": {"pairs": 1000}}}}
    text = card.text(replace(make_set(), metrics=metrics, provenance=provenance))
    limited = replace(make_set(), metrics=metrics, provenance=provenance, config={"data": {"train_limit": 200}})
    assert "| all 200 training pairs |" in card.text(limited)
    assert f"| random real pairs, same budget |{' 15.3 ± 1.6 |' * 7} 16.3 ± 1.6 | 5 |" in text
    assert f"| this set (`ptm_st`) |{' 23.6 ± 3.0 |' * 7} 24.6 ± 3.0 | 5 |" in text
    assert f"| all 1,000 training pairs |{' 92.4 |' * 7} 93.4 | 1 |" in text, "a single student has no spread"
    assert f"| this set, scored as in the paper of the method |{'  |' * 6} 24.5 ± 1.0 |  | 5 |" in text
    assert "test_last" not in text and ".val." not in text and "other score" not in text


def test_the_card_has_a_table_per_probe():
    def scores(mean):
        return {"val": {"R@mean": score(mean)}, "test_last": {r: score(mean) for r in card.RECALLS}}

    def score(mean):
        return {"mean": mean, "std": 1.0, "n": 3}

    probes = {"digits": {"accuracy": score(41.0), "top 5": score(82.0)}}
    metrics = {"random": scores(10.0) | {"probes": {"digits": {"accuracy": score(20.0), "top 5": score(60.0)}}}}
    text = card.text(replace(make_set(), metrics=metrics | {"ptm_st": scores(20.0) | {"probes": probes}}))
    assert "Probe `digits`:\n\n| trained on | accuracy | top 5 | students |" in text
    assert "| random real pairs, same budget | 20.0 ± 1.0 | 60.0 ± 1.0 | 3 |" in text
    assert "| this set (`ptm_st`) | 41.0 ± 1.0 | 82.0 ± 1.0 | 3 |" in text and "other score" not in text


def test_the_front_matter_describes_the_set_to_hubs():
    facts = yaml.safe_load(card.text(make_set()).split("---")[1])
    assert facts["license"] == "other" and facts["license_name"] and facts["license_link"] == "README.md"
    assert facts["pretty_name"] == "small: 11 distilled image-text pairs" and facts["size_categories"] == ["n<1K"]
    assert facts["configs"] == [{"config_name": "default", "data_files": "captions.parquet"}]


def test_hugging_face_datasets_shows_pictures_and_captions(saved, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(saved), cache_dir=str(tmp_path / "cache"))["train"]
    distilled = rmdd.load(saved)
    pixels = distilled.subsets[0].images[0] * torch.tensor(distilled.std)[:, None, None]
    pixels = (pixels + torch.tensor(distilled.mean)[:, None, None]).clamp(0, 1) * 255
    assert len(rows) == 11 and rows[0]["caption"] == "a captión 0 0"
    shown = torch.tensor(np.array(rows[0]["image"]), dtype=torch.float32).permute(2, 0, 1)
    torch.testing.assert_close(shown, pixels, rtol=0, atol=0.51)


@pytest.mark.parametrize(("method", "word"), [("lors", "learned"), ("pds", "fixed"), ("of_another_package", "learned")])
def test_the_card_says_whether_rates_were_learned(method, word):
    text = " ".join(card.text(replace(make_set(), method=method)).split())
    assert f"| {word} SGD learning rates" in text
    assert ("Its learning rates were learned for this tower" in text) == (word == "learned")
    assert ("Its method does not learn learning rates" in text) == (word == "fixed")


def test_preview_of_many_pairs(tmp_path):
    folder = card.export(make_set(pairs=(70, 30)), tmp_path / "set")
    with Image.open(folder / "preview.png") as preview:
        assert preview.size == (8 * 66 + 2, 8 * 66 + 2)


@pytest.mark.parametrize("kind", KINDS)
def test_budget_agrees_with_the_plan(kind):
    result = make_set(kind).budget()
    assert result["unit"] == 3 * 16 * 16 + 12
    assert result["in_pairs"] * result["unit"] == pytest.approx(cost((6, 5), 16, 12, kind, 2), rel=1e-12)
    parts = [result[part] for part in ("images", "texts", "similarity", "rates")]
    for measure, total in result["total"].items():
        assert total == sum(part[measure] for part in parts)
    assert result["images"] == {"parameters": 11 * 768, "bytes": 11 * 768 * 4}
    assert result["rates"] == {"parameters": 4, "bytes": 32}


@pytest.mark.parametrize(("kind", "loss"), [*((k, "wbce") for k in KINDS), ("low_rank", "infonce")])
def test_card_script_trains_without_rmdd(tmp_path, kind, loss):
    folder = card.export(make_set(kind, loss), tmp_path / "set")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 17 and "rmdd" not in code
    alone = "import sys\nsys.modules['rmdd'] = None\n" + code
    done = subprocess.run([sys.executable, "-I", "-c", alone], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for k in range(2):
        losses = [float(x) for x in re.findall(rf"stage {k} step \d+ loss (\S+)", done.stdout)]
        assert len(losses) == 30 and losses[-1] < losses[0]


@pytest.mark.parametrize("between", ["zeros", "masked"])
@pytest.mark.parametrize("order", ["sequence", "cumulative", "union"])
@pytest.mark.parametrize(("kind", "loss"), [("full", "mse"), ("low_rank", "wbce"), ("identity", "infonce")])
def test_the_card_script_follows_the_stages(tmp_path, monkeypatch, capsys, kind, loss, order, between):
    distilled = make_set(kind, loss, order=order, between=between)
    monkeypatch.chdir(card.export(distilled, tmp_path / "set"))
    after = {}
    exec(card.script(distilled), after)
    steps = [int(k) for k in re.findall(r"stage (\d+) step", capsys.readouterr().out)]
    assert steps == [k for k in range(len(distilled.stages)) for _ in range(30)]
    last = [distilled.subsets[k] for k in distilled.stages[-1]]
    assert torch.equal(after["x"], torch.cat([s.images for s in last]))
    assert torch.equal(after["y"], torch.cat([s.texts for s in last]))
    if order == "sequence" or between == "zeros":
        torch.testing.assert_close(after["s"], distilled.similarity_of(len(distilled.stages) - 1))
        expected = LOSSES[loss](after["z"], after["s"])
    else:
        sizes = [s.pairs for s in last]
        blocks = [rows.split(sizes, dim=1)[k] for k, rows in enumerate(after["scores"].split(sizes))]
        total = sum(s.pairs * LOSSES[loss](z, s.matrix) for z, s in zip(blocks, last, strict=True))
        expected = total / sum(sizes)
    torch.testing.assert_close(after["loss"], expected, rtol=1e-4, atol=1e-5)
    scores = F.normalize(after["image"](after["x"])) @ F.normalize(after["text"](after["y"])).T
    found = sum(int(scores[i].argsort(descending=True).tolist().index(i) < 3) for i in range(len(scores)))
    assert after["recall"](after["x"], after["y"], 3) == pytest.approx(found / len(scores))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("sequence", "Train on one subset after the other."),
        ("cumulative", "Train on the first subset, then on the first two at once, and so on; the similarity of images"),
        ("union", "Train on all subsets at once; the similarity of images and texts of different subsets is 0."),
    ],
)
def test_the_card_says_the_order(order, words):
    assert words in card.text(make_set(order=order))
    masked = card.text(make_set(order=order, between="masked"))
    assert ("images and texts of different subsets are not compared." in masked) == (order != "sequence")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["wbce", "infonce"])
def test_card_script_lines_are_short(kind, loss):
    code = card.script(make_set(kind, loss)).splitlines()
    assert len(code) <= 17 and max(map(len, code)) <= 125


def test_as_dataset_feeds_a_loader(saved):
    loaded = rmdd.load(saved)
    pairs = loaded.as_dataset()
    assert len(pairs) == loaded.num_pairs == 11
    batches = list(DataLoader(pairs, batch_size=4))
    assert [len(b["image"]) for b in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.cat([s.images for s in loaded.subsets]))
    assert torch.equal(torch.cat([b["text"] for b in batches]), torch.cat([s.texts for s in loaded.subsets]))
    assert torch.cat([b["subset"] for b in batches]).tolist() == [0] * 6 + [1] * 5
    assert torch.cat([b["index"] for b in batches]).tolist() == [*range(6), *range(5)]


def test_loading_runs_no_pickle(saved, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled something")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert rmdd.load(saved).num_pairs == 11


@pytest.mark.parametrize("file", ["tensors.safetensors", "captions.parquet"])
def test_altered_bytes_are_found(saved, file):
    data = bytearray((saved / file).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} was altered"):
        rmdd.load(saved)
    (saved / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        rmdd.load(saved)


def edit(folder, change):
    info = json.loads((folder / "set.json").read_text())
    change(info)
    (folder / "set.json").write_text(json.dumps(info))


def test_a_set_of_schema_version_1_is_read(saved):
    """A set of schema version 1 has the same tensor names as version 2, but its tensor file has no metadata."""
    new, file = rmdd.load(saved), saved / "tensors.safetensors"
    save_file(load_file(file), file)
    fields = {"distill": {"method": "repblend", "blend": 0.5, "anchors": 2}, "experts": {"gang": {"workers": 2}}}
    edit(
        saved,
        lambda info: info.update(
            schema_version=1, config=fields, sha256=info["sha256"] | {file.name: sha256_file(file)}
        ),
    )
    old = rmdd.load(saved)
    assert old.num_pairs == new.num_pairs
    distill = {"method": "repblend", "options": {"blend": 0.5}}
    assert old.config == {"distill": distill, "experts": {"worker_group": {"workers": 2}}}, (
        "old run-file fields are converted to the present ones"
    )
    for mine, its in zip(old.subsets, new.subsets, strict=True):
        assert mine.tensors().keys() == its.tensors().keys() and mine.alpha == its.alpha
        assert all(torch.equal(t, its.tensors()[name]) for name, t in mine.tensors().items())


def test_other_descriptions_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="no distilled set at"):
        rmdd.load(tmp_path / "nowhere")
    edit(saved, lambda info: info["tensors"]["0.images"].update(shape=[9, 3, 16, 16]))
    with pytest.raises(ValueError, match=r"0.images as .*\[6, 3, 16, 16\].*says .*\[9, 3, 16, 16\]"):
        rmdd.load(saved)
    edit(saved, lambda info: (info["tensors"]["0.images"].update(shape=[6, 3, 16, 16]), info.pop("subsets")))
    with pytest.raises(ValueError, match="set.json has missing or wrong fields"):
        rmdd.load(saved)
    edit(saved, lambda info: info.update(schema_version=3))
    with pytest.raises(ValueError, match="schema version 3 and this rmdd reads 1 to 2"):
        rmdd.load(saved)
    (saved / "set.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        rmdd.load(saved)


def test_a_set_is_replaced_only_when_asked(saved):
    other = make_set("identity")
    with pytest.raises(ValueError, match="pass overwrite=True"):
        other.save(saved)
    assert rmdd.load(saved).subsets[0].kind == "full"
    other.save(saved, overwrite=True)
    assert rmdd.load(saved).subsets[0].kind == "identity"
    assert [f.name for f in saved.parent.iterdir()] == ["set"]


def test_another_folder_is_never_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a distilled set"):
        make_set().save(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_old_set(saved):
    with pytest.raises(TypeError):
        replace(make_set("identity"), metrics={"bad": object()}).save(saved, overwrite=True)
    assert rmdd.load(saved).subsets[0].kind == "full"
    assert [f.name for f in saved.parent.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"texts": torch.zeros(4, 12)}, "5 images need texts"),
        ({"images": torch.zeros(5, 1, 16, 16)}, r"images must be \(M, 3, H, W\)"),
        ({"similarity": {"matrix": torch.zeros(5, 4)}}, "similarity of 5 pairs must be"),
        ({"similarity": {"left": torch.zeros(5, 2)}}, "similarity of 5 pairs must be"),
        ({"captions": ["one"]}, "need 5 captions, found 1"),
        ({"texts": torch.zeros(5, 12).double()}, "texts must be float32"),
        ({"texts": torch.full((5, 12), torch.nan)}, "texts holds 60 numbers that are not finite"),
        ({"lr_image": float("inf")}, "lr_image holds 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(make_subset(5, 0), **change)


def test_subsets_must_match():
    with pytest.raises(ValueError, match="must share image shape"):
        replace(make_set(), subsets=(make_subset(5, 0), make_subset(5, 0, "identity")))
