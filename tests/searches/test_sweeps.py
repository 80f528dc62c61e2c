"""Test sweeps: shared results are computed once, a failed run stops no other run, a killed sweep resumes."""

import csv
import io
import json
import os
import signal
import statistics
import time

import pytest
import yaml
from processes import Rmdd, done
from rich.console import Console
from tiny import QUIET
from tiny_search import METHODS
from tiny_search import swept as raw_of
from typer.testing import CliRunner

import rmdd
from rmdd import config
from rmdd.cli import app as cli
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.distill.loop import finished
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.scheduler import SweepScheduler
from rmdd.execution.tasks import Interrupted
from rmdd.runs.items import TaskItem
from rmdd.runs.paths import RunPaths
from rmdd.runs.tasks import DistillPhase
from rmdd.searches.formats import verify
from rmdd.searches.sweeps import members, members_in, read_over, run_all, sweep_folder


def stamps(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def log():
    """Fixture: what the sweep of the fixture `swept` printed."""
    return io.StringIO()


@pytest.fixture(scope="module")
def swept(tmp_path_factory, log):
    storage = tmp_path_factory.mktemp("sweep")
    over = {"distill.method": ["ptm_st", "lors"], "distill.seed": [0, 1]}
    return rmdd.sweep(raw_of(storage), over, METHODS, progress=Progress(console=Console(file=log, width=500))), storage


def test_every_combination_is_run_and_shares_what_it_can(swept):
    result, storage = swept
    assert [tuple(row["settings"].values()) for row in result.runs] == [
        ("ptm_st", 0),
        ("ptm_st", 1),
        ("lors", 0),
        ("lors", 1),
    ]
    assert not result.failed and len({row["folder"] for row in result.runs}) == 4
    assert [len(list((storage / part).glob("[!.]*/"))) for part in ("data", "experts", "phases")] == [1, 1, 4]
    assert all((storage / row["folder"] / "report.html").is_file() for row in result.runs)


def test_lines_about_shared_steps_are_printed_once(swept, log):
    result, _ = swept
    lines = log.getvalue().splitlines()
    assert len(result.runs) == 4
    assert sum("data: train" in line for line in lines) == sum("experts: 1 in" in line for line in lines) == 1
    assert "distill.method=ptm_st distill.seed=0: experts: 1 to do" in lines


def test_the_table_has_a_row_per_run_and_the_spread_over_seeds(swept):
    result, _ = swept
    for row in result.runs:
        table = json.loads((config.Path(row["folder"]) / "evaluation.json").read_text())["table"][row["method"]]
        assert row["test_last"] == table["test_last"]["R@mean"] and row["val"]["n"] == 2
    assert [group["settings"] for group in result.groups] == [{"distill.method": "ptm_st"}, {"distill.method": "lors"}]
    means = [row["test_last"]["mean"] for row in result.runs[:2]]
    spread = {"mean": statistics.fmean(means), "std": statistics.stdev(means), "n": 2}
    assert result.groups[0]["test_last"] == pytest.approx(spread)
    assert json.loads((result.folder / "results.json").read_text())["runs"] == result.runs
    with open(result.folder / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["distill.method"] for line in lines] == ["ptm_st", "ptm_st", "lors", "lors"]
    assert float(lines[3]["test_last_mean"]) == result.runs[3]["test_last"]["mean"] and lines[3]["error"] == ""


def test_a_run_of_a_sweep_is_byte_identical_to_the_same_run_alone(swept, tmp_path):
    result, storage = swept
    alone = config.load(raw_of(tmp_path), [*METHODS, "distill.method=lors", "distill.seed=1"])
    rmdd.run(alone, progress=QUIET)
    assert run_folder(alone).name == config.Path(result.runs[3]["folder"]).name
    sets = [sorted(root.glob("phases/*/phase-0/set-*")) for root in (tmp_path, storage)]
    assert sets[0][0].read_bytes() in [path.read_bytes() for path in sets[1]]
    evaluations = [
        (folder / "evaluation.json").read_bytes()
        for folder in (run_folder(alone), config.Path(result.runs[3]["folder"]))
    ]
    assert evaluations[0] == evaluations[1]


def test_resuming_a_finished_sweep_rewrites_no_file(swept):
    result, storage = swept
    before = {part: stamps(storage / part) for part in ("data", "experts", "phases", "baselines")}
    again = run_all(members_in(result.folder), QUIET)
    assert again.runs == result.runs and {part: stamps(storage / part) for part in before} == before


def test_a_killed_sweep_resumes_and_gives_the_same_sets(swept, tmp_path):
    result, storage = swept
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw_of(tmp_path / "runs")))
    over = ["--over", "distill.method=ptm_st,lors", "--over", "distill.seed=0,1"]
    changes = [word for change in METHODS for word in ("--set", change)]
    process = Rmdd("sweep", tmp_path / "run.yaml", *over, *changes, "--quiet")
    pattern = "runs/phases/*/phase-0/set-*"
    while len(sets := [p for p in tmp_path.glob(pattern) if finished(p.parent, 3)]) < 2:
        assert process.poll() is None, "the sweep must not end before this test kills it"
        time.sleep(0.02)
    process.kill()
    modified = {path: path.stat().st_mtime_ns for path in sets}
    (folder,) = tmp_path.glob("runs/sweeps/[!.]*/")
    rows = json.loads(done("resume", folder, "--json"))["runs"]
    assert [(r["val"], r["test_last"]) for r in rows] == [(r["val"], r["test_last"]) for r in result.runs]
    assert modified == {path: path.stat().st_mtime_ns for path in sets}
    roots = (tmp_path / "runs" / "phases", storage / "phases")
    bits = [{p.relative_to(root): p.read_bytes() for p in root.glob("*/phase-0/set-*")} for root in roots]
    assert bits[0] == bits[1] and len(bits[0]) == 4


def test_a_sweep_at_a_uri_can_be_resumed_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    uri = f"file://{tmp_path}/bucket"
    result = rmdd.sweep(raw_of(uri), {"evaluate.epochs": [1, 2]}, progress=QUIET)
    address = f"{uri}/sweeps/{result.folder.name}"
    assert verify(address).faults == [] and len(verify(address).checked) >= 3, "the sweep and both runs must be checked"
    assert all(row["folder"].startswith(uri) for row in result.runs) and not result.failed
    before = {part: stamps(tmp_path / "bucket" / part) for part in ("data", "experts", "phases", "baselines")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    again = CliRunner().invoke(cli.app, ["resume", address, "--json", "--quiet"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["runs"] == result.runs and json.loads(again.stdout)["sweep"] == address
    assert {part: stamps(tmp_path / "bucket" / part) for part in before} == before


def test_a_failed_run_is_reported_and_stops_no_other(tmp_path):
    listed = [{"distill.lr_image": 1.0}, {"distill.lr_image": 1e38, "distill.guard.retries": 0}]
    result = rmdd.sweep(raw_of(tmp_path), {}, settings=listed, progress=QUIET)
    assert "test_last" in result.runs[0] and "error" not in result.runs[0]
    assert [row["settings"] for row in result.failed] == [listed[1]] and "phase 0, iteration" in result.failed[0][
        "error"
    ]
    assert result.groups[1]["n"] == 0
    again = CliRunner().invoke(cli.app, ["resume", str(result.folder), "--quiet"])
    assert again.exit_code == 1 and "1 of 2 runs failed" in again.stderr
    assert "resume with" not in again.stderr, "the run would fail again until its values change"


def test_settings_come_from_over_options_or_from_a_file(tmp_path):
    assert read_over(["a.b=0,1", "c=[x, y]", "d=[[1, 2], [3]]"]) == {"a.b": [0, 1], "c": ["x", "y"], "d": [[1, 2], [3]]}
    for wrong in ("a", "=1", "a=", "a=["):
        with pytest.raises(config.ConfigError, match="write it as section.field=value,value"):
            read_over([wrong])
    file = tmp_path / "settings.yaml"
    file.write_text("- {distill.method: lors, distill.seed: 3}\n- {distill.method: mct}\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw_of(tmp_path)))
    words = ["sweep", str(tmp_path / "run.yaml"), "--settings", str(file), "--over", "distill.steps=0,2"]
    wrong = CliRunner().invoke(cli.app, words)
    assert wrong.exit_code == 2 and "distill.steps" in wrong.stderr and "'distill.method': 'mct'" in wrong.stderr


def test_equal_runs_and_runs_with_other_runtime_settings_are_refused(tmp_path):
    def load(overrides):
        return config.load(raw_of(tmp_path), overrides)

    with pytest.raises(config.ConfigError, match=r"are the same run; remove one of them"):
        members(load, {"distill.checkpoint_every": [5, 10]})
    with pytest.raises(config.ConfigError, match=r"runtime.workers must be equal for all runs"):
        members(load, {"runtime.workers": [1, 2]})


class Watched(SequentialExecutor):
    """`SequentialExecutor` that records the name of each task that it runs."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def serve(self, source):
        def watched(seconds):
            pieces = source(seconds)
            self.names += [piece.name for piece in pieces or []]
            return pieces

        super().serve(watched)


def test_a_phase_that_two_runs_share_is_distilled_once(tmp_path):
    runs = members(lambda o: config.load(raw_of(tmp_path), o), {"evaluate.epochs": [1, 2]})
    executor, reports = Watched(), []
    scheduler = SweepScheduler(executor)

    def work(label):
        places = RunPaths(*[tmp_path] * 6)
        results = scheduler.executor_of(label).map(
            PhaseOfNone(),
            [TaskItem(m.run, places, "") for m in runs[:1]],
            ["phase 0"],
            lambda n, m: reports.extend([label] if m else []),
        )
        assert results == [True]

    class PhaseOfNone(DistillPhase):
        def __call__(self, item, hooks):
            hooks.report({"done": 1})
            return True

    for label in ("one", "two"):
        scheduler.add(label, lambda label=label: work(label))
    assert scheduler.run_all() == {} and executor.names == ["one: phase 0"] and sorted(reports) == ["one", "two"]


def test_a_stop_reaches_every_run(tmp_path):
    scheduler = SweepScheduler(SequentialExecutor())

    class Interrupt(DistillPhase):
        def __call__(self, item, hooks):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return not hooks.should_stop()

    def work():
        scheduler.executor_of("one").map(
            Interrupt(), [TaskItem(config.Run(), RunPaths(*[tmp_path] * 6), "")], ["it"], lambda n, m: None
        )
        raise AssertionError("a stopped run must not continue")

    scheduler.add("one", work)
    scheduler.add("two", work)
    with pytest.raises(Interrupted):
        scheduler.run_all()
    assert scheduler.errors == {} and not any(run.is_alive() for run in scheduler.runs)


def test_the_folder_of_a_sweep_is_named_by_its_runs(tmp_path):
    def folder(*seeds):
        return sweep_folder(members(lambda o: config.load(raw_of(tmp_path), o), {"distill.seed": list(seeds)}))

    assert folder(0, 1) == folder(1, 0) != folder(0, 2)
