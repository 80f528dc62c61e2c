"""Tests of the estimates of `rmdd check`: parameters, FLOPs, memory, disk, and numbers of images and captions."""

import pytest
import torch

from rmdd import config
from rmdd.models.dual import build
from rmdd.runs import cost as estimate
from rmdd.runs.cost import Size, store_bytes

SMALL = {
    "data": {"image_size": 16},
    "model": {
        "image": {"name": "convnet", "weights": "random", "widths": [8, 16], "projection": "linear"},
        "text": {"name": "hashing", "width": 32, "projection": "linear"},
        "width": 24,
    },
    "distill": {"batch": 4, "phases": [{"pairs": 10}]},
}
NFNET = Size(image=32_769_488, text=7_087_104, frozen=0, shared=32_769_488)
MIB, GIB = 2**20, 2**30


def test_nfnet_and_bert_have_the_published_sizes():
    run = config.load("flickr30k_ptm_st_100", ["data.root=absent"])
    width, remark = estimate.text_features(run.model.text)
    assert (width, remark) == (768, None)
    assert estimate.size_of(estimate.model_on_meta(run, width), pretrained=True) == NFNET


def test_the_size_of_a_store_matches_the_method_card():
    assert estimate.checkpoint_bytes(NFNET.trained) / MIB == pytest.approx(152.0, abs=0.05)
    for checkpoints, mib, gib in ((1, 179, 3.6), (2, 331, 6.6), (3, 483, 9.6)):
        assert (store_bytes(NFNET, 1, checkpoints) - 4 * NFNET.shared) / MIB == pytest.approx(mib, abs=0.5)
        assert store_bytes(NFNET, 20, checkpoints) / GIB == pytest.approx(gib, abs=0.05)
    alone = Size(NFNET.image, NFNET.text, 0, 0)
    assert store_bytes(alone, 1, 10) / MIB == pytest.approx(1672, abs=0.5)
    assert store_bytes(alone, 20, 10) / GIB == pytest.approx(32.7, abs=0.05)
    assert store_bytes(alone, 1, 2, "bfloat16-delta") == store_bytes(alone, 1, 1)


def test_estimated_parameters_equal_those_of_the_built_model():
    run = config.load(SMALL)
    size = estimate.size_of(estimate.model_on_meta(run, 32), pretrained=False)
    model = build(run.model, 32, 16, 0, "student")
    assert size.trained == sum(p.numel() for p in model.parameters()) and size.frozen == size.shared == 0


def test_flops_equal_a_count_by_hand():
    run = config.load(SMALL)
    work = estimate.work_of(estimate.model_on_meta(run, 32), run, 32)
    convolutions = 2 * 9 * (3 * 8 * 16 * 16 + 8 * 16 * 8 * 8)
    heads = 2 * (16 * 4 * 4 * 24 + 32 * 24)
    scores = 2 * 4 * 24
    assert work.forward == convolutions + heads + scores
    assert 2 * work.forward < work.training < 3 * work.forward
    assert work.matching > 2 * 4 * work.training and work.graph_bytes > 0


def test_a_frozen_tower_is_counted_once_per_outer_iteration():
    frozen = ["model.image.trainable=false", "distill.phases.0.iterations=3", "distill.steps=2", "distill.batch=4"]
    run = config.load(
        SMALL | {"model": SMALL["model"] | {"image": SMALL["model"]["image"] | {"weights": "random:0"}}}, frozen
    )
    work = estimate.work_of(estimate.model_on_meta(run, 32), run, 32)
    convolutions = 2 * 9 * (3 * 8 * 16 * 16 + 8 * 16 * 8 * 8)
    assert work.features == 3 * convolutions, "the tower must run forward, then forward and backward"
    assert work.matching < 2 * 4 * convolutions < estimate.work_of(*_trained(run), 32).matching
    assert work.forward > convolutions, "experts and students run the frozen tower on images, so its FLOPs must count"
    distil = estimate.operations(run, {s: (10, 10) for s in ("train", "val", "test")}, work)["distill"]
    assert distil == 3 * (2 * work.matching + 8 * work.features)


def _trained(run):
    run = config.load(run.model_dump(mode="json"), ["model.image.trainable=true"])
    return estimate.model_on_meta(run, 32), run


def test_first_order_costs_less_and_more_pairs_cost_more():
    first, exact = config.load(SMALL), config.load(SMALL, ["distill.estimator=exact"])
    wide = config.load(SMALL, ["distill.estimator=exact", "distill.batch=8"])
    runs = {"e": exact, "f": first, "w": wide}
    cost = {name: estimate.work_of(estimate.model_on_meta(r, 32), r, 32) for name, r in runs.items()}
    assert cost["f"].matching < cost["e"].matching < cost["w"].matching
    assert cost["e"].graph_bytes < cost["w"].graph_bytes


def test_each_reused_graph_adds_its_bytes():
    need = []
    for reuse in (0, 1, 3, 99):
        run = config.load(SMALL, ["distill.steps=4", f"distill.reuse_graphs={reuse}"])
        model = estimate.model_on_meta(run, 32)
        size, work = estimate.size_of(model, pretrained=False), estimate.work_of(model, run, 32)
        need.append(estimate.matching_bytes(run, size, work, 32))
    graph = (need[2] - need[1]) / 2
    assert need[0] == need[1] and graph > work.graph_bytes / 2 and need[3] - need[2] == pytest.approx(graph, abs=2)


def test_counting_does_not_change_the_global_random_state():
    before = torch.random.get_rng_state()
    run = config.load(SMALL)
    estimate.work_of(estimate.model_on_meta(run, 32), run, 32)
    assert torch.equal(before, torch.random.get_rng_state())


def test_counts_come_from_the_config_annotations_or_papers(tmp_path):
    assert estimate.known_counts(config.Data())[0]["train"] == (1000, 5000)
    absent = config.Data(source="lists", layout="cc3m", root=str(tmp_path / "absent"), eval_limit=10_000)
    counts, origin = estimate.known_counts(absent)
    assert counts["val"] == (10_000, 10_000) and "published" in origin
    (tmp_path / "captions.csv").write_text("image,caption,split\na.png,one,train\na.png,two,train\nb.png,three,test\n")
    counts, origin = estimate.known_counts(config.Data(source="table", root=str(tmp_path)))
    assert counts == {"train": (1, 2), "val": (0, 0), "test": (1, 1)} and "annotations" in origin


def test_an_encoder_that_is_not_installed_is_reported():
    with pytest.raises(ValueError, match="pip install no-such-encoder"):
        estimate.text_features(config.TextTower(name="package:no_such_encoder"))


def test_chained_phases_cost_the_students_of_their_path_starts():
    phases = {"distill.phases": [{"pairs": 10, "iterations": 6}, {"pairs": 14, "iterations": 6}]}
    chain = {"distill.path_start": "student", "distill.path_lag": 2, "distill.path_epochs": 5}
    flops, disk = [], []
    for settings in (phases, phases | chain):
        run = config.load(SMALL, [f"{name}={value}" for name, value in settings.items()])
        model = estimate.model_on_meta(run, 32)
        work, size = estimate.work_of(model, run, 32), estimate.size_of(model, pretrained=False)
        disk.append(estimate.phases_bytes(run, 32, size))
        counts = {"train": (40, 200), "val": (5, 25), "test": (5, 25)}
        flops.append(estimate.operations(run, counts, work)["distill"])
    starts, experts, pairs, passes = 3, run.experts.num, 10, 5  # of the sets after 2, 4 and 6 updates of phase 0
    assert flops[1] - flops[0] == starts * experts * passes * pairs * work.training
    sets = 4 * 2 * sum(estimate.synthetic_numbers(run, 32))  # of each phase, after 2 and 4 updates
    assert disk[1] - disk[0] == starts * experts * estimate.checkpoint_bytes(size.trained) + sets
