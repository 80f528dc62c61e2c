"""EDGE from shards to an evaluated set, with tiny models: resume after a kill, every captioner, invalid options."""

import json
from dataclasses import replace
from pathlib import Path

import drawn
import numpy as np
import pytest
import tiny_diffusion
import tiny_parts
import torch
from PIL import Image

import rmdd
from rmdd import config, pipeline
from rmdd.distill.sets import load_set
from rmdd.generate.stable_diffusion import FromCaption, Sampling
from rmdd.methods.edge import EDGE
from rmdd.runs.preflight import problems_of
from rmdd.runs.tasks import TrainExpert, TuneGenerator

TUNING = {"steps": 6, "batch": 3, "size": 16, "checkpoint_every": 2}
SAMPLING = {"size": 16, "steps": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {
        "generator": str(tiny_diffusion.stable_diffusion(folder / "sd", licence="openrail")),
        "clip": str(tiny_parts.clip(folder / "clip", licence="mit")),
    }


def options(parts, **changes):
    return {**parts, "tuning": TUNING, "sampling": SAMPLING, **changes}


@pytest.fixture(scope="module")
def unbroken(parts, tmp_path_factory):
    """Fixture: the storage folder and the result of an EDGE run that was not interrupted."""
    storage = tmp_path_factory.mktemp("unbroken")
    return storage, pipeline.run(drawn.run_of(storage, "edge", 7, options(parts, captions_per_image=3)))


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_three_pairs_share_an_image_if_captions_per_image_is_3(unbroken):
    storage, result = unbroken
    folder = drawn.phase_of(storage)
    facts, captions = read(folder, "facts"), read(folder, "captions")
    loaded = load_set(folder / "set-000001.safetensors")
    assert loaded.images.shape == (7, 3, 16, 16) and loaded.texts.shape == (7, 16) and not loaded.similarity
    assert facts["picture_of"] == [0, 0, 0, 1, 1, 1, 2] and facts["pictures"] == 3, (
        "the seventh pair gets its own image"
    )
    assert len(list((folder / "pairs").glob("*.png"))) == 3
    for a, b in ((0, 1), (0, 2), (3, 5)):
        assert torch.equal(loaded.images[a], loaded.images[b]) and captions[a] != captions[b]
    assert not torch.equal(loaded.images[0], loaded.images[3])
    assert facts["caption_from"] == ["drawn", "real", "real"] * 2 + ["drawn"]
    assert result.evaluation["table"]["edge"]["test_last"]["R@mean"]["n"] == 1
    assert [(p["role"], p["licence"]) for p in read(folder, "parts")] == [("generator", "openrail"), ("clip", "mit")]
    assert len(rmdd.load(result.set).as_dataset()) == 7


def test_a_run_killed_in_tuning_and_in_generation_gives_the_same_bits(parts, unbroken, tmp_path):
    raw = drawn.raw_run(tmp_path / "runs", "edge", 7, options(parts, captions_per_image=3))
    drawn.kill_when(drawn.begin(tmp_path, raw), tmp_path, "runs/tuned/*/state.safetensors")
    assert not list(tmp_path.glob("runs/tuned/*/tuned.safetensors"))
    drawn.kill_when(drawn.begin(tmp_path, raw), tmp_path, "runs/phases/*/*/pairs/000000.json")
    first = next(tmp_path.glob("runs/phases/*/*/pairs/000000.png"))
    written = first.stat().st_mtime_ns
    pipeline.run(config.load(raw))
    assert first.stat().st_mtime_ns == written, "a finished image must not be generated again"
    assert drawn.results(tmp_path / "runs") == drawn.results(unbroken[0])


def test_budgets_share_the_tuning_and_phases_share_the_draw(parts, unbroken, tmp_path):
    """Two phases together must give the pairs of one large phase. Both runs must share one fine-tuned generator."""
    storage, _ = unbroken
    again = options(parts, captions_per_image=3)
    plan = [{"pairs": 3, "iterations": 1}, {"pairs": 4, "iterations": 1}]
    before = {p: p.stat().st_mtime_ns for p in storage.glob("tuned/*/*.safetensors")}
    run = config.load({**drawn.raw_run(storage, "edge", 7, again, phases=plan), "name": "other"})
    with pipeline.open_pipeline(run) as opened:
        folders = opened.distill()
    assert {p: p.stat().st_mtime_ns for p in storage.glob("tuned/*/*.safetensors")} == before
    single_phase = next(f for f in storage.glob("phases/*") if not (f / "phase-1").exists()) / "phase-0"
    assert [c for f in folders for c in read(f, "captions")] == read(single_phase, "captions")
    loaded = [load_set(f / "set-000001.safetensors").images for f in folders]
    assert torch.equal(torch.cat(loaded), load_set(single_phase / "set-000001.safetensors").images)


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_captioners_add_captions(parts, kind, tmp_path):
    captioner = {
        "kind": kind,
        "id": str(getattr(tiny_diffusion, kind)(tmp_path / kind)),
        "tokens": 6,
        "prompt": "a dog",
    }
    changed = options(parts, captions_per_image=2, captioner=captioner, tuning={"steps": 0})
    with pipeline.open_pipeline(drawn.run_of(tmp_path / "runs", "edge", 4, changed)) as opened:
        (folder,) = opened.distill()
    facts, captions = read(folder, "facts"), read(folder, "captions")
    assert facts["caption_from"][::2] == ["drawn"] * 2 and set(facts["caption_from"][1::2]) <= {"captioner", "real"}
    assert len(captions) == 4 and all(captions) and captions[0] != captions[1] and captions[2] != captions[3]
    assert [p["role"] for p in read(folder, "parts")] == ["generator", "captioner"], "without tuning, no CLIP is needed"
    assert not list((tmp_path / "runs").glob("tuned/*"))


def test_an_image_of_one_colour_is_generated_again_with_the_next_seed(parts, monkeypatch, caplog):
    painter = FromCaption(Path(parts["generator"]), torch.device("cpu"), Sampling(**SAMPLING, redraws=2))
    requests = [{"index": i, "number": i, "seed": 0, "caption": "a dog"} for i in range(2)]
    usual = painter.decode(requests)
    images, calls = painter._images, []

    def blacked_out(requests, randoms):
        """Generate images, but return a black one for the first two attempts at the first image."""
        calls.append([r["index"] for r in requests])
        pixels = images(requests, randoms).copy()
        pixels[0] *= len(calls) > 2
        return pixels

    monkeypatch.setattr(painter, "_images", blacked_out)
    again = painter.decode(requests)
    assert calls == [[0, 1], [0], [0]] and "pair 0 has one colour; generating it again, try 2" in caplog.text
    assert again[0].info["redrawn"] == 2 and again[1].tobytes() == usual[1].tobytes()
    assert again[0].tobytes() != usual[0].tobytes()


def test_images_do_not_depend_on_the_rest_of_the_batch(parts):
    painter = FromCaption(Path(parts["generator"]), torch.device("cpu"), Sampling(**SAMPLING))
    prompts = ["a dog", "two cats", "a hat"]
    requests = [{"index": 0, "number": i, "seed": 3, "caption": c} for i, c in enumerate(prompts)]
    together = painter.decode(requests)
    alone = [painter.decode([request])[0] for request in requests]
    for batched, single in zip(together, alone, strict=True):
        difference = np.abs(np.asarray(batched, int) - np.asarray(single, int))
        assert difference.max() <= 2, "a different batch size may change rounding errors only"
    again = FromCaption(Path(parts["generator"]), torch.device("cpu"), Sampling(**SAMPLING))
    assert [i.tobytes() for i in again.decode(requests)] == [i.tobytes() for i in together]
    assert [again.decode([r])[0].tobytes() for r in requests[::-1]] == [i.tobytes() for i in alone[::-1]]
    assert isinstance(together[0], Image.Image) and together[0].size == (16, 16)
    assert together[0].tobytes() != painter.decode([{**requests[0], "seed": 4}])[0].tobytes()


def test_mistakes_are_reported_before_any_work(parts, tmp_path):
    with pytest.raises(config.ConfigError, match="captions_per_image to 1, or choose a captioner"):
        drawn.run_of(tmp_path, "edge", 6, options(parts, captioner={"kind": "none"}))
    with pytest.raises(config.ConfigError, match=r"tuning.batch: .*found 1"):
        drawn.run_of(tmp_path, "edge", 6, options(parts, tuning={"batch": 1}))
    with pytest.raises(config.ConfigError, match=r"micro_batch 9 is larger than tuning.batch 4; lower it"):
        drawn.run_of(tmp_path, "edge", 6, options(parts, tuning={"batch": 4, "micro_batch": 9}))
    run = drawn.run_of(tmp_path, "edge", 6, options({**parts, "generator": str(tmp_path / "none")}))
    with pytest.raises(
        ValueError, match=r"generator: folder .*none: the folder does not exist; give .*options.generator: F"
    ):
        pipeline.run(run)
    assert not list(tmp_path.glob("experts/*"))
    with pytest.raises(ValueError, match="72 images need different captions.*has 60"):
        pipeline.run(drawn.run_of(tmp_path, "edge", 72, options(parts, captions_per_image=1, tuning={"steps": 0})))


def test_runs_with_different_tunings_share_the_expert(parts, tmp_path):
    run = drawn.run_of(tmp_path, "edge", 4, options(parts))
    other = drawn.run_of(tmp_path, "edge", 4, options(parts, tuning={**TUNING, "lr": 0.5}))
    with pipeline.open_pipeline(run) as opened:
        item = opened.item()
    items = [item, replace(item, run=other)]
    targets = [task.target(each) for task in (TuneGenerator(), TrainExpert()) for each in items]
    assert len(set(targets)) == 3 and targets[2] == targets[3], "both runs need the same expert"
    size = drawn.run_of(tmp_path, "edge", 4, options(parts, tuning={**TUNING, "size": 17}))
    assert any("tuning.size: this model's encoder cannot halve images of side 17" in line for line in problems_of(size))


def test_rows_per_picture():
    run = config.load({"distill": {"method": "edge"}})
    assert EDGE(run).rows(7) == [2, 2, 2, 1] and sum(EDGE(run).rows(500)) == 500 and len(EDGE(run).rows(500)) == 250
