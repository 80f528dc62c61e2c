"""EVLF from shards to an evaluated set, with tiny models: resume after a kill, every sampler, invalid options."""

import json

import drawn
import numpy as np
import pytest
import tiny_diffusion
import torch

from rmdd import config, pipeline
from rmdd.core.tensors import load_checked
from rmdd.distill.sets import load_set

FUSION = {"steps": 6, "batch": 3, "width": 16, "reader_width": 8, "checkpoint_every": 2}
SAMPLING = {"size": 16, "steps": 3}


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return str(tiny_diffusion.stable_diffusion(tmp_path_factory.mktemp("parts") / "sd", licence="openrail"))


def options(painter, **changes):
    return {"generator": painter, "fusion": FUSION, "components": 8, "sampling": SAMPLING, **changes}


@pytest.fixture(scope="module")
def unbroken(painter, tmp_path_factory):
    storage = tmp_path_factory.mktemp("unbroken")
    return storage, pipeline.run(drawn.run_of(storage, "evlf", 5, options(painter)))


def distilled(storage, painter, name, **changes):
    """Distil a run with changed options in `storage`; return its phase folder and whether it trained a new fusion."""
    before = set(storage.glob("tuned/*/tuned.safetensors"))
    run = config.load({**drawn.raw_run(storage, "evlf", 5, options(painter, **changes)), "name": name})
    with pipeline.open_pipeline(run) as opened:
        (folder,) = opened.distill()
    return folder, set(storage.glob("tuned/*/tuned.safetensors")) != before


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_an_evaluated_set_of_real_captions(unbroken):
    storage, result = unbroken
    folder = drawn.phase_of(storage)
    loaded = load_set(folder / "set-000001.safetensors")
    assert loaded.images.shape == (5, 3, 16, 16) and not loaded.similarity
    with pipeline.open_pipeline(config.load(folder.parents[2].glob("tiny-*/run.yaml").__next__())) as opened:
        train = opened.prepared_split("train").split
    assert read(folder, "captions") == [train.captions[r] for r in read(folder, "records")]
    assert sum(read(folder, "facts")["members"]) == len(train.captions) and len(set(read(folder, "records"))) == 5
    assert result.evaluation["table"]["evlf"]["test_last"]["R@mean"]["n"] == 1
    assert [(p["role"], p["licence"]) for p in read(folder, "parts")] == [("generator", "openrail")]


def test_a_run_killed_in_training_and_in_generation_gives_the_same_bits(painter, unbroken, tmp_path):
    raw = drawn.raw_run(tmp_path / "runs", "evlf", 5, options(painter))
    drawn.kill_when(drawn.begin(tmp_path, raw), tmp_path, "runs/tuned/*/state.safetensors")
    assert not list(tmp_path.glob("runs/tuned/*/tuned.safetensors"))
    drawn.kill_when(drawn.begin(tmp_path, raw), tmp_path, "runs/phases/*/*/pairs/000000.json")
    pipeline.run(config.load(raw))
    assert drawn.results(tmp_path / "runs") == drawn.results(unbroken[0])


def test_an_untrained_fusion_clusters_the_latents_as_they_are(painter, tmp_path):
    """The fusion starts as the identity, so without training fused latents equal the scaled VAE latents."""
    folder, trained = distilled(
        tmp_path, painter, "tiny", fusion={**FUSION, "steps": 0}, components=None, mode="nearest"
    )
    assert not trained
    modes, _ = load_checked(folder / "requests.safetensors", "requests")
    diffusion = tiny_diffusion.stable_diffusion()
    with pipeline.open_pipeline(config.load(next(tmp_path.glob("tiny-*/run.yaml")))) as opened:
        images = torch.from_numpy(np.array(opened.prepared_split("train").split.images))
    with torch.no_grad():
        latents = diffusion.vae.encode(images / 127.5 - 1).latent_dist.mean * 0.18215
    for mode in modes["mode"]:
        assert float((latents - mode).flatten(1).norm(dim=1).min()) < 1e-2 * float(mode.norm())


def test_every_sampler_gives_different_images(painter, unbroken):
    storage, _ = unbroken
    guided = {"sampler": "mode_guidance", "pull_until": 0}
    images = {}
    for name, changes in {
        "plain": {**guided, "pull": 0.0},
        "ddpm": {**guided, "pull": 0.5},
        "ddim": {**guided, "pull": 0.5, "scheduler": "ddim"},
        "nearest": {"mode": "nearest"},
    }.items():
        folder, trained = distilled(storage, painter, name, **changes)
        assert not trained, "runs that differ in sampling must share the training"
        images[name] = load_set(folder / "set-000001.safetensors").images
    pairs = [(a, b) for a in images for b in images if a < b]
    assert all(not torch.equal(images[a], images[b]) for a, b in pairs)


def test_invalid_steps_and_sizes_are_reported_before_any_work(painter, tmp_path):
    with pytest.raises(config.ConfigError, match="strength 0.3 uses none of the 3 steps to denoise a mode"):
        drawn.run_of(tmp_path, "evlf", 5, options(painter, strength=0.3))
    with pytest.raises(config.ConfigError, match=r"sampling.size: .*multiple of 8"):
        drawn.run_of(tmp_path, "evlf", 5, options(painter, sampling={"size": 12}))


def test_guidance_that_never_acts_is_a_mistake(painter, tmp_path):
    with pytest.raises(config.ConfigError, match="pull_until 25 leaves none of the 3 steps guided; lower it"):
        drawn.run_of(tmp_path, "evlf", 5, options(painter, sampler="mode_guidance"))
