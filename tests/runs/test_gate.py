"""Planned chains: their plan, phases that the gate keeps or drops on val, kills and resumes."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import go, go_until_killed

import rmdd
from rmdd import config
from rmdd.artefact.distilled import DistilledSet
from rmdd.comparisons.compare import prepare_comparison
from rmdd.core.storage import run_folder
from rmdd.distill.guard import PhaseDiverged
from rmdd.distill.trajectory.planning import with_explicit_phases, with_plan
from rmdd.evaluate.students import Diverged
from rmdd.execution.tasks import Hooks
from rmdd.runs import path_starts, students
from rmdd.runs.gate import ORDERS
from rmdd.runs.preflight import examine
from rmdd.runs.tasks import DistillPhase, MakePlan
from rmdd.searches.formats import verify
from rmdd.searches.trial import Trial

CHAIN = tiny.changed(
    data={"scenes": {"val": 20}},
    experts={"num": 2, "epochs": 3, "lr_image": 0.3, "lr_text": 0.3},
    distill={
        "phases": "auto",
        "reuse_graphs": 2,  # runs of this size are faster with kept graphs
        "plan": {"iterations": 6, "min_iterations": 2, "min_pairs": 4, "max_phases": 2, "experts": 1, "draws": 1},
    },
    evaluate={"epochs": 1, "students": 1, "baseline_draws": 1},
)
THREE = ("distill.budget=13", "distill.plan.max_phases=3")
RISING = {"1of2": 10.0, "2of2": 11.0, "1of3": 10.0, "2of3": 11.0, "3of3-cumulative": 12.0, "3of3-union": 13.0}
FLAT = {"1of2": 10.0, "2of2-cumulative": 10.0, "2of2-union": 9.0}
ONE = ("distill.plan.chain=false", "distill.plan.max_phases=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Fixture: a storage folder with trained experts of the tiny run."""
    storage = tmp_path_factory.mktemp("trained")
    go(load(storage), "experts")
    return storage


def score_at_gates(monkeypatch: pytest.MonkeyPatch, scores: Mapping[str, float]) -> list[str]:
    """Let students at gates have these val scores; return a list to which the name of each trained one is added."""
    original, names = students.train_and_score, []

    def scored(job, *arguments, **named):
        record = original(job, *arguments, **named)
        if job.gate:
            names.append(job.name)
            record["val"]["R@mean"] = scores.get(job.gate, scores.get(job.gate.partition("-")[0]))
        return record

    monkeypatch.setattr(students, "train_and_score", scored)
    return names


def load(storage: Path, *overrides: str) -> config.Run:
    return config.load(tiny.stored(storage, CHAIN), overrides)


def copied(trained: Path, storage: Path) -> Path:
    return Path(shutil.copytree(trained, storage))


def plan_of(run: config.Run) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run_folder(run) / "plan.json").read_text())
    return {name: value for name, value in plan.items() if name not in ("key", "seconds")}


def sets_of(storage: Path) -> dict[str, bytes]:
    return {str(f.relative_to(storage)): f.read_bytes() for f in storage.glob("phases/*/phase-*/set-*.safetensors")}


def test_phases_of_a_chain_share_the_first_endpoint_and_its_starts(trained, tmp_path):
    run, one = load(copied(trained, tmp_path / "runs"), *THREE), load(tmp_path / "runs", *ONE)
    go(run, "plan")
    go(one, "plan")
    plan, first = plan_of(run), plan_of(one)["phases"][0]
    epochs = {name: first[name] for name in ("start", "stop", "endpoint")}
    sizes = [{"pairs": 4, "iterations": 2}] * 3
    assert [{n: p[n] for n in (*sizes[0], *epochs)} for p in plan["phases"]] == [s | epochs for s in sizes]
    assert (plan["path_start"], plan["path_order"]) == ("student", "cumulative")
    assert "every phase ends at epoch" in plan["reasons"][1] and "start at students" in plan["reasons"][2]
    assert (run_folder(run) / "plan.svg").read_text().count("phase 0: endpoint") <= 1
    listed = config.load(run_folder(run) / "planned.yaml")
    assert listed.distill.plan.kind == "stated" and listed.distill.path_start == "student"
    assert len(listed.distill.phases) == 3 and listed.evaluate.order == "cumulative"


def test_a_plan_of_one_phase_is_that_of_independent_phases(trained, tmp_path):
    chained, independent = (
        load(copied(trained, tmp_path / "runs"), "distill.plan.max_phases=1"),
        load(tmp_path / "runs", *ONE),
    )
    for run in (chained, independent):
        go(run, "plan")
    assert plan_of(chained) == plan_of(independent) and len(plan_of(chained)["phases"]) == 1


@pytest.mark.parametrize("order", ["sequence", "union"])
def test_a_run_keeps_its_hash_when_a_chain_is_planned(order):
    phase = {"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 3}
    plan = {"phases": [phase] * 3, "path_start": "student", "path_order": "cumulative", "order": "cumulative"}
    run = config.load(CHAIN, [f"evaluate.order={order}", "evaluate.between=masked", "distill.path_epochs=3"])
    planned = with_plan(run, plan)
    assert planned.hash_of() == run.hash_of()
    assert (planned.distill.path_start, planned.evaluate.order) == ("student", "cumulative")
    others = ["evaluate.between=zeros", "distill.path_epochs=4", "distill.plan.chain=false", "distill.batch=2"]
    for other in others:
        assert config.load(run.model_dump(), ["distill.path_start=student", other]).hash_of() != run.hash_of(), other
    with pytest.raises(config.ConfigError, match=r"remove distill.path_lag, or set distill.plan.chain: false"):
        config.load(CHAIN, ["distill.path_start=student", "distill.path_lag=2"])
    with pytest.raises(config.ConfigError, match=r"path_order has no effect on planned phases.*; remove"):
        config.load(CHAIN, ["distill.path_order=union"])


@pytest.mark.parametrize("start", ["theta_0", "student"])
def test_a_planned_chain_that_ends_as_one_phase_can_be_loaded_from_its_file(start):
    run = config.load(CHAIN, ["distill.path_epochs=3", f"distill.path_start={start}"])
    planned = with_plan(run, {"phases": [{"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 3}]})
    listed = config.load(with_explicit_phases(planned).model_dump(mode="json"))
    assert (listed.distill.path_start, listed.distill.path_epochs) == ("theta_0", None)


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory):
    """Fixture: a storage with a finished run of three phases that raise the val score, most of all by `union`."""
    storage = copied(trained, tmp_path_factory.mktemp("kept") / "runs")
    with pytest.MonkeyPatch.context() as patch:
        score_at_gates(patch, RISING)
        go(load(storage, *THREE))
    return storage


def test_phases_that_raise_the_val_score_are_kept_and_the_better_order_is_used(kept, trained, tmp_path):
    run = load(kept, *THREE)
    folder, plan = run_folder(run), plan_of(run)
    assert [d["kept"] for d in plan["decisions"]] == [True] * 3 and plan["order"] == "union"
    assert "phase 2 is kept: students of the first 3 subsets reach 13.00 on val" in plan["decisions"][2]["reason"]
    assert DistilledSet.load(folder / "set").order == "union"
    assert plan["decisions"][2]["reason"] in (folder / "report.html").read_text()
    assert {f.name for f in folder.glob("students/select-*")} == {
        f"select-{n}of3-{order}-00{i}.json" for n in (1, 2, 3) for order in ORDERS[: 1 if n == 1 else 2] for i in (0, 1)
    }, "no student at a gate has scores on test"
    assert verify(str(kept)).faults == [] and examine(run)["phases"][1]["done"]
    listed = config.load(folder / "planned.yaml", [f"runtime.storage={copied(trained, tmp_path / 'listed')}"])
    assert listed.evaluate.order == "union" and listed.distill.path_order == "cumulative"
    go(listed, "export")
    for file in (folder / "set").glob("*.safetensors"):
        assert (run_folder(listed) / "set" / file.name).read_bytes() == file.read_bytes()
    assert DistilledSet.load(run_folder(listed) / "set").order == "union"


def test_a_finished_run_trains_nothing_again(kept, monkeypatch):
    def stamps():
        folder = run_folder(load(kept, *THREE))
        return {f.name: f.stat().st_mtime_ns for f in (*folder.glob("plan*"), *folder.glob("students/*"))}

    before, names = stamps(), score_at_gates(monkeypatch, RISING)
    go(load(kept, *THREE))
    assert names == [] and stamps() == before


def fail_in_phase_1(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    original = DistillPhase.__call__

    def failing(self, item, hooks):
        if item.number == 1:
            raise error
        return original(self, item, hooks)

    monkeypatch.setattr(DistillPhase, "__call__", failing)


def diverging(*arguments):
    raise Diverged("student 0: loss nan")


@pytest.mark.parametrize("diverges", [None, "phase", "path start"])
def test_a_phase_that_does_not_help_gives_its_pairs_and_updates_to_the_others(trained, tmp_path, monkeypatch, diverges):
    score_at_gates(monkeypatch, RISING if diverges else FLAT)
    if diverges == "phase":
        message = "phase 1, iteration 2: the loss is nan; 3 rollbacks did not help. /runs/good.safetensors holds one"
        fail_in_phase_1(monkeypatch, PhaseDiverged(message))
    if diverges == "path start":
        monkeypatch.setattr(path_starts, "train_student", diverging)
    run, one = load(copied(trained, tmp_path / "runs")), load(copied(trained, tmp_path / "one"), *ONE)
    go(run, "distill")
    go(one, "distill")
    plan, alone = plan_of(run), plan_of(one)
    decisions = plan.pop("decisions")
    reasons, alone_reasons = plan.pop("reasons"), alone.pop("reasons")
    assert reasons[1:] == alone_reasons[1:]
    assert plan == alone, "the plan is that of a single phase"
    assert [(d["phases"], d["subsets"], d["kept"]) for d in decisions] == [(2, 1, True), (2, 2, False)]
    last_words = {
        None: "not above the 10.00 without it",
        "phase": "it diverged: phase 1, iteration 2: the loss is nan",
        "path start": "the paths of phase 1 should start diverged: student 0: loss nan",
    }
    assert decisions[1]["reason"].endswith(last_words[diverges])
    assert decisions[1]["reason"].startswith("phase 1 is dropped")
    assert "the gate allowed at most 1" in reasons[0] and "gate" not in alone_reasons[0]
    assert run_folder(run) == run_folder(load(tmp_path / "runs"))
    last = {Path(name).name: data for name, data in sets_of(tmp_path / "one").items()}
    assert last.keys() == {"set-000006.safetensors"}
    found = {
        Path(n).name: data for n, data in sets_of(tmp_path / "runs").items() if n.endswith("set-000006.safetensors")
    }
    assert found == last
    assert len(examine(run)["phases"]) == 1 and examine(run)["phases"][0]["done"]
    listed = config.load(run_folder(run) / "planned.yaml")
    assert len(listed.distill.phases) == 1 and listed.distill.path_start == "theta_0"


def test_an_error_that_is_no_divergence_stops_the_run(trained, tmp_path, monkeypatch):
    score_at_gates(monkeypatch, RISING)
    fail_in_phase_1(monkeypatch, ZeroDivisionError("float division by zero"))
    with pytest.raises(ZeroDivisionError):
        go(load(copied(trained, tmp_path / "runs")), "distill")


def test_a_comparison_waits_until_the_gate_has_decided(trained, tmp_path, monkeypatch):
    score_at_gates(monkeypatch, RISING)
    run = load(copied(trained, tmp_path / "runs"))
    go_until_killed(run, monkeypatch, DistillPhase, 2, "distill")
    with pytest.raises(config.ConfigError, match="phases that may still be dropped; run it first"):
        prepare_comparison(["random"], run, [])
    go(run, "distill")
    assert prepare_comparison(["random"], run, []).run.evaluate.order == plan_of(run)["order"]


SCORES = {"1of3": 10.0, "2of3": 12.0, "3of3": 11.0, "1of2": 10.5, "2of2-cumulative": 12.5, "2of2-union": 12.0}


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory):
    """Fixture: a storage with a distilled run of three planned phases, of which the last is dropped."""
    storage = copied(trained, tmp_path_factory.mktemp("unbroken") / "runs")
    with pytest.MonkeyPatch.context() as patch:
        score_at_gates(patch, SCORES)
        go(load(storage, *THREE), "distill")
    return storage


def test_a_chain_of_three_continues_with_two(unbroken):
    plan = plan_of(load(unbroken, *THREE))
    steps = [(d["phases"], d["subsets"], d["kept"], d["score"]) for d in plan["decisions"]]
    assert steps == [(3, 1, True, 10), (3, 2, True, 12), (3, 3, False, 11), (2, 1, True, 10.5), (2, 2, True, 12.5)]
    assert plan["order"] == "cumulative" and [p["pairs"] for p in plan["phases"]] == [6, 6]
    assert plan["path_order"] is None and [p["iterations"] for p in plan["phases"]] == [3, 3]


@pytest.mark.parametrize(("task", "calls"), [(DistillPhase, 2), (students.TrainStudent, 4), (MakePlan, 2)])
def test_a_run_killed_at_a_gate_resumes_with_equal_bits(unbroken, trained, tmp_path, monkeypatch, task, calls):
    """Kill a run after its first gate, within its second one, and after a phase was dropped; then resume it."""
    names = score_at_gates(monkeypatch, SCORES)
    run = load(copied(trained, tmp_path / "runs"), *THREE)
    go_until_killed(run, monkeypatch, task, calls, "distill")
    go(run, "distill")
    assert sets_of(tmp_path / "runs") == sets_of(unbroken)
    assert plan_of(run) == plan_of(load(unbroken, *THREE))
    assert len(names) == len(set(names)) == 2 * (1 + 2 + 2 + 1 + 2), "no student is trained twice"


def test_another_machine_continues_after_a_gate_in_the_cloud(unbroken, tmp_path, monkeypatch):
    names, original, count = score_at_gates(monkeypatch, SCORES), students.TrainStudent.__call__, 0

    def dying(self, item, hooks):
        nonlocal count
        count += 1
        if count == 12:  # the first student of the plan with two phases
            raise KeyboardInterrupt
        return original(self, item, hooks)

    monkeypatch.setattr(students.TrainStudent, "__call__", dying)
    for machine in ("one", "other"):
        storage = [f"runtime.storage=file://{tmp_path}/bucket", f"runtime.scratch={tmp_path / machine}"]
        run = load(tmp_path, *THREE, *storage)
        with pytest.raises(KeyboardInterrupt) if machine == "one" else contextlib.nullcontext():
            go(run, "distill")
    folder = tmp_path / "bucket" / run_folder(run).name
    assert json.loads((folder / "plan.json").read_text())["decisions"] == plan_of(load(unbroken, *THREE))["decisions"]
    assert sets_of(tmp_path / "bucket") == sets_of(unbroken) and len(names) == len(set(names)) == 16


def test_a_run_of_a_sweep_uses_the_same_gate(unbroken, trained, tmp_path, monkeypatch):
    score_at_gates(monkeypatch, SCORES)
    raw = tiny.stored(copied(trained, tmp_path / "runs"), CHAIN)
    assert not rmdd.sweep(raw, {"distill.plan.max_phases": [3]}, THREE[:1], progress=tiny.QUIET).failed
    run, alone = load(tmp_path / "runs", *THREE), load(unbroken, *THREE)
    assert plan_of(run) == plan_of(alone) and sets_of(tmp_path / "runs") == sets_of(unbroken)


def test_a_trial_of_a_search_uses_the_same_gate(trained, tmp_path, monkeypatch):
    names = score_at_gates(monkeypatch, FLAT)
    run = load(copied(trained, tmp_path / "runs"), "distill.snapshots=2")
    trial = Trial(run)
    rungs = [trial.run_rung(Hooks()) for _ in range(2)]
    assert [rung["done"] for rung in rungs] == [False, True] and len(plan_of(run)["phases"]) == 1
    assert rungs[1]["cost"]["iterations"] == 3 + 3 + 6, "the dropped phases count"
    again = Trial(run)
    assert [again.run_rung(Hooks())["val"] for _ in range(2)] == [rung["val"] for rung in rungs]
    assert len(names) == 6


def test_a_check_counts_the_students_at_the_gates_and_needs_no_experts(tmp_path):
    facts = {name: examine(load(tmp_path, *sets)) for name, sets in {"chain": (), "other": ONE[:1]}.items()}
    phases = {name: [p["pairs"] for p in fact["phases"]] for name, fact in facts.items()}
    assert phases == {"chain": [4, 4], "other": [4, 4]}
    chain, other = (facts[name]["time"]["operations"] for name in ("chain", "other"))
    assert chain["evaluate"] > other["evaluate"] and chain["distill"] > other["distill"], "path starts are counted too"
    assert any("a phase that does not raise the val score is dropped" in r for r in facts["chain"]["remarks"])
    pruned = [examine(load(tmp_path, "distill.snapshots=2", "search.pruner=asha", *sets)) for sets in ((), ONE[:1])]
    assert ["saves no updates" in " ".join(facts["remarks"]) for facts in pruned] == [True, False]
    assert not list(tmp_path.iterdir())
