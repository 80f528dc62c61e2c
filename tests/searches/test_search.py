"""Test whole searches: written files, resuming after a kill, shared databases, and that test is never read."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import time

import optuna
import pytest
import yaml
from processes import Rmdd
from rich.console import Console
from tiny import QUIET
from tiny_search import BOTH, LR, TINY, base_of
from tiny_search import searched as raw_of
from typer.testing import CliRunner

import rmdd
from rmdd import config
from rmdd.cli import app as cli
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.models import prepared
from rmdd.report.search import log_ticks, write_page
from rmdd.searches import base_run_in, check, search_folder
from rmdd.searches.formats import verify


@pytest.fixture(scope="module")
def shared_search(tmp_path_factory, painted):
    """Fixture: one search, shared by all tests: its result, its storage and the names of the splits that it opened."""
    storage = tmp_path_factory.mktemp("search")
    opened = []
    with painted(), pytest.MonkeyPatch.context() as patch:
        load = prepared.prepare_split
        patch.setattr(prepared, "prepare_split", lambda *args: opened.append(args[3]) or load(*args))
        result = rmdd.search(raw_of(storage, {"distill.lr_image": LR, **BOTH}, trials=5, pruner="asha"), progress=QUIET)
    return result, storage, set(opened)


def test_a_search_writes_its_table_plots_and_best_run_file(shared_search):
    result, storage, _ = shared_search
    rows = json.loads((result.folder / "results.json").read_text())["trials"]
    assert rows == result.table.rows and len(rows) == 5 and not result.failures
    done = [row for row in rows if row["state"] == "complete"]
    assert done and {row["state"] for row in rows} <= {"complete", "pruned"}
    assert result.table.winner["val"] == max(row["val"] for row in done)
    with open(result.folder / "trials.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["distill.lr_image"]) for line in lines] == [row["values"]["distill.lr_image"] for row in rows]
    page = (result.folder / "report.html").read_text()
    assert "best.yaml" in page and ">complete</text>" in page and ">best</text>" in page
    assert page.count("<svg") >= 2 and "http" not in page.replace("http-equiv", "")
    assert len(list((storage / "experts").glob("[!.]*/"))) == 1, "all trials must share one store of experts"
    assert result.folder.parent == storage / "searches"


def test_a_logarithmic_axis_has_few_ticks_with_rounded_values():
    assert log_ticks(10, 10000) == [10, 100, 1000, 10000]
    assert log_ticks(0.005, 0.05) == [0.005, 0.011, 0.023, 0.05]
    assert log_ticks(1, 3, integer=True) == [1, 2, 3]


def test_the_progress_counts_trials_against_the_requested_number(tmp_path):
    out = io.StringIO()
    clock = (11.0 * tick for tick in itertools.count())  # progress is printed at most every 10 s
    progress = Progress(console=Console(file=out, width=200), clock=lambda: next(clock))
    for trials in (2, 3):
        rmdd.search(raw_of(tmp_path, trials=trials), progress=progress)
    shown = re.findall(r"^trials: (\d)/(\d) done", out.getvalue(), re.MULTILINE)
    assert {most for _, most in shown} == {"2", "3"} and min(done for done, most in shown if most == "3") == "2"


def test_no_trial_reads_the_test_split(shared_search):
    result, storage, opened = shared_search
    assert opened == {"train", "val"}
    assert not [p for row in result.table.rows for p in config.Path(row["run"]).glob("students/student*")]
    assert not list(storage.glob("baselines/*"))


def test_the_best_run_file_repeats_its_trial_bit_for_bit(shared_search, tmp_path):
    result, storage, _ = shared_search
    best = result.table.winner
    run = config.load(result.folder / "best.yaml", [f"runtime.storage={tmp_path}"])
    again = rmdd.run(run, progress=QUIET)
    of_trials, repeated = (sorted(root.glob("phases/*/phase-0/set-*")) for root in (storage, tmp_path))
    content = {(p.parts[-3], p.name): p.read_bytes() for p in of_trials}
    assert len(repeated) == 3 and all(content[p.parts[-3], p.name] == p.read_bytes() for p in repeated)
    assert [v["R@mean"] for v in again.evaluation["selection"]["val"]] == best["curve"]
    text = (result.folder / "trials" / f"{best['number']:03d}" / "run.yaml").read_text()
    assert config.load(yaml.safe_load(text)).hash_of() == run.hash_of()
    assert run_folder(run).name == config.Path(best["run"]).name


def test_warm_start_copies_the_trials_of_an_earlier_search(shared_search, tmp_path):
    result, storage, _ = shared_search
    warm = base_of(storage, warm_start=[str(result.folder)], trials=1, sampler="tpe", snapshots=2)
    later = rmdd.search(warm.model_dump(mode="json"), progress=QUIET)
    done = [row for row in result.table.rows if row["state"] == "complete"]
    study = optuna.load_study(study_name=later.folder.name, storage=f"sqlite:///{later.folder}/study.db")
    assert [t.params["distill.lr_image"] for t in study.trials[: len(done)]] == [
        row["values"]["distill.lr_image"] for row in done
    ]
    assert [row["number"] for row in later.table.rows] == [len(done)], "copied trials must not be in the table"
    for wrong, message in (
        ({"evaluate": {**TINY["evaluate"], "epochs": 3}}, "has a different `evaluate` section"),
        ({"search": {"space": {"distill.lr_image": LR}, "warm_start": [str(tmp_path)]}}, "no results.json in"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            rmdd.search({**warm.model_dump(mode="json"), **wrong}, progress=QUIET)


def start_search(*words):
    return Rmdd("search", *words, "--quiet")


def wait_for(process, reached):
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_search_killed_twice_and_resumed_gives_the_same_trials(shared_search, tmp_path):
    result, _, _ = shared_search
    file, storage = tmp_path / "run.yaml", tmp_path / "runs"
    raw = raw_of(storage, {"distill.lr_image": LR, **BOTH}, trials=5, pruner="asha")
    file.write_text(yaml.safe_dump(raw))
    for kills in (1, 2):
        folder = search_folder(config.load(file))
        process = start_search(file) if kills == 1 else start_search("--resume", folder)
        wait_for(process, lambda: len(list(folder.glob("trials/*/run.yaml"))) > 2 * kills - 1)  # noqa: B023
        wait_for(process, lambda: len(list(storage.glob("phases/*/phase-0/set-000001*"))) > 2 * kills - 1)  # noqa: B023
        process.kill()
        study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder}/study.db")
        ended = {t.number: (t.values, t.datetime_complete) for t in study.trials if t.state.is_finished()}
        assert ended
    done = CliRunner().invoke(cli.app, ["resume", str(folder), "--json", "--quiet"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["trials"]
    columns = ("number", "state", "values", "curve", "val")
    assert [{k: row[k] for k in columns} for row in rows] == [{k: row[k] for k in columns} for row in result.table.rows]
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder}/study.db")
    assert ended.items() <= {t.number: (t.values, t.datetime_complete) for t in study.trials}.items()


def test_two_drivers_share_the_trials_of_one_database(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw_of(tmp_path / "runs", trials=6, storage=f"sqlite:///{tmp_path}/shared.db")))
    drivers = [start_search(file), start_search(file)]
    ends = [driver.communicate(timeout=180) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], ends
    folder = search_folder(config.load(file))
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{tmp_path}/shared.db")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 6
    assert not (folder / "study.db").exists()


def test_if_one_of_two_drivers_is_killed_the_other_runs_every_trial_once(tmp_path):
    file, url = tmp_path / "run.yaml", f"sqlite:///{tmp_path}/shared.db"
    file.write_text(yaml.safe_dump(raw_of(tmp_path / "runs", trials=6, storage=url)))
    folder = search_folder(config.load(file))
    killed, other = start_search(file), start_search(file)
    wait_for(killed, lambda: len(list(folder.glob("trials/*/run.yaml"))) > 1)
    killed.kill()
    assert other.communicate(timeout=180) and other.returncode == 0
    result = rmdd.search(file, progress=QUIET)
    assert [row["state"] for row in result.table.rows] == ["complete"] * 6
    assert len(list(folder.glob("trials/*/run.yaml"))) == 6
    for row in result.table.rows:
        (log,) = (tmp_path / "runs" / "phases" / row["phases"]).glob("phase-0/metrics.jsonl")
        assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_fields_of_a_plan_can_be_searched_but_not_those_of_its_phases(tmp_path):
    raw = raw_of(tmp_path / "runs", {"distill.plan.reach": {"choice": [0.5, 0.9]}}, sampler="grid", snapshots=2)
    raw["distill"] |= {"phases": "auto", "plan": {"iterations": 2, "min_pairs": 2, "min_straightness": 0}}
    result = rmdd.search(raw, progress=QUIET)
    assert [row["state"] for row in result.table.rows] == ["complete"] * 2
    best = result.table.winner
    run = config.load(result.folder / "best.yaml", [f"runtime.storage={tmp_path / 'again'}"])
    assert [v["R@mean"] for v in rmdd.run(run, progress=QUIET).evaluation["selection"]["val"]] == best["curve"]
    raw["search"]["space"] = {"distill.phases.0.endpoint": {"int": [1, 2]}}
    with pytest.raises(config.ConfigError, match=r"phases.0.endpoint: distill.phases is auto.*vary distill.plan.reach"):
        check(config.load(raw))


def test_verify_reports_damaged_files_of_a_search(shared_search, tmp_path):
    result, storage, _ = shared_search
    shutil.copytree(storage, root := tmp_path / "copy")
    folder = root / "searches" / result.folder.name
    runs = {os.path.basename(row["run"]) for row in result.table.rows}
    for address in (str(folder), f"file://{folder}", str(root)):
        findings = verify(address)
        assert findings.faults == [] and len(findings.checked) > len(result.table.rows)
        assert not runs & {os.path.basename(unfinished) for unfinished in findings.unfinished}
    best = result.table.winner
    for broken in (folder / "study.db", next((root / "phases" / best["phases"]).glob("phase-0/set-000003*"))):
        broken.write_bytes(broken.read_bytes()[:3000])
        assert broken.name in [os.path.basename(fault.path) for fault in verify(str(folder)).faults]


def test_the_page_escapes_markup_in_names_and_values(tmp_path, painted):
    name = "<b>$x_</b>"
    rows = [
        {"number": n, "state": "complete", "values": {"distill.options.x": v}, "val": float(n), "cost": {}}
        for n, v in enumerate((name, [{"pairs": 100, "start": 0, "stop": 4, "endpoint": 6}] * 2))
    ]
    base = base_of(space={"distill.options.x": {"choice": [row["values"]["distill.options.x"] for row in rows]}})
    with painted():
        write_page(tmp_path / "report.html", base.name, base.search, rows, [1], {"distill.options.x": 1.0})
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page


def test_resume_can_add_trials_but_change_nothing_else(shared_search):
    result, _, _ = shared_search
    before = result.table.rows
    words = ["search", "--resume", str(result.folder), "--json", "--quiet"]
    other = CliRunner().invoke(cli.app, [*words, "--set", "distill.steps=3"])
    assert other.exit_code == 2 and "--set would make this another search" in other.stderr
    more = CliRunner().invoke(cli.app, [*words, "--set", "search.trials=6"])
    assert more.exit_code == 0, more.stderr
    rows = json.loads(more.stdout)["trials"]
    assert rows[:5] == before and len(rows) == 6 and base_run_in(result.folder).search.trials == 6


def test_trials_may_differ_in_their_experts(tmp_path):
    space = {"experts.lr_image": {"choice": [0.1, 0.2]}, "model.width": {"choice": [4, 8]}}
    result = rmdd.search(raw_of(tmp_path, space, sampler="grid"), progress=QUIET)
    assert [row["state"] for row in result.table.rows] == ["complete"] * 4
    assert len(list((tmp_path / "experts").glob("*/expert-000/expert.json"))) == 4


def test_endpoints_that_shared_experts_do_not_keep_are_refused():
    raw = raw_of("runs", {"distill.phases.0.endpoint": {"int": [1, 2]}})
    raw["experts"]["keep"] = "endpoints"
    raw["experts"]["epochs"] = 3
    with pytest.raises(config.ConfigError, match=r"endpoint: at 2: .*set experts.keep: all"):
        check(config.load(raw))


def test_search_needs_either_a_config_or_the_folder_of_a_search(tmp_path):
    for words, message in (
        ([], "give CONFIG"),
        (["--resume", str(tmp_path)], "no search.json in this folder"),
        (["demo", "--resume", str(tmp_path)], "remove 'demo'"),
    ):
        done = CliRunner().invoke(cli.app, ["search", *words])
        assert done.exit_code == 2 and message in done.stderr
