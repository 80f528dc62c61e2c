"""Check the planning rule of `phases: auto` on made-up measurements, and runs with planned phases."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from processes import Rmdd
from tiny import go
from typer.testing import CliRunner

from rmdd import config
from rmdd.cli.app import app
from rmdd.cli.loading import load_folder
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.distill.trajectory.planning import Measured, endpoints, key_of, ranges, sizes, with_plan
from rmdd.execution.tasks import Hooks
from rmdd.experts.train import kept_epochs
from rmdd.pipeline import open_pipeline
from rmdd.runs.preflight import examine, problems_of
from rmdd.searches.formats import verify
from rmdd.searches.sweeps import sweep
from rmdd.searches.trial import Trial

# val R@mean from PTM-ST, Table 7; values of odd epochs are interpolated
FLICKR = [0.1, 40.0, 45.6, 47.2, 48.9, 50.0, 51.2, 52.4, 53.6, 54.4, 55.3]
COCO = [0.1, 32.0, 35.4, 37.5, 39.0, 39.3, 40.4, 41.2, 41.9, 42.3, 42.8]


def published(budget, **plan):
    plan = {"iterations": 6000, **plan}
    return config.load("flickr30k_ptm_st_100", _sets(budget=budget, phases="auto", plan=plan))


def _sets(**values):
    return ["data.root=somewhere", *(f"distill.{key}={json.dumps(value)}" for key, value in values.items())]


def measured(val, straightness=None):
    straightness = straightness or {e: 0.6 for e in range(1, len(val))}
    return Measured(np.array(val), np.ones(len(val) - 1), straightness)


def agreeing(value, size=11):
    return lambda phase, end: torch.full((size, size), float(value), dtype=torch.float64)


@pytest.mark.parametrize("val", [FLICKR, COCO])
def test_the_published_teachers_give_the_published_first_endpoint(val):
    assert endpoints(published(100).distill, measured(val))[0] == 6


def test_the_published_teacher_of_flickr_gives_all_published_endpoints():
    assert endpoints(published(1000).distill, measured(FLICKR)) == [6, 8, 10]


def test_an_early_saturated_teacher_ends_early():
    emoji = [1.2, 51.4, 62.8, 66.5, 67.9, 68.1, 69.1, 69.9, 70.6, 70.6, 69.7]
    assert endpoints(published(100).distill, measured(emoji))[:2] == [3, 4]


def test_endpoints_increase_and_the_teacher_gains_between_them():
    flat = [0.0, 50.0, 97.0, 97.0, 98.0, 100.0, 100.0, 99.0, 100.0, 100.0, 100.0]
    assert endpoints(published(1000, max_phases=6).distill, measured(flat)) == [2, 4, 5], "no val gain after epoch 5"
    assert endpoints(published(1000, reach=1.0).distill, measured(flat)) == [5]


def test_bent_shortcuts_are_no_endpoints():
    straight = {e: 1 / e for e in range(1, 11)}
    assert endpoints(published(100).distill, measured(FLICKR, straight)) == [4]
    with pytest.raises(ValueError, match=r"no epoch of \[5\] may be an endpoint.*min_straightness"):
        endpoints(published(100).distill, measured(FLICKR, {5: 0.1}))


def test_a_budget_too_small_for_a_phase_is_refused_before_training(tmp_path):
    run = load(tmp_path, "distill.budget=2")
    (mistake,) = problems_of(run)
    assert "the budget of 2 holds 1 pairs and a phase needs 3; raise distill.budget" in mistake
    with pytest.raises(ValueError, match="the budget of 2 holds"), open_pipeline(run, Progress(quiet=True)) as pipeline:
        pipeline.check_budget()
    done = CliRunner().invoke(app, ["check", _written(run, tmp_path)])
    assert done.exit_code == 2 and "the budget of 2 holds" in done.stderr
    assert not (tmp_path / "experts").exists()


def test_more_pairs_than_records_are_refused(trained, tmp_path):
    storage = shutil.copytree(trained, tmp_path / "runs")
    with pytest.raises(ValueError, match=r"wants 7\d pairs but the train split has \d+ .*\(or distill.budget, where"):
        go(load(storage, "distill.budget=80", "distill.plan.max_phases=1"), "plan")


@pytest.mark.parametrize(("budget", "phases"), [(100, 1), (200, 2), (1000, 3)])
def test_phases_by_pairs(budget, phases):
    result = sizes(published(budget), 768, 3)
    assert len(result) == phases and max(result) - min(result) <= 1
    listed = [{"pairs": m, "endpoint": 6} for m in result]
    assert config.load(published(budget).model_dump(), [f"distill.phases={json.dumps(listed)}", "distill.plan={}"])


def test_few_updates_make_one_phase():
    assert len(sizes(published(1000, iterations=1999), 768, 3)) == 1
    assert len(sizes(published(1000, iterations=2000), 768, 3)) == 2
    assert len(sizes(published(1000), 768, 1)) == 1, "or few endpoints"


def test_sizes_use_the_full_budget():
    from rmdd.config import budget

    run = published(200)
    result = sizes(run, 768, 3)
    assert budget.check(result, 200, 224, 768, "full") is None
    assert budget.check([result[0] + 1, *result[1:]], 200, 224, 768, "full")


def test_ranges_grow_while_gradients_agree():
    run = published(1000)
    assert ranges(run.distill, [6, 8, 10], agreeing(0)) == [(0, 2), (1, 3), (2, 4)], "the published ranges"
    assert ranges(run.distill, [6], agreeing(0.9)) == [(0, 6)]
    cosines = torch.eye(11, dtype=torch.float64)
    cosines[1, 2] = 0.95
    assert ranges(run.distill, [6], lambda phase, end: cosines) == [(0, 3)]
    assert ranges(run.distill, [1], agreeing(0.9)) == [(0, 1)], "no start has a target after the endpoint"


def test_a_range_of_real_starts_ends_with_its_targets():
    run = config.load(published(100).model_dump(), ["distill.method=mct", "distill.trajectory=shortcut"])
    assert ranges(run.distill, [6], agreeing(0.9)) == [(0, 5)]


def test_auto_phases_are_read_back_and_validated():
    run = published(100)
    assert run.distill.phases == () and run.distill.plan.kind == "auto"
    assert config.load(run.model_dump()) == run == config.load(yaml.safe_load(config.dump(run)))
    for wrong, message in (
        (["distill.trajectory=convexified"], "set distill.trajectory: shortcut"),
        (["distill.method=amd"], "plans one range for both towers"),
        (["distill.plan.endpoints=[4, 12]"], r"endpoints \[12\] are after the last expert epoch 10"),
        (["distill.phases=autos"], "distill.phases"),
        (["distill.phases=[]", "distill.plan={}"], "list a phase, or set auto"),
        (["distill.phases=auto", "distill.plan=5"], "distill.plan"),
        (["distill.phases=adaptive", "distill.trajectory=original", "experts.keep=all"], "needs a straight path"),
        (["experts.keep=[4, 6]", "distill.plan.endpoints=[4, 5]"], r"lacks the epochs \[5, 10\]"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.load(run.model_dump(), wrong)


def test_a_plan_keeps_all_possible_endpoints():
    run = published(100)
    assert config.load("flickr30k_ptm_st_100", _sets()).experts.keep == "endpoints"
    assert run.experts.keep == "all" and kept_epochs(run.experts, run.endpoints) is None
    few = published(100, endpoints=[4, 6])
    assert kept_epochs(few.experts, few.endpoints) == (4, 6, 10)
    listed = {"phases": [{"pairs": 90, "endpoint": 5, "iterations": 5}]}
    assert kept_epochs(with_plan(few, listed).experts, with_plan(few, listed).endpoints) == (4, 6, 10), (
        "before and after"
    )
    assert run.hash_of() == with_plan(run, listed).hash_of()


def test_a_plan_on_original_trajectories_keeps_all_of_them():
    run = config.load("flickr30k_ptm_st_100", [*_sets(phases="auto", plan={"endpoints": [4]}, trajectory="original")])
    assert run.experts.keep == "all"


def test_listed_phases_override_a_plan():
    """Check that explicit phases override a plan: a resolved run file has both phases and `kind: auto`."""
    listed = [{"pairs": 90, "endpoint": 5, "iterations": 5}]
    run = config.load(published(100).model_dump(), [f"distill.phases={json.dumps(listed)}"])
    assert run.distill.plan.kind == "stated" and run.distill.phases[0].pairs == 90
    with pytest.raises(config.ConfigError, match="distill.phases.0.pairs=90"):
        config.load(published(100).model_dump(), ["distill.phases.0.pairs=90"])


def test_a_plan_is_renewed_when_its_inputs_change():
    run = published(100)
    key = key_of(run, "store")
    assert key == key_of(config.load(run.model_dump(), ["distill.guard.every=7", "evaluate.epochs=3"]), "store")
    others = ["distill.plan.agreement=0.5", "distill.budget=90", "distill.steps=3", "seed=5", "experts.num=7"]
    keys = {key, key_of(run, "another"), *(key_of(config.load(run.model_dump(), [o]), "store") for o in others)}
    assert len(keys) == 2 + len(others)


def test_unused_plan_settings_do_not_change_the_hash():
    run = config.load("demo")
    assert "plan" not in json.dumps({k: v for k, v in run.model_dump().items() if k != "distill"})
    raised = config.load("demo", ["distill.plan.reach=0.5"])
    assert raised.hash_of() == run.hash_of(), "plan settings are ignored without planning"


TINY = tiny.changed(
    data={"scenes": {"val": 20}},
    model={"image": {"weights": "random:0"}},
    experts={"num": 2, "epochs": 3, "lr_image": 0.3, "lr_text": 0.3},
    distill={
        "reuse_graphs": 2,  # runs of this size are faster with kept graphs
        "phases": "auto",
        "plan": {
            "chain": False,
            "iterations": 12,
            "min_iterations": 5,
            "min_pairs": 4,
            "experts": 1,
            "draws": 1,
            "reach": 0.1,
            "reach_step": 0.8,  # the val score of these experts rises in epochs 2 and 3
        },
    },
)


def load(storage, *overrides):
    return config.load(tiny.stored(storage, TINY), overrides)


def _written(run, folder):
    (folder / "run.yaml").write_text(config.dump(run))
    return str(folder / "run.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Fixture: a storage folder with trained experts of the tiny run, but without distilled phases."""
    storage = tmp_path_factory.mktemp("trained")
    go(load(storage), "experts")
    return storage


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    storage = shutil.copytree(trained, tmp_path_factory.mktemp("planned") / "runs")
    go(load(storage))
    return storage


def phase_files(storage):
    return {str(p.relative_to(storage)): p.read_bytes() for p in storage.glob("phases/*/phase-*/set-*.safetensors")}


def test_a_planned_run_writes_its_plan_and_a_complete_result(finished):
    run = load(finished)
    folder = run_folder(run)
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["phases"]) == len(plan["signals"]["agreement"]) == 2
    assert "(wanted 0.70)" in plan["reasons"][1]
    assert len(plan["reasons"]) == 3 and "share" in plan["signals"]
    assert (folder / "plan.svg").read_text().startswith("<?xml")
    assert config.load(folder / "run.yaml") == run
    table = json.loads((folder / "evaluation.json").read_text())["table"]
    assert table["ptm_st"]["val"]["R@mean"]["n"] == 2
    assert verify(str(folder)).faults == []


def test_explicit_phases_equal_to_a_plan_reuse_its_work(finished, tmp_path):
    """A run that lists a plan's phases reuses the finished phases; in an empty storage it writes equal files."""
    planned = run_folder(load(finished)) / "planned.yaml"
    before = phase_files(finished)
    times = {p: p.stat().st_mtime_ns for p in finished.glob("phases/*/phase-*/set-*")}
    by_hand = config.load(planned)
    assert by_hand.distill.plan.kind == "stated" and len(by_hand.distill.phases) == 2
    go(by_hand)
    assert {p: p.stat().st_mtime_ns for p in finished.glob("phases/*/phase-*/set-*")} == times
    go(config.load(planned, [f"runtime.storage={tmp_path}"]), "distill")
    again = phase_files(tmp_path)
    assert len(before) == 2 and again == before


def test_planning_again_gives_the_same_plan(finished, tmp_path):
    run = load(tmp_path)
    go(run, "plan")
    one, other = (json.loads((run_folder(load(s)) / "plan.json").read_text()) for s in (finished, tmp_path))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    stamp = (run_folder(run) / "plan.json").stat().st_mtime_ns
    go(run, "plan")
    assert (run_folder(run) / "plan.json").stat().st_mtime_ns == stamp, "the plan is not computed again"


def test_a_check_shows_estimated_and_then_planned_phases(finished, tmp_path):
    fresh = examine(load(tmp_path))
    assert [p["pairs"] for p in fresh["phases"]] == [4, 4] and not fresh["budget"]["over"]
    assert {p["endpoint"] for p in fresh["phases"]} == {p["start"] for p in fresh["phases"]} == {None}
    shown = CliRunner().invoke(app, ["check", _written(load(tmp_path / "runs"), tmp_path)])
    assert "Phases (forecast)" in shown.stdout and shown.stdout.count("planned ") >= 4
    (tmp_path / "run.yaml").unlink()
    assert any("plans its phases after the experts" in r for r in fresh["remarks"]) and not list(tmp_path.iterdir())
    done = examine(load(finished))
    assert all(p["done"] for p in done["phases"]) and any("the phases are those of" in r for r in done["remarks"])


def test_estimated_phases_are_limited_by_the_endpoints(tmp_path):
    assert [p["pairs"] for p in examine(load(tmp_path, "distill.plan.endpoints=[2]"))["phases"]] == [8]


def test_a_planned_run_with_a_frozen_tower_can_be_checked(tmp_path):
    run = load(tmp_path, "model.image.trainable=false")
    assert examine(run)["time"]["operations"]["distill"] > 0


def test_a_missing_or_damaged_plan_is_reported(finished, tmp_path):
    storage = tmp_path / "runs"
    shutil.copytree(finished, storage)
    plan = run_folder(load(storage)) / "plan.json"
    text = plan.read_text()
    for wrong in (None, text[:50], json.dumps({"phases": 3}), text.replace('"pairs"', '"fairs"')):
        plan.unlink() if wrong is None else plan.write_text(wrong)
        faults = verify(str(plan.parent)).faults
        assert faults and {Path(f.path).name for f in faults} == {"plan.json"}, wrong
        assert all("create it again" in f.todo for f in faults)
    plan.unlink()
    go(load(storage), "plan")
    assert verify(str(plan.parent)).faults == []
    assert json.loads(plan.read_text())["phases"] == json.loads(text)["phases"]


def test_a_planned_run_moves_with_its_storage(finished, tmp_path):
    """Move the storage folder of a finished run; check that the run reuses its plan, phases and students there."""
    shutil.copytree(finished, tmp_path / "there")
    run = load_folder(str(tmp_path / "there" / run_folder(load(finished)).name))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "there").glob("*/*/*/*.safetensors")}
    plan = (run_folder(run) / "plan.json").stat().st_mtime_ns
    go(run)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (run_folder(run) / "plan.json").stat().st_mtime_ns == plan
    assert verify(str(tmp_path / "there")).faults == []


def test_another_machine_continues_a_planned_run_in_the_cloud(finished, tmp_path):
    uri = f"file://{tmp_path}/bucket"
    seen = []
    for machine in ("one", "other"):
        run = load(tmp_path, f"runtime.storage={uri}", f"runtime.scratch={tmp_path / machine}")
        go(run, "plan" if machine == "one" else "distill")
        files = {p.name: p.read_bytes() for p in (tmp_path / "bucket" / run_folder(run).name).glob("plan*")}
        assert files.keys() == {"plan.json", "plan.svg", "planned.yaml"}
        seen.append(files)
    assert seen[0] == seen[1]
    assert phase_files(tmp_path / "bucket") == phase_files(finished)
    assert verify(f"{uri}/{run_folder(run).name}").faults == []


def test_planned_runs_make_a_sweep(trained, tmp_path):
    run = load(shutil.copytree(trained, tmp_path / "runs"))
    swept = sweep(run.model_dump(), {"distill.plan.max_phases": [1, 2]}, progress=Progress(quiet=True))
    assert not swept.failed
    plans = [json.loads((Path(row["folder"]) / "plan.json").read_text()) for row in swept.runs]
    assert [len(plan["phases"]) for plan in plans] == [1, 2]


def test_a_trial_of_a_search_plans_its_phases(trained, tmp_path):
    trial = Trial(load(shutil.copytree(trained, tmp_path / "runs"), "distill.snapshots=2"))
    assert [trial.run_rung(Hooks())["done"] for _ in range(2)] == [False, True]
    assert len(list(tmp_path.glob("runs/phases/*/phase-*/set-*"))) == 4


def test_a_plan_edited_by_hand_must_fit_the_budget(finished, tmp_path):
    storage = tmp_path / "runs"
    shutil.copytree(finished, storage)
    path = run_folder(load(storage)) / "plan.json"
    plan = json.loads(path.read_text())
    plan["phases"][0]["pairs"] = 40
    path.write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="budget 9 allows"):
        go(load(storage), "plan")


def kill_when_begun(run, folder):
    """Distil in a child process that kills itself once a phase has a checkpoint."""
    process = Rmdd("distill", _written(run, folder), "--quiet")
    while process.poll() is None and not list(run_folder(run).parent.glob("phases/*/phase-*/state.safetensors")):
        time.sleep(0.01)
    process.kill()


def test_a_killed_planned_run_resumes_bit_identically(trained, finished, tmp_path):
    run = load(shutil.copytree(trained, tmp_path / "runs"), "distill.checkpoint_every=1")
    kill_when_begun(run, tmp_path)
    go(run, "distill")
    assert phase_files(tmp_path / "runs") == phase_files(finished)


def test_a_killed_adaptive_run_resumes_bit_identically(trained, tmp_path):
    plan = {"iterations": 12, "min_iterations": 50, "every": 2, "agreement": -1, "experts": 1, "draws": 1, "pace": 0.3}
    sets = ["distill.phases=adaptive", f"distill.plan={json.dumps(plan)}", "distill.checkpoint_every=1"]
    storages = [shutil.copytree(trained, tmp_path / name) for name in ("whole", "killed")]
    whole, killed = (load(storage, *sets, "distill.plan.endpoints=[2, 3]") for storage in storages)
    go(whole, "distill")
    kill_when_begun(killed, tmp_path)
    go(killed, "distill")
    assert phase_files(tmp_path / "killed") == phase_files(tmp_path / "whole") != {}
    (log,) = (tmp_path / "killed").glob("phases/*/phase-0/metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 13))
    assert all(line["low"] <= line["start"] < line["stop"] <= line["endpoint"] - 1 for line in lines)
