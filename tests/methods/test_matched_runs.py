"""NCFM and CovMatch in the distribution-matching loop: resuming, halved learning rates, and complete runs."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from objectives import prepared_split, run_of
from toy import CPU, assert_same_results, lines_of, stop_after

import rmdd
from rmdd import config
from rmdd.core.progress import Progress
from rmdd.distill.distribution.matching import Averaging, distill_phase
from rmdd.distill.loop import State
from rmdd.distill.sets import load_set
from rmdd.distill.synthetic import Synthetic
from rmdd.execution.parts import LocalParts
from rmdd.methods import method_of
from rmdd.models.dual import build
from rmdd.models.text import embed
from rmdd.pipeline import open_pipeline

NCFM = {"frequencies": 32, "clusters": 2, "network": True, "patience": 1}
COVMATCH = {"real_batch": 8, "reset": 4, "average": 0.5}
WHOLE = """
name: toy
data: {image_size: 16, scenes: {train: 24, val: 5, test: 5, size: 16}}
model:
  image: {name: convnet, weights: "random:0", widths: [4], groups: 2, projection: linear}
  text: {name: hashing, width: 16, projection: linear}
  width: 8
experts: {num: 1, epochs: 2, batch: 16, augment: {crop: false, flip: 0, randaugment_ops: 0}}
distill: {budget: 4, optimiser: normalised, lr_image: 0.01, lr_text: 0.01}
evaluate: {epochs: 1, students: 1, reference: false, baseline_lrs: [0.1], baseline_losses: [infonce], baseline_draws: 1}
runtime: {ray: off, track: none, num_cpus: 2}
"""


def distil(run, store, train, folder, **hooks):
    model = build(run.model, train.texts.shape[1], run.data.image_size, run.seed_of("experts"), "expert", 0)
    return distill_phase(method_of(run), 0, store, model, train, folder, CPU, "key", **hooks)


@pytest.fixture(params=["ncfm", "covmatch", "tokens"])
def setting(request, bert, tmp_path):
    """Fixture: a run and its real pairs. Each test runs for NCFM, CovMatch, and CovMatch with token embeddings."""
    rule = {"iterations": 6, "checkpoint_every": 2, "snapshots": 2, "guard": {"every": 3}}
    if request.param == "ncfm":
        return run_of("ncfm", NCFM, **rule), prepared_split()
    if request.param == "covmatch":
        return run_of("covmatch", COVMATCH | {"draws": 2}, lr_image=0.01, lr_text=0.01, **rule), prepared_split()
    text, options = {"name": bert, "pooling": "mean", "max_tokens": 12}, COVMATCH | {"texts": "tokens"}
    run, train = run_of("covmatch", options, text=text, lr_image=0.01, lr_text=0.01, **rule), prepared_split()
    return run, dataclasses.replace(train, texts=np.array(embed(train.split.captions, run.model.text, tmp_path)))


def test_a_resumed_phase_gives_the_same_bits(setting, store, tmp_path):
    run, train = setting
    assert distil(run, store, train, tmp_path / "whole")
    for stop in (1, 3, 1):
        assert not distil(run, store, train, tmp_path / "parts", **stop_after(stop))
    assert distil(run, store, train, tmp_path / "parts")
    assert_same_results(tmp_path / "whole", tmp_path / "parts")
    first, last = (load_set(tmp_path / "whole" / f) for f in ("start.safetensors", "set-000006.safetensors"))
    assert first.texts.shape == last.texts.shape == (6, train.texts.shape[1]), (
        "saved texts must be embeddings that students can read"
    )
    assert not torch.equal(first.images, last.images) and not torch.equal(first.texts, last.texts)
    losses = {name for line in lines_of(tmp_path / "whole") for name in line if name.startswith("loss")}
    parts = {"loss_ncfd", "loss_calibration"} if run.distill.method == "ncfm" else {"loss_covariance", "loss_mean"}
    assert losses == {"loss", *parts}


def test_pace_scales_the_learning_rates(store, tmp_path):
    """The number `pace`, which the objective returns, must scale the learning rates of images and texts."""
    run = run_of("ncfm", NCFM, momentum=0)
    random = torch.Generator().manual_seed(0)
    begun = Synthetic(
        torch.randn(6, 3, 8, 8, generator=random),
        torch.randn(6, 5, generator=random),
        torch.tensor(0.1),
        torch.tensor(0.1),
    )
    gradient = begun.map(torch.ones_like)
    rank = SimpleNamespace(
        gradient=lambda synthetic, iteration: [(gradient, {"loss": 1.0, "pace": 0.25})],
        tensors=dict,
    )
    after = Averaging(method_of(run), LocalParts([rank]), CPU).step(State.begin(begun)).after.raw
    torch.testing.assert_close(after.images, begun.images - 0.25 * 0.1)
    torch.testing.assert_close(after.texts, begun.texts - 0.25 * 0.1)
    assert distil(run_of("ncfm", NCFM | {"lr_network": 0.0}), store, prepared_split(), tmp_path)
    paces = [line["pace"] for line in lines_of(tmp_path)]
    assert paces[0] == 1 and paces == sorted(paces, reverse=True) and paces[-1] < 1


@pytest.mark.parametrize("kind", ["ncfm", "covmatch", "tokens"])
def test_a_whole_run_gives_an_evaluated_set(kind, bert, tmp_path):
    method, options = {
        "ncfm": ("ncfm", {"clusters": 2, "frequencies": 32, "network": True, "real_batch": 8}),
        "covmatch": ("covmatch", {"real_batch": 16}),
        "tokens": ("covmatch", {"real_batch": 16, "texts": "tokens"}),
    }[kind]
    (tmp_path / "toy.yaml").write_text(WHOLE)
    sets = [f"runtime.storage={tmp_path / 'runs'}", f"distill.method={method}", f"distill.options={options}"]
    sets.append("distill.phases=[{pairs: 4, iterations: 3}]")
    if kind == "tokens":
        sets += [f"model.text.name={bert}", "model.text.max_tokens=12"]
    run = config.load(tmp_path / "toy.yaml", sets)
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        result = pipeline.all()
    assert set(result.evaluation["table"]) == {"random", method, "full"}
    loaded = rmdd.load(result.set)
    assert loaded.method == method and loaded.subsets[0].texts.shape == (4, 8 if kind == "tokens" else 16)
