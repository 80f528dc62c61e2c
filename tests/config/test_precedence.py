"""Tests of which values hold if a run's method is not that of the preset it starts from."""

import json

import pytest
import yaml

import rmdd
from rmdd import config, methods
from rmdd.config import ConfigError, load
from rmdd.config.precedence import GIVE_WAY, OF_ANY_METHOD, leaves, value_of
from rmdd.config.recipes import BUILT_IN
from rmdd.runs.recipe import remarks_of
from rmdd.searches.loading import TrialLoader
from rmdd.searches.sweeps import members, members_of_files

LORS = {
    "trajectory": "original",
    "estimator": "first_order",
    "loss": "wbce",
    "optimiser": "sgd",
    "lr_image": 100,
    "lr_text": 100,
    "lr_similarity": 10,
    "lr_lr": 0.01,
    "ema": 0,
    "path_start": "theta_0",
    "stored_size": None,
    "init": "real",
}
"""Values of LoRS where a file states nothing."""
PHASE = {"pairs": 40, "start": 0, "stop": 2, "endpoint": 3, "iterations": 7}
EMOJI = [f"emoji_{method}_100" for method in BUILT_IN]


def write(folder, values: dict, name: str = "mine.yaml"):
    (folder / name).write_text(yaml.safe_dump(values))
    return folder / name


def assert_is_plain_lors(run: config.Run) -> None:
    rule = run.distill
    assert {name: getattr(rule, name) for name in LORS} == LORS
    assert (rule.similarity.kind, rule.similarity.rank, rule.similarity.alpha) == ("low_rank", 10, 3)
    assert [phase.iterations for phase in rule.phases] == [3000] and run.experts.keep == "all"
    assert (run.evaluate.order, rule.method) == ("sequence", "lors")


def loaded_in_each_way(preset: str, method: str, folder, sets: list[str]) -> dict[str, config.Run]:
    """Return a run of `method` on the data of `preset`, loaded in each way in which a user can name the method."""
    named = {"extends": preset, "distill": {"method": method}}
    whole = folder / "whole.yaml"
    whole.write_text(config.dump(load(preset, sets)))
    base = write(folder, {"extends": preset}, "base.yaml")
    return {
        "mapping": load(named, sets),
        "file": load(write(folder, named), sets),
        "file that extends a file": load(write(folder, {**named, "extends": base.name}, "two.yaml"), sets),
        "--set": load(preset, [*sets, f"distill.method={method}"]),
        "--set of a section": load({"extends": preset}, [*sets, f"distill={{method: {method}}}"]),
        "run.yaml": load(whole, [f"distill.method={method}"]),
        "sweep": members(lambda chosen: load(preset, [*sets, *chosen]), {"distill.method": [method]})[0].run,
        "trial": TrialLoader(load(preset, sets)).load({"distill.method": method}),
    }


@pytest.mark.parametrize("preset", ["demo", "emoji_ptm_st_100", "emoji_ptm_st_auto_100", "flickr30k_ptm_st_100"])
def test_a_method_has_its_own_values_wherever_its_name_is_written(preset, tmp_path):
    runs = loaded_in_each_way(preset, "lors", tmp_path, [] if preset == "demo" else ["data.root=/data"])
    for run in runs.values():
        assert_is_plain_lors(run)
    assert len({run.hash_of() for way, run in runs.items() if way != "--set of a section"}) == 1
    start = load(preset, [] if preset == "demo" else ["data.root=/data"])
    run = runs["file"]
    assert (run.data, run.model, run.runtime) == (start.data, start.model, start.runtime)
    assert (run.distill.budget, run.experts.num) == (start.distill.budget, start.experts.num)


def test_values_of_bases_that_name_no_method_stay():
    run = load("flickr30k_ptm_st_200", ["data.root=x", "distill.method=lors"])
    assert (run.distill.steps, run.distill.snapshots, run.evaluate.selection) == (8, 4, "val_best")
    assert load("emoji_ptm_st_100", ["data.root=x", "distill.method=lors"]).evaluate.epochs == 100


@pytest.mark.parametrize("method", ["lors", "mct", "covmatch", "repblend"])
def test_the_values_of_a_method_do_not_depend_on_the_preset_of_another_method(method):
    seen = set()
    for preset in EMOJI:
        if preset != f"emoji_{method}_100":
            run = load(preset, ["data.root=x", f"distill.method={method}", "name=same"])
            fields = run.distill.model_dump(mode="json", exclude=set(OF_ANY_METHOD) - {"method"})
            parts = (run.data, run.model, run.experts, run.evaluate)
            seen.add(json.dumps([fields, *(part.model_dump(mode="json") for part in parts)]))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["demo", "emoji_mct_100", "flickr30k_repblend_500", "coco_lors_500"])
def test_naming_the_method_of_the_preset_changes_nothing(name):
    sets = [] if name == "demo" else ["data.root=x"]
    run = load(name, sets)
    method = run.distill.method
    assert load(name, [*sets, f"distill.method={method}"]) == run
    assert load({"extends": name, "name": name, "distill": {"method": method}}, sets) == run


def test_what_the_users_file_states_holds_over_the_method(tmp_path):
    mine = {"extends": "demo", "distill": {"phases": [PHASE], "similarity": {"rank": 3}, "batch": 8, "budget": 60}}
    run = load(write(tmp_path, mine), ["distill.method=lors", "distill.lr_text=7", "evaluate.epochs=3"])
    rule = run.distill
    assert [(p.pairs, p.iterations) for p in rule.phases] == [(40, 7)]
    assert (rule.similarity.kind, rule.similarity.rank, rule.batch, rule.budget) == ("low_rank", 3, 8, 60)
    assert (rule.lr_text, rule.lr_image, run.evaluate.epochs) == (7, 100, 3)
    again = load(yaml.safe_load(config.dump(run)), ["distill.method=mct"])
    assert again == load(write(tmp_path, mine), ["distill.method=mct", "distill.lr_text=7", "evaluate.epochs=3"])


def test_what_a_file_below_states_holds_too(tmp_path):
    write(tmp_path, {"extends": "demo", "distill": {"ema": 0.5, "method": "mct"}}, "base.yaml")
    run = load(write(tmp_path, {"extends": "base.yaml", "distill": {"method": "lors"}}))
    assert (run.distill.ema, run.distill.trajectory) == (0.5, "original")


def test_phases_that_replace_those_of_a_preset_fit_its_budget():
    for budget, pairs in ((50, 49), (60, 59)):
        run = load("demo", ["distill.method=lors", f"distill.budget={budget}"])
        assert [p.pairs for p in run.distill.phases] == [pairs]
    assert load({"distill": {"method": "lors", "budget": 500}}).distill.phases[0].pairs == 99
    assert load("emoji_ptm_st_500", ["data.root=x", "distill.method=tesla_vl"]).distill.phases[0].pairs == 500


@pytest.mark.parametrize(("preset", "budget"), [("demo", 50), ("emoji_ptm_st_100", 100)])
def test_the_budget_of_a_preset_stays_also_if_the_method_has_one_of_its_own(preset, budget):
    rule = load({"extends": preset, "data": {"root": "x"}, "distill": {"method": "edge"}}).distill
    assert value_of(methods.find("edge").defaults, "distill.budget") == 500
    assert (rule.budget, [phase.pairs for phase in rule.phases]) == (budget, [budget])


def test_options_of_another_method_are_dropped_from_the_users_file(tmp_path):
    file = write(tmp_path, {"distill": {"method": "mct", "options": {"anchors": 3, "rate_branches": "same"}}})
    assert load(file, ["distill.method=lors"]).distill.options == {"rate_branches": "same"}
    file = write(tmp_path, {"distill": {"method": "lors", "options": {"anchors": 3}}})
    with pytest.raises(ConfigError, match=r"distill.options.anchors: unknown key"):
        load(file)


def test_a_sweep_over_methods_runs_the_preset_and_the_other_method_by_its_own_values():
    runs = members(
        lambda chosen: load("emoji_ptm_st_100", ["data.root=x", *chosen]), {"distill.method": ["lors", "ptm_st"]}
    )
    assert_is_plain_lors(runs[0].run)
    assert runs[1].run == load("emoji_ptm_st_100", ["data.root=x"])


def test_a_sweep_can_run_a_preset_of_each_method():
    presets, sets = ["emoji_lors_100", "emoji_ptm_st_100"], ["data.root=x"]
    runs = members_of_files(presets, load, sets, {"distill.seed": [0, 1]})
    assert [m.label for m in runs] == [f"config={name} distill.seed={seed}" for name in presets for seed in (0, 1)]
    assert [m.run for m in runs] == [load(name, [*sets, f"distill.seed={s}"]) for name in presets for s in (0, 1)]
    with pytest.raises(ConfigError, match=r"flickr30k_lors_100 and config=demo differ in runtime.loader_workers"):
        members_of_files(["demo", "flickr30k_lors_100"], load, sets, {})
    with pytest.raises(ConfigError, match="config=./demo.yaml and config=demo are the same run"):
        members_of_files(["demo", "./demo.yaml"], lambda name, chosen: load("demo", chosen), [], {})


def test_a_sweep_of_nothing_is_a_mistake_that_is_named():
    with pytest.raises(ConfigError, match="there is no run file; give at least one"):
        rmdd.sweep([], {})
    for source in ("demo", ["demo"]):
        with pytest.raises(ConfigError, match="distill.seed has no values to try; give at least one"):
            rmdd.sweep(source, {"distill.seed": []})


def test_a_resumed_search_keeps_what_the_user_stated():
    base = load("demo", ["search.space={distill.method: {choice: [ptm_st, lors]}}", "distill.momentum=0.3"])
    resumed = load(json.loads(json.dumps(base.plain())))
    for method in ("ptm_st", "lors"):
        trial = TrialLoader(resumed).load({"distill.method": method})
        assert trial == load("demo", [f"distill.method={method}", "distill.momentum=0.3"])


def test_the_origins_of_values_are_in_no_comparison_and_survive_a_dump():
    run = load("emoji_ptm_st_100", ["data.root=x", "distill.batch=30"])
    again = load(yaml.safe_load(config.dump(run)))
    assert again == run == load(run.model_dump(mode="json")) and hash(again) == hash(run)
    assert again.plain() == run.plain() and run.plain()["for_any_method"]["distill"] == {"batch": 30}


def test_overridden_values_of_the_method_name_the_file_that_states_them(tmp_path):
    mine = write(tmp_path, {"extends": "demo", "distill": {"method": "lors", "ema": 0.9}})
    rows = {row.pop("field"): row for row in load(mine, ["distill.lr_text=5"]).overridden()}
    assert rows["distill.ema"] == {"own": 0, "used": 0.9, "by": "mine.yaml"}
    assert rows["distill.lr_text"] == {"own": 100, "used": 5, "by": "--set"}
    assert rows["distill.phases"]["by"] == "distill.budget" and len(rows) == 3
    by = {row["field"]: row["by"] for row in load("emoji_repblend_100", ["data.root=x"]).overridden()}
    assert (by["distill.lr_image"], by["distill.phases"]) == ("emoji_lors_100", "emoji_lors_100")
    assert load({"distill": {"method": "lors"}}).overridden() == []


@pytest.mark.parametrize(
    ("preset", "better"),
    [
        ("emoji_ptm_st_100", "emoji_lors_100"),
        ("emoji_ptm_st_auto_100", "emoji_lors_100"),
        ("flickr30k_ptm_st_200_chained", "flickr30k_lors_200"),
        ("demo", None),
        ("emoji_lors_100", None),
    ],
)
def test_a_remark_names_the_preset_of_the_method_for_the_same_data(preset, better):
    remarks = remarks_of(load(preset, ["distill.method=lors", *([] if preset == "demo" else ["data.root=x"])]))
    named = f"the preset {better} has values that were chosen for lors on this data"
    assert remarks[1:] == ([named] if better else [])
    assert preset == "emoji_lors_100" or remarks[0].startswith(f"these values of {preset} were tuned for ptm_st and ")


@pytest.mark.parametrize("method", BUILT_IN)
def test_fields_that_give_way_exist_and_cover_the_values_of_every_method(method):
    run = config.Run().model_dump()
    assert all(value_of(run, name.rpartition(".")[0]).keys() >= {name.rpartition(".")[2]} for name in GIVE_WAY)
    of_others = {name for name in leaves(methods.find(method).defaults) if name.startswith("distill.")}
    given = {name for name in of_others if any(f"{name}.".startswith(f"{field}.") for field in GIVE_WAY)}
    assert of_others - given <= {"distill.budget"}


def test_the_values_of_ptm_st_are_the_general_defaults():
    values = methods.find("ptm_st").defaults
    assert load({"distill": {"method": "ptm_st"}}) == load({}) == config.Run()
    assert values["distill"]["ema"] == config.Distill().ema


def test_published_rates_are_refused_with_the_normalised_optimiser():
    stated = {"extends": "demo", "distill": {"lr_image": 100}}
    of_method = {"extends": "demo", "distill": {"method": "lors", "optimiser": "normalised"}}
    for raw, named in ((stated, "distill.lr_image 100"), (of_method, "distill.lr_text 100, distill.lr_similarity 10")):
        with pytest.raises(ConfigError, match=f"step per entry.*{named}.* to 0.001 to 0.1, or set .*optimiser: sgd"):
            load(raw)
    for small in (["distill.lr_image=1"], ["distill.lr_similarity=100", "distill.similarity.kind=identity"]):
        load("demo", small)
    load("emoji_pds_100", ["data.root=x", "distill.optimiser=normalised"])
