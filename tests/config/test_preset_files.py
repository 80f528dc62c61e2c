"""Tests of preset files: their names, values (of all but the demo as at commit 30ca333), budgets, and the run files
printed from them."""

import json
from pathlib import Path

import pytest

from rmdd import config
from rmdd.cli.presets import run_file
from rmdd.config import presets, recipes
from rmdd.config.runfile import parse

FORMER = Path(__file__).parent / "resolved_presets.jsonl"
"""Preset values at commit 30ca333: each line has the fields in which a preset differs from the preset `like`."""
RENAMED = {"experts.gang": "experts.worker_group"}
ON_LORS = {"lors", "tesla_vl", "repblend", "datm", "mct", "amd"}
MOVED_TO_OPTIONS = {
    "rate_branches": ("same", ON_LORS),
    "blend": (0.0, {"repblend"}),
    "anchors": (2, {"mct"}),
    "smooth_anchors": (False, {"mct"}),
    "start_points": ("integer", {"mct"}),
    "starts": ("together", {"amd"}),
    "ranges": ("stated", {"amd"}),
}
"""Former fields of `distill` that are now in `distill.options`: the former default, and the methods with the option."""

EXACT = ("flickr30k_mtt_vl", "coco_mtt_vl", "emoji_mtt_vl", "emoji_ptm_st_100")
"""Starts of the names of the presets whose `distill.estimator` is still exact; it is now first_order in all others."""

ADDED = {
    "data.huggingface": config.HuggingFace().model_dump(mode="json"),
    "data.imagefolder": config.ImageFolder().model_dump(mode="json"),
    "data.max_loss": 0.5,
    "data.duplicates": "keep",
    "data.splits": config.Splits().model_dump(mode="json"),
    "data.train_limit": None,
    "distill.path_start": "theta_0",
    "distill.path_lag": None,
    "distill.path_epochs": None,
    "distill.path_order": None,
    "evaluate.order": "sequence",
    "evaluate.between": "zeros",
}
"""Fields that run files did not have then, with their defaults."""


def former_values() -> dict[str, dict]:
    values: dict[str, dict] = {}
    for line in FORMER.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        values[entry["name"]] = values.get(entry["like"], {}) | entry["fields"]
    return values


VALUES = former_values()


def load(name: str) -> config.Run:
    return config.load(name, [] if name == "demo" else ["data.root=somewhere"])


def by_field(values: dict) -> dict:
    """Return `values` with each field of a section under the key `section.field`."""
    fields = {}
    for key, value in values.items():
        fields |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return fields


def test_no_preset_was_lost():
    assert set(VALUES) <= set(config.preset_names())


@pytest.mark.parametrize("name", [name for name in VALUES if name != "demo"])
def test_a_preset_has_the_values_that_it_had(name):
    expected = {"name": name} | VALUES[name] | ADDED
    expected["distill.plan"] |= {"chain": True}
    for before, now in RENAMED.items():
        expected[now] = expected.pop(before)
    if not name.startswith(EXACT):
        expected["distill.estimator"] = "first_order"
    method, options = expected["distill.method"], dict(expected["distill.options"])
    for option, (default, methods) in MOVED_TO_OPTIONS.items():
        value = expected.pop(f"distill.{option}")
        assert method in methods or value == default
        options |= {option: value} if method in methods else {}
    # the presets at commit 30ca333 were stored without the defaults of options
    expected["distill.options"] = recipes.find(method).Options(**options).model_dump(mode="json")
    assert by_field(load(name).model_dump(mode="json")) == expected


def test_the_demo_has_chained_phases_and_far_more_training_pictures_than_pairs():
    run = load("demo")
    assert run.distill.path_start == "student" and len(run.distill.phases) >= 2
    assert sum(phase.pairs for phase in run.distill.phases) > run.distill.budget, "small pictures pay for more pairs"
    assert run.data.scenes.train >= 5 * run.distill.budget and run.distill.stored_size < run.data.image_size
    assert {"infonce", "wbce"} <= set(run.evaluate.baseline_losses) and len(run.evaluate.baseline_lrs) >= 3


@pytest.mark.parametrize("name", VALUES)
def test_the_printed_run_file_is_the_preset(name):
    assert parse(run_file(name)) == presets.preset(name)


def test_the_printed_run_file_has_the_comments_of_its_file_and_its_entry():
    text = run_file("flickr30k_lors_500")
    assert text.startswith("# LoRS on Flickr30k") and "# 500: The released script does not reach" in text
    assert "similarity: {alpha: 1} # ours\n" in text and "as published" not in text
    assert "mean_weight: 0.5 # 0.5 to 0.6 in the notes" in run_file("flickr30k_covmatch_500")


def test_a_file_with_budgets_is_not_a_preset():
    with pytest.raises(
        config.ConfigError, match="'coco_edge' has several budgets; give one of coco_edge_500, coco_edge"
    ):
        config.load("coco_edge")
    with pytest.raises(config.ConfigError, match="extends: 'coco_edge' has several budgets; give one of coco_edge_500"):
        config.load({"extends": "coco_edge"})
    with pytest.raises(config.ConfigError, match="no preset 'coco_edge_50'; did you mean coco_edge_500?"):
        config.load("coco_edge_50")


def test_a_file_of_the_user_cannot_have_budgets(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: demo\nbudgets: {50: {seed: 1}}\n")
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\n")
    for source in (tmp_path / "mine.yaml", tmp_path / "other.yaml", {"budgets": {}}):
        with pytest.raises(
            config.ConfigError, match="budgets: only the presets of rmdd .* `extends: flickr30k_lors_500`"
        ):
            config.load(source)


def test_reading_a_preset_leaves_its_file_as_it_is():
    before = config.read("demo")
    config.read("demo")["distill"]["budget"] = 1
    assert config.load("demo", ["distill.budget=60"]).distill.budget == 60
    assert config.read("demo") == before
