"""Test search spaces and messages about their mistakes, samplers, pruners, and the study that stores trials."""

import itertools
import json
import math
import statistics

import optuna
import pytest
import yaml
from tiny_search import BOTH, LR, base_of, searched
from typer.testing import CliRunner

from rmdd import config
from rmdd.cli import app as cli
from rmdd.execution.trials import sequential_trials
from rmdd.searches import check
from rmdd.searches.loading import TrialLoader
from rmdd.searches.samplers import pruner_of, sampler_of, trials_of
from rmdd.searches.space import Space, overrides
from rmdd.searches.study import Study
from rmdd.searches.warm_start import EarlierTrial

# -- spaces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "search.space is empty"),
        ({"distill.lr_imgae": LR}, "search.space.distill.lr_imgae: at 0.1: distill.lr_imgae: unknown key"),
        ({"distill.momentum": {"uniform": [0.5, 1.0]}}, "search.space.distill.momentum: at 1.0: .*less than 1"),
        ({"distill.steps": {"uniform": [1, 8]}}, "search.space.distill.steps: at .*valid integer"),
        ({"distill.estimator": {"choice": ["exact", "magic"]}}, "search.space.distill.estimator: at magic"),
        ({"distill.phases.1.pairs": {"int": [2, 4]}}, "search.space.distill.phases.1.pairs: at 2: .*no entry '1'"),
        ({"distill.phases.0.endpoint": {"int": [1, 9]}}, "distill.phases.0.endpoint: at 9: .*need expert epoch 9"),
        ({"distill.phases.0.pairs": {"int": [4, 400]}}, "search.space.distill.phases.0.pairs: at 400: "),
        (
            {"distill.similarity.kind": BOTH["distill.similarity.kind"]}
            | {"distill.similarity.rank": {"int": [1, 2], "when": {"distill.similarity.kind": ["full", "diagonal"]}}},
            "rank.when: distill.similarity.kind is never diagonal",
        ),
        (
            {"distill.steps": {"int": [1, 4]}, "distill.ema": {"choice": [0, 1], "when": {"distill.steps": 9}}},
            "never 9",
        ),
        (
            {"distill.phases.0.pairs": {"int": [3, 4]}, "distill.phases": {"choice": ["auto"]}},
            "phases.0.pairs: this is a part of distill.phases",
        ),
        ({"distill.plan.reach": {"uniform": [0.5, 0.9]}}, "plan.reach: the phases are listed.*distill.phases: auto"),
        (
            {"evaluate.epochs": {"int": [1, 4]}},
            "search.space.evaluate.epochs: trials may differ only in model, experts",
        ),
    ],
)
def test_values_that_the_run_file_rejects_are_reported_by_field(space, message):
    with pytest.raises(config.ConfigError, match=message):
        base = base_of(space={"distill.lr_image": LR})
        check(base.model_copy(update={"search": config.Search(space=space)}))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"space": {"distill.lr_image": {}}}, "search.space.distill.lr_image: needs exactly one of uniform"),
        ({"space": {"distill.lr_image": {**LR, "choice": [1]}}}, "found loguniform and choice"),
        ({"space": {"distill.lr_image": {"loguniform": [0, 1]}}}, "needs two numbers above 0"),
        ({"space": {"distill.lr_image": {"uniform": [2, 1]}}}, "the lower one first"),
        ({"space": {"distill.lr_image": {"uniform": ["a", 1]}}}, "search.space.distill.lr_image.uniform.0"),
        ({"space": {"distill.lr_image": {**LR, "step": 1}}}, "step works only with uniform and int"),
        ({"space": {"distill.steps": {"int": [1, 4], "step": 0.5}}}, "must be a whole number"),
        ({"space": {"distill.steps": {"int": [1, 4], "step": 9}}}, "is larger than the range of int"),
        ({"space": {"distill.ema": {"choice": [0, 0]}}}, "different values"),
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
        ({"sampler": "cmaes", "cost": "seconds"}, "cmaes supports only one objective"),
        ({"pruner": "asha", "cost": "seconds"}, "ignores search.cost"),
        ({"pruner": "asha", "snapshots": 1}, "distill.snapshots is 1"),
        ({"storage": "mysql://me:secret@host/db"}, "search.storage contains a password"),
    ],
)
def test_an_invalid_search_section_is_refused(rule, message):
    with pytest.raises(config.ConfigError, match=message):
        base_of(**rule)


def test_all_mistakes_are_reported_together(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(searched(tmp_path / "runs", {"distill.lr": LR, "distill.ema": {"uniform": [0, 1]}})))
    done = CliRunner().invoke(cli.app, ["search", str(file)])
    assert done.exit_code == 2 and "2 mistake(s)" in done.stderr and not (tmp_path / "runs").exists()
    assert "search.space.distill.lr: " in done.stderr and "search.space.distill.ema: at 1.0" in done.stderr


def test_an_end_that_is_valid_with_some_values_of_another_field_is_accepted():
    space = {"distill.phases.0.pairs": {"int": [4, 6]}, "distill.batch": {"int": [2, 6]}}
    check(base_of(space=space).model_copy(update={"distill": base_of().distill.model_copy(update={"budget": 20})}))


@pytest.mark.parametrize("value", [1e-05, 0.1 + 0.2, 1e22, 7, True, None, "full", "0.1", [1.5, 2], {"a": 1e-7}])
def test_overrides_keep_the_exact_value_and_type(value):
    raw, mistakes = {}, []
    for override in overrides({"distill.options": {"x": value}, "distill.ema": value}):
        config.apply(raw, override, {}, mistakes)
    assert raw == {"distill": {"options": {"x": value}, "ema": value}} and mistakes == []


def test_conditional_fields_are_drawn_only_if_their_condition_holds():
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


def test_a_grid_can_hold_none_as_a_value():
    search = config.Search(space={"distill.temperature": {"choice": [None, 0.1]}}, sampler="grid")
    assert Space(search).grid() == [{"distill.temperature": None}, {"distill.temperature": 0.1}]


def test_choices_may_be_lists():
    phases = [
        [{"pairs": 4, "stop": 1, "endpoint": 1, "iterations": 3}],
        [{"pairs": 3, "stop": 1, "endpoint": 1, "iterations": n} for n in (1, 2)],
    ]
    base = base_of(space={"distill.phases": {"choice": phases}})
    check(base)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    runs = [TrialLoader(base).load(Space(base.search).suggest(study.ask())) for _ in range(8)]
    assert {len(run.distill.phases) for run in runs} == {1, 2}
    assert runs[0].search == config.Search(), "the section `search` of a trial's run must be empty"


# -- samplers, pruners and the study ---------------------------------------------------------------------------------

RATES = [f"distill.lr_{part}" for part in ("image", "text", "similarity", "lr")]
PLANE = {field: {"loguniform": [0.01, 100]} for field in RATES}


def bowl(values):
    """Score learning rates: the best score, 0, is reached when each rate is 5. The first rate weighs the most."""
    return -sum((math.log10(values[field] / 5)) ** 2 / (1 + i) for i, field in enumerate(RATES) if field in values)


def best_of(sampler, seed, trials=30):
    search = config.Search(space=PLANE, sampler=sampler, startup=8)
    study = optuna.create_study(sampler=sampler_of(search, Space(search), seed), direction="maximize")
    study.optimize(lambda trial: bowl(Space(search).suggest(trial)), n_trials=trials)
    return study.best_value


def test_tpe_beats_random_at_equal_trials():
    scores = {name: [best_of(name, seed) for seed in range(5)] for name in ("tpe", "random", "cmaes", "nsgaii")}
    mean = {name: statistics.fmean(values) for name, values in scores.items()}
    assert mean["tpe"] > mean["random"] and mean["cmaes"] > mean["random"], scores
    assert statistics.median(scores["tpe"]) > statistics.median(scores["random"]), scores


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsgaii", "grid"])
def test_a_sampler_that_is_created_again_draws_the_same_values(sampler, tmp_path):
    space = {**PLANE, "distill.lr_image": {"choice": [0.1, 1, 10]}} if sampler == "tpe" else PLANE
    if sampler == "grid":
        space = {"distill.lr_image": {"uniform": [1, 8], "step": 1}, "distill.lr_text": {"choice": [1, 2]}}
    search = config.Search(space=space, sampler=sampler, startup=4)

    def study(name, storage):
        return optuna.create_study(
            study_name=name,
            sampler=sampler_of(search, Space(search), 7),
            storage=storage,
            direction="maximize",
            load_if_exists=True,
        )

    def draw(study):
        trial = study.ask()
        values = Space(search).suggest(trial)
        study.tell(trial, bowl(values))
        return values

    memory = optuna.storages.InMemoryStorage()
    unbroken_study = study("unbroken", memory)
    unbroken = [draw(unbroken_study) for _ in range(14)]
    broken = [draw(study("broken", memory)) for _ in range(14)]
    assert unbroken == broken and len({json.dumps(v) for v in unbroken}) > 7


def run_study(base, folder, value):
    """Run a search whose trials score `value(run, step)` on val at snapshot `step`, without distilling anything."""

    class FakeTrial:
        def __init__(self, text):
            self.run, self.step = config.Run.model_validate_json(text), 0

        def run_rung(self, hooks):
            self.step += 1
            val = value(self.run, self.step)
            cost = {"iterations": float(self.run.distill.steps), "seconds": 1.0}
            return {"step": self.step, "val": val, "done": self.step == 3, "value": val, "cost": cost}

    with Study(TrialLoader(base), folder, []) as study:
        sequential_trials(study, FakeTrial)
        return study


def test_a_grid_tries_every_combination_once_and_skips_those_that_clash(tmp_path):
    space = {"distill.batch": {"int": [2, 5]}, "distill.estimator": {"choice": ["exact", "first_order"]}}
    study = run_study(base_of(tmp_path, space, sampler="grid", trials=99), tmp_path / "s", lambda run, step: 1.0)
    tried = [t for t in trials_of(study.study) if t.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(t.params["distill.batch"] for t in tried) == [2, 2, 3, 3, 4, 4]
    clash = [t for t in trials_of(study.study) if t.user_attrs.get("infeasible")]
    assert len(clash) == 2 and all("distill.batch 5 is larger" in t.user_attrs["error"] for t in clash)


@pytest.mark.parametrize("own", [2.5, 1e-6])
def test_the_first_trial_has_the_values_of_the_run_file(tmp_path, own):
    def lr(study):
        return [t.params["distill.lr_image"] for t in trials_of(study.study)]

    space = {"distill.lr_image": LR}
    raw = {**searched(tmp_path, space, trials=3)}
    raw["distill"] = {**raw["distill"], "lr_image": own}
    base = config.load(raw)
    scores = lr(run_study(base, tmp_path / "s", lambda run, step: run.distill.lr_image))
    assert len(scores) == 3 and (scores[0] == own) == (own == 2.5)
    without = base.model_copy(update={"search": base.search.model_copy(update={"base": False})})
    assert own not in lr(run_study(without, tmp_path / "t", lambda run, step: run.distill.lr_image))


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_pruners_stop_poor_trials_early(tmp_path, pruner):
    base = base_of(tmp_path, pruner=pruner, trials=12, sampler="random", reduction=2)
    study = run_study(base, tmp_path / "s", lambda run, step: math.log10(run.distill.lr_image) * step)
    done = [t for t in trials_of(study.study) if t.state == optuna.trial.TrialState.COMPLETE]
    stopped = [t for t in trials_of(study.study) if t.state == optuna.trial.TrialState.PRUNED]
    assert len(done) + len(stopped) == 12 and len(stopped) >= 3
    assert max(t.params["distill.lr_image"] for t in trials_of(study.study)) in [
        t.params["distill.lr_image"] for t in done
    ]
    assert all(len(t.user_attrs["curve"]) < 3 for t in stopped) and pruner_of(base.search) is not None


def test_two_objectives_give_a_pareto_front(tmp_path):
    from rmdd.searches.table import table_of

    base = base_of(tmp_path, {"distill.steps": {"int": [1, 8]}}, cost="iterations", sampler="grid")
    study = run_study(base, tmp_path / "s", lambda run, step: float(min(run.distill.steps, 5)))
    table = table_of(TrialLoader(base), study.study)
    front = [row for row in table.rows if row["number"] in table.best]
    assert [row["values"]["distill.steps"] for row in front] == [1, 2, 3, 4, 5]
    assert table.winner["values"] == {"distill.steps": 5}


def test_a_trial_that_fails_by_chance_stays_open_for_the_next_driver(tmp_path):
    base = base_of(tmp_path, {"distill.steps": {"int": [1, 3]}}, sampler="grid")
    calls = itertools.count()

    def value(run, step):
        if run.distill.steps == 2 and next(calls) == 0:
            raise OSError("the disk is offline")
        return float(run.distill.steps)

    first = run_study(base, tmp_path / "s", value)
    assert list(first.failures) == ["trial 001"] and "the disk is offline" in first.failures["trial 001"]
    second = run_study(base, tmp_path / "s", value)
    assert second.failures == {} and [t.values for t in trials_of(second.study)] == [[1.0], [2.0], [3.0]]


def test_earlier_trials_are_copied_once_even_after_a_kill(tmp_path, monkeypatch):
    base = base_of(tmp_path)
    earlier = [EarlierTrial(f"earlier#{n}", {"distill.lr_image": 1.0 + n}, float(n), {}) for n in range(3)]
    with monkeypatch.context() as patch:
        add, calls = optuna.Study.add_trial, itertools.count()
        patch.setattr(optuna.Study, "add_trial", lambda self, t: add(self, t) if next(calls) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Study(TrialLoader(base), tmp_path / "s", earlier)
    with Study(TrialLoader(base), tmp_path / "s", earlier) as study:
        assert [t.params["distill.lr_image"] for t in study.study.trials] == [1.0, 2.0, 3.0]
        assert trials_of(study.study) == []


def test_an_open_trial_is_resumed_in_a_storage_that_has_moved(tmp_path):
    with Study(TrialLoader(base_of(tmp_path / "old")), tmp_path / "old" / "s", []) as study:
        name, _ = study.ask()
    (tmp_path / "old").rename(tmp_path / "new")
    with Study(TrialLoader(base_of(tmp_path / "new")), tmp_path / "new" / "s", []) as study:
        again, text = study.ask()
        assert again == name and config.Run.model_validate_json(text).runtime.storage == str(tmp_path / "new")
        assert study.ask()[0] != name


def test_the_progress_shows_a_failed_trial_as_ended(tmp_path):
    shown = {}
    with Study(TrialLoader(base_of(tmp_path, trials=1)), tmp_path / "s", [], show=shown.__setitem__) as study:
        name, _ = study.ask()
        study.tell(name, {"step": 1, "val": 1.0, "done": False})
        assert shown[name]["done"] == 1
        study.tell(name, {"done": True, "error": "no such tower"})
    assert shown[name]["done"] == math.inf


def test_a_search_gives_up_if_all_draws_clash_with_the_run_file(tmp_path, monkeypatch):
    monkeypatch.setattr("rmdd.searches.study.TRIES", 3)
    base = base_of(tmp_path)
    message = "clash with the run file, the last one with: no such tower; narrow search.space"
    loader = TrialLoader(base)

    def without_tower(values):
        raise config.ConfigError(["no such tower"], "run")

    monkeypatch.setattr(loader, "checked", without_tower)
    with Study(loader, tmp_path / "s", []) as study, pytest.raises(ValueError, match=message):
        study.ask()
