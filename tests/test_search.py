"""A search: what can be tried, who chooses, what survives, and that test stays closed."""

import copy
import csv
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time

import optuna
import pytest
import yaml
from test_sweeps import QUIET, TINY
from typer.testing import CliRunner

import rmdd
from rmdd import cli, config, tasks
from rmdd.places import run_folder
from rmdd.searches import begun_in, check, in_turn, search_folder
from rmdd.searches.samplers import pruner_of, sampler_of
from rmdd.searches.space import Space, loader, overrides
from rmdd.searches.study import Study

LR = {"loguniform": [0.1, 100]}
BOTH = {
    "distill.similarity.kind": {"choice": ["full", "low_rank"]},
    "distill.similarity.rank": {"int": [1, 2], "when": {"distill.similarity.kind": "low_rank"}},
}


def tiny(place, space=None, snapshots=3, **rule):
    raw = copy.deepcopy(TINY)
    raw["distill"] |= {"snapshots": snapshots, "budget": 10, "checkpoint_every": 1}
    raw["runtime"] = {"storage": str(place), "ray": "off", "track": "none"}
    raw["search"] = {"space": space or {"distill.lr_image": LR}, "startup": 3, **rule}
    return raw


def base_of(place="runs", space=None, **rule):
    return config.load(tiny(place, space, **rule))


# -- spaces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({}, "search.space is empty"),
        ({"distill.lr_imgae": LR}, "search.space.distill.lr_imgae: at 0.1: distill.lr_imgae: unknown key"),
        ({"distill.momentum": {"uniform": [0.5, 1.0]}}, "search.space.distill.momentum: at 1.0: .*less than 1"),
        ({"distill.steps": {"uniform": [1, 8]}}, "search.space.distill.steps: at .*valid integer"),
        ({"distill.estimator": {"choice": ["exact", "magic"]}}, "search.space.distill.estimator: at magic"),
        ({"distill.phases.1.pairs": {"int": [2, 4]}}, "search.space.distill.phases.1.pairs: at 2: .*no entry '1'"),
        ({"distill.phases.0.endpoint": {"int": [1, 9]}}, "distill.phases.0.endpoint: at 9: .*for epoch 9"),
        ({"distill.phases.0.pairs": {"int": [4, 400]}}, "search.space.distill.phases.0.pairs: at 400: "),
        ({"evaluate.epochs": {"int": [1, 4]}}, "search.space.evaluate.epochs: trials may differ in model, experts"),
    ],
)
def test_what_the_run_file_cannot_take_is_told_by_field(space, told):
    with pytest.raises(config.ConfigError, match=told):
        base = base_of(space={"distill.lr_image": LR})
        check(base.model_copy(update={"search": config.Search(space=space)}))


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"space": {"distill.lr_image": {}}}, "search.space.distill.lr_image: give one of uniform"),
        ({"space": {"distill.lr_image": {**LR, "choice": [1]}}}, "found loguniform and choice"),
        ({"space": {"distill.lr_image": {"loguniform": [0, 1]}}}, "needs ends above 0"),
        ({"space": {"distill.lr_image": {"uniform": [2, 1]}}}, "the lower first"),
        ({"space": {"distill.lr_image": {"uniform": ["a", 1]}}}, "search.space.distill.lr_image.uniform.0"),
        ({"space": {"distill.lr_image": {**LR, "step": 1}}}, "a step belongs to uniform or int"),
        ({"space": {"distill.steps": {"int": [1, 4], "step": 0.5}}}, "must be a whole number"),
        ({"space": {"distill.steps": {"int": [1, 4], "step": 9}}}, "is wider than int"),
        ({"space": {"distill.ema": {"choice": [0, 0]}}}, "values that differ"),
        ({"space": {"distill.ema": {"choice": [0, 1], "when": {"distill.steps": 1}}}}, "'distill.steps' is not in"),
        (
            {
                "space": {
                    "distill.ema": {"choice": [0, 0.5], "when": {"distill.steps": 1}},
                    "distill.steps": {"choice": [1, 2], "when": {"distill.ema": 0}},
                }
            },
            "depend on each other",
        ),
        ({"sampler": "grid", "space": {"distill.lr_image": LR}}, "distill.lr_image: a grid needs choice"),
        ({"sampler": "cmaes", "cost": "seconds"}, "cmaes knows one objective"),
        ({"pruner": "asha", "cost": "seconds"}, "compares by val alone"),
        ({"pruner": "asha", "snapshots": 1}, "distill.snapshots keeps 1"),
        ({"storage": "mysql://me:secret@host/db"}, "search.storage holds a password"),
    ],
)
def test_a_search_section_that_cannot_be_is_refused(rule, told):
    with pytest.raises(config.ConfigError, match=told):
        base_of(**rule)


def test_every_mistake_is_told_at_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny(tmp_path / "runs", {"distill.lr": LR, "distill.ema": {"uniform": [0, 1]}})))
    done = CliRunner().invoke(cli.app, ["search", str(file)])
    assert done.exit_code == 2 and "2 mistake(s)" in done.stderr and not (tmp_path / "runs").exists()
    assert "search.space.distill.lr: " in done.stderr and "search.space.distill.ema: at 1.0" in done.stderr


def test_an_end_that_another_field_can_make_room_for_is_no_mistake():
    space = {"distill.phases.0.pairs": {"int": [4, 6]}, "distill.batch": {"int": [2, 6]}}
    check(base_of(space=space).model_copy(update={"distill": base_of().distill.model_copy(update={"budget": 20})}))


@pytest.mark.parametrize("value", [1e-05, 0.1 + 0.2, 1e22, 7, True, None, "full", "0.1", [1.5, 2], {"a": 1e-7}])
def test_values_reach_the_run_as_they_are(value):
    raw, mistakes = {}, []
    for override in overrides({"distill.options": {"x": value}, "distill.ema": value}):
        config.apply(raw, override, {}, mistakes)
    assert raw == {"distill": {"options": {"x": value}, "ema": value}} and mistakes == []


def test_conditional_fields_are_drawn_when_their_condition_holds():
    search = config.Search(space=dict(reversed(BOTH.items())))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [Space(search).suggest(study.ask()) for _ in range(20)]
    assert all(("distill.similarity.rank" in d) == (d["distill.similarity.kind"] == "low_rank") for d in drawn)
    assert {len(d) for d in drawn} == {1, 2}
    assert Space(search).grid() == [
        {"distill.similarity.kind": "full"},
        {"distill.similarity.kind": "low_rank", "distill.similarity.rank": 1},
        {"distill.similarity.kind": "low_rank", "distill.similarity.rank": 2},
    ]


def test_choices_may_be_lists():
    phases = [
        [{"pairs": 4, "stop": 1, "endpoint": 1, "iterations": 3}],
        [{"pairs": 3, "stop": 1, "endpoint": 1, "iterations": n} for n in (1, 2)],
    ]
    base = base_of(space={"distill.phases": {"choice": phases}})
    check(base)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    runs = [loader(base)(overrides(Space(base.search).suggest(study.ask()))) for _ in range(8)]
    assert {len(run.distill.phases) for run in runs} == {1, 2}
    assert runs[0].search == config.Search(), "a trial is an ordinary run"


# -- who chooses -----------------------------------------------------------------------------------------------------

RATES = [f"distill.lr_{part}" for part in ("image", "text", "similarity", "lr")]
PLANE = {field: {"loguniform": [0.01, 100]} for field in RATES}


def bowl(values):
    """Best, 0, where every rate is 5; the first matters most."""
    return -sum((math.log10(values[field] / 5)) ** 2 / (1 + i) for i, field in enumerate(RATES) if field in values)


def best_of(sampler, seed, trials=30):
    search = config.Search(space=PLANE, sampler=sampler, startup=8)
    study = optuna.create_study(sampler=sampler_of(search, Space(search), seed), direction="maximize")
    study.optimize(lambda trial: bowl(Space(search).suggest(trial)), n_trials=trials)
    return study.best_value


def test_tpe_beats_random_at_equal_trials():
    found = {name: [best_of(name, seed) for seed in range(5)] for name in ("tpe", "random", "cmaes", "nsgaii")}
    mean = {name: statistics.fmean(values) for name, values in found.items()}
    assert mean["tpe"] > mean["random"] and mean["cmaes"] > mean["random"], found
    assert statistics.median(found["tpe"]) > statistics.median(found["random"]), found


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsgaii", "grid"])
def test_a_sampler_that_was_killed_draws_what_an_unbroken_one_would(sampler, tmp_path):
    space = {**PLANE, "distill.lr_image": {"choice": [0.1, 1, 10]}} if sampler == "tpe" else PLANE
    if sampler == "grid":
        space = {"distill.lr_image": {"uniform": [1, 8], "step": 1}, "distill.lr_text": {"choice": [1, 2]}}
    search = config.Search(space=space, sampler=sampler, startup=4)

    def study(name, storage):
        made = sampler_of(search, Space(search), 7)
        return optuna.create_study(
            study_name=name, sampler=made, storage=storage, direction="maximize", load_if_exists=True
        )

    def draw(study):
        trial = study.ask()
        values = Space(search).suggest(trial)
        study.tell(trial, bowl(values))
        return values

    memory = optuna.storages.InMemoryStorage()
    whole = study("whole", memory)
    unbroken = [draw(whole) for _ in range(14)]
    broken = [draw(study("broken", memory)) for _ in range(14)]
    assert unbroken == broken and len({json.dumps(v) for v in unbroken}) > 7


def asked(base, folder, value):
    """Climb without any distillation: `value(run, step)` is val there."""

    class Climb:
        def __init__(self, text):
            self.run, self.step = config.Run.model_validate_json(text), 0

        def climb(self):
            self.step += 1
            val = value(self.run, self.step)
            cost = {"iterations": float(self.run.distill.steps), "seconds": 1.0}
            return {"step": self.step, "val": val, "done": self.step == 3, "value": val, "cost": cost}

    with Study(base, folder, []) as study:
        in_turn(study, Climb)
        return study


def test_a_grid_tries_every_combination_once_and_passes_over_those_that_clash(tmp_path):
    space = {"distill.batch": {"int": [2, 5]}, "distill.estimator": {"choice": ["exact", "first_order"]}}
    study = asked(base_of(tmp_path, space, sampler="grid", trials=99), tmp_path / "s", lambda run, step: 1.0)
    tried = [t for t in study.all() if t.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(t.params["distill.batch"] for t in tried) == [2, 2, 3, 3, 4, 4]
    clash = [t for t in study.all() if t.user_attrs.get("infeasible")]
    assert len(clash) == 2 and all("distill.batch 5 is larger" in t.user_attrs["error"] for t in clash)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_poor_trials_are_stopped_by_their_curve(tmp_path, pruner):
    base = base_of(tmp_path, pruner=pruner, trials=12, sampler="random", reduction=2)
    study = asked(base, tmp_path / "s", lambda run, step: math.log10(run.distill.lr_image) * step)
    done = [t for t in study.all() if t.state == optuna.trial.TrialState.COMPLETE]
    stopped = [t for t in study.all() if t.state == optuna.trial.TrialState.PRUNED]
    assert len(done) + len(stopped) == 12 and len(stopped) >= 3
    assert max(t.params["distill.lr_image"] for t in study.all()) in [t.params["distill.lr_image"] for t in done]
    assert all(len(t.user_attrs["curve"]) < 3 for t in stopped) and pruner_of(base.search) is not None


def test_two_objectives_leave_a_front(tmp_path):
    from rmdd.searches.table import table_of

    base = base_of(tmp_path, {"distill.steps": {"int": [1, 8]}}, cost="iterations", sampler="grid")
    study = asked(base, tmp_path / "s", lambda run, step: float(min(run.distill.steps, 5)))
    table = table_of(base, study.study)
    front = [row for row in table.rows if row["number"] in table.best]
    assert [row["values"]["distill.steps"] for row in front] == [1, 2, 3, 4, 5]
    assert table.winner["values"] == {"distill.steps": 5}


def test_what_fails_by_its_values_is_told_and_what_fails_by_chance_stays_open(tmp_path):
    base = base_of(tmp_path, {"distill.steps": {"int": [1, 3]}}, sampler="grid")
    calls = itertools.count()

    def value(run, step):
        if run.distill.steps == 2 and next(calls) == 0:
            raise OSError("the disk is away")
        return float(run.distill.steps)

    first = asked(base, tmp_path / "s", value)
    assert list(first.failures) == ["trial 001"] and "the disk is away" in first.failures["trial 001"]
    second = asked(base, tmp_path / "s", value)
    assert second.failures == {} and [t.values for t in second.all()] == [[1.0], [2.0], [3.0]]


def test_a_space_without_room_gives_up_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("rmdd.searches.study.TRIES", 3)
    base = base_of(tmp_path)
    told = "clash with the run file, the last with: no such tower; narrow search.space"
    with Study(base, tmp_path / "s", [], lambda run: ["no such tower"]) as study, pytest.raises(ValueError, match=told):
        study.ask()


# -- whole searches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    storage = tmp_path_factory.mktemp("search")
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        load = tasks.load_material
        patch.setattr(tasks, "load_material", lambda *given: opened.append(given[2]) or load(*given))
        found = rmdd.search(tiny(storage, {"distill.lr_image": LR, **BOTH}, trials=5, pruner="asha"), progress=QUIET)
    return found, storage, set(opened)


def test_a_search_leaves_its_table_plots_and_best_run_file(searched):
    found, storage, _ = searched
    rows = json.loads((found.folder / "results.json").read_text())["trials"]
    assert rows == found.table.rows and len(rows) == 5 and not found.failures
    done = [row for row in rows if row["state"] == "complete"]
    assert done and {row["state"] for row in rows} <= {"complete", "pruned"}
    assert found.table.winner["val"] == max(row["val"] for row in done)
    with open(found.folder / "trials.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["distill.lr_image"]) for line in lines] == [row["values"]["distill.lr_image"] for row in rows]
    page = (found.folder / "report.html").read_text()
    assert page.count("<svg") >= 2 and "http" not in page.replace("http-equiv", "")
    assert len(list((storage / "experts").glob("*/"))) == 1, "experts are trained once"
    assert found.folder.parent == storage / "searches"


def test_no_trial_opens_test(searched):
    found, storage, opened = searched
    assert opened == {"train", "val"}
    assert not [p for row in found.table.rows for p in config.Path(row["run"]).glob("students/student*")]
    assert not list(storage.glob("baselines/*"))


def test_the_best_run_file_repeats_its_trial_bit_for_bit(searched, tmp_path):
    found, storage, _ = searched
    best = found.table.winner
    run = config.load(found.folder / "best.yaml", [f"runtime.storage={tmp_path}"])
    again = rmdd.run(run, QUIET)
    there, here = (sorted(root.glob("phases/*/phase-0/set-*")) for root in (storage, tmp_path))
    bits = {(p.parts[-3], p.name): p.read_bytes() for p in there}
    assert len(here) == 3 and all(bits[p.parts[-3], p.name] == p.read_bytes() for p in here)
    assert [v["R@mean"] for v in again.evaluation["selection"]["val"]] == best["curve"]
    text = (found.folder / "trials" / f"{best['number']:03d}" / "run.yaml").read_text()
    assert config.load(yaml.safe_load(text)).hash_of() == run.hash_of()
    assert run_folder(run).name == config.Path(best["run"]).name


def test_a_search_learns_from_an_earlier_one(searched, tmp_path):
    found, storage, _ = searched
    warm = base_of(storage, warm_start=[str(found.folder)], trials=1, sampler="tpe", snapshots=2)
    later = rmdd.search(warm.model_dump(mode="json"), progress=QUIET)
    done = [row for row in found.table.rows if row["state"] == "complete"]
    study = optuna.load_study(study_name=later.folder.name, storage=f"sqlite:///{later.folder}/study.db")
    assert [t.params["distill.lr_image"] for t in study.trials[: len(done)]] == [
        row["values"]["distill.lr_image"] for row in done
    ]
    assert [row["number"] for row in later.table.rows] == [len(done)], "what was learned is no result of this search"
    for wrong, told in (
        ({"evaluate": {**TINY["evaluate"], "epochs": 3}}, "has another `evaluate` section"),
        ({"search": {"space": {"distill.lr_image": LR}, "warm_start": [str(tmp_path)]}}, "no results.json in"),
    ):
        with pytest.raises(config.ConfigError, match=told):
            rmdd.search({**warm.model_dump(mode="json"), **wrong}, progress=QUIET)


def begin(*words):
    command = [sys.executable, "-m", "rmdd", "search", *map(str, words), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, reached):
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_kills_lose_nothing(searched, tmp_path):
    found, _, _ = searched
    file, storage = tmp_path / "run.yaml", tmp_path / "runs"
    raw = tiny(storage, {"distill.lr_image": LR, **BOTH}, trials=5, pruner="asha")
    file.write_text(yaml.safe_dump(raw))
    for kills in (1, 2):
        folder = search_folder(config.load(file))
        process = begin(file) if kills == 1 else begin("--resume", folder)
        wait_for(process, lambda: len(list(folder.glob("trials/*/run.yaml"))) > 2 * kills - 1)  # noqa: B023
        wait_for(process, lambda: len(list(storage.glob("phases/*/phase-0/set-000001*"))) > 2 * kills - 1)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder}/study.db")
        ended = {t.number: (t.values, t.datetime_complete) for t in study.trials if t.state.is_finished()}
        assert ended
    done = CliRunner().invoke(cli.app, ["resume", str(folder), "--json", "--quiet"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["trials"]
    keep = ("number", "state", "values", "curve", "val")
    assert [{k: row[k] for k in keep} for row in rows] == [{k: row[k] for k in keep} for row in found.table.rows]
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder}/study.db")
    assert ended.items() <= {t.number: (t.values, t.datetime_complete) for t in study.trials}.items()


def test_two_drivers_share_the_trials_of_one_database(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny(tmp_path / "runs", trials=6, storage=f"sqlite:///{tmp_path}/shared.db")))
    drivers = [begin(file), begin(file)]
    ends = [driver.communicate(timeout=180) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], ends
    folder = search_folder(config.load(file))
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{tmp_path}/shared.db")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 6
    assert not (folder / "study.db").exists()


def test_more_trials_are_added_to_a_search_and_nothing_else_changes(searched):
    found, _, _ = searched
    before = found.table.rows
    words = ["search", "--resume", str(found.folder), "--json", "--quiet"]
    other = CliRunner().invoke(cli.app, [*words, "--set", "distill.steps=3"])
    assert other.exit_code == 2 and "--set changes what the search is" in other.stderr
    more = CliRunner().invoke(cli.app, [*words, "--set", "search.trials=6"])
    assert more.exit_code == 0, more.stderr
    rows = json.loads(more.stdout)["trials"]
    assert rows[:5] == before and len(rows) == 6 and begun_in(found.folder).search.trials == 6


def test_trials_may_differ_in_their_experts(tmp_path):
    space = {"experts.lr_image": {"choice": [0.1, 0.2]}, "model.width": {"choice": [4, 8]}}
    found = rmdd.search(tiny(tmp_path, space, sampler="grid"), progress=QUIET)
    assert [row["state"] for row in found.table.rows] == ["complete"] * 4
    assert len(list((tmp_path / "experts").glob("*/expert-000/expert.json"))) == 4


def test_experts_that_keep_too_little_for_the_space_are_told():
    raw = tiny("runs", {"distill.phases.0.endpoint": {"int": [1, 2]}})
    raw["experts"]["keep"] = "endpoints"
    raw["experts"]["epochs"] = 3
    with pytest.raises(config.ConfigError, match=r"endpoint: at 2: .*set experts.keep: all, so that they are trained"):
        check(config.load(raw))


def test_resume_needs_a_search(tmp_path):
    for words, told in (
        ([], "give CONFIG"),
        (["--resume", str(tmp_path)], "no search.json in it"),
        (["demo", "--resume", str(tmp_path)], "leave 'demo' out"),
    ):
        done = CliRunner().invoke(cli.app, ["search", *words])
        assert done.exit_code == 2 and told in done.stderr
