"""Tests of probes in complete tiny runs, and of the commands `rmdd probe`, `rmdd check` and `rmdd run`."""

import json
import shutil
from dataclasses import replace

import formats
import pytest
from probing import BASE, run_of, textcaps_probe, vqa_probe, zero_shot_probe
from typer.testing import CliRunner

from rmdd import config
from rmdd.artefact.distilled import DistilledSet
from rmdd.cli import app as cli
from rmdd.comparisons import probe_set as set_probes
from rmdd.comparisons.probe_set import probe_set
from rmdd.core.files import _listeners as listeners
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.evaluate.probes import of_run as probes
from rmdd.execution.tasks import Hooks
from rmdd.pipeline import open_pipeline
from rmdd.runs.tasks import CheckHealth


@pytest.mark.parametrize("word", ("check", "run"))
def test_missing_files_of_a_probe_are_reported_before_any_work(tmp_path, word):
    formats.cocoqa(tmp_path / "qa" / "cocoqa", [("what", "dog", 1, 0)], [("what", "dog", 1, 0)])
    (tmp_path / "qa" / "cocoqa" / "train" / "types.txt").write_text("7\n")
    formats.textcaps(tmp_path / "text", "val", ["a"])
    (tmp_path / "text" / "train_images").rename(tmp_path / "text" / "elsewhere")
    probe_configs = {
        "gone": zero_shot_probe(tmp_path / "gone"),
        "qa": vqa_probe(tmp_path / "qa"),
        "text": textcaps_probe(tmp_path / "text"),
        "prompts": zero_shot_probe(tmp_path, templates="no-such-file.txt"),
    }
    file = tmp_path / "run.yaml"
    file.write_text(config.dump(run_of(tmp_path / "runs", probe_configs)))
    result = CliRunner().invoke(cli.app, [word, str(file)])
    assert result.exit_code == 2 and not (tmp_path / "runs").exists()
    for words in (
        "evaluate.probes.gone: evaluate.probes.gone.data.root",
        "types.txt: line 1 is '7'",
        "the first 1 images are all missing, for example train_images/a.jpg; set evaluate.probes.text.data.root to",
        "no-such-file.txt' is not a file and not one of single, seven, cifar, imagenet",
    ):
        assert words in result.stderr


@pytest.fixture(scope="module")
def formats_(tmp_path_factory):
    """Fixture: a folder of generated probe data in the file formats of published datasets."""
    root = tmp_path_factory.mktemp("formats")
    formats.class_folders(root / "in", ["n01", "n02", "n03"])
    (root / "in" / "map.txt").write_text("n01 tench\nn02 crane\nn03 kite, hawk\n")
    formats.cifar10(root / "cifar", [0, 1, 2, 0])
    rows = [(f"what {i % 3}", f"a{i % 12}", 100 + i % 5, i % 4) for i in range(24)]
    formats.cocoqa(root / "coco" / "cocoqa", rows, rows)
    formats.coco_pictures(root / "coco", range(100, 105))
    formats.textcaps(root / "text", "val", ["c", "d", "e"])
    return root


def asked_of(root):
    return {
        "imagenet": zero_shot_probe(root / "in", {"names": "map.txt"}, templates="imagenet"),
        "cifar": zero_shot_probe(root / "cifar", {"images": "", "layout": "cifar10"}, templates="cifar"),
        "cocoqa": vqa_probe(root / "coco"),
        "textcaps": textcaps_probe(root / "text"),
        "scenes": {"kind": "retrieval", "data": BASE["data"] | {"scenes": {"test": 6, "seed": 5, "size": 16}}},
    }


def go(run, step="evaluate"):
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        return getattr(pipeline, step)()


def files(folder, pattern):
    return {p: p.stat().st_mtime_ns for p in folder.rglob(pattern)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, formats_):
    """Fixture: the storage and the result of a complete run with probes."""
    storage = tmp_path_factory.mktemp("finished")
    return storage, go(run_of(storage, asked_of(formats_)), "all")


@pytest.fixture
def storage(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "runs")


def test_a_run_with_probes_from_end_to_end(finished, formats_):
    _, result = finished
    table, facts = result.evaluation["table"], result.evaluation["probes"]
    for row, n in (("random", 1), ("ptm_st", 2), ("full", 1)):
        scores = table[row]["probes"]
        assert list(scores) == list(asked_of(formats_)) == list(facts)
        assert {value["n"] for of in scores.values() for value in of.values()} == {n}
        assert all(0 <= value["mean"] <= 100 for of in scores.values() for value in of.values())
        assert {"ACC@1", "ACC@5", "ACC@10", "blind ACC@1"} <= scores["cocoqa"].keys()
        assert scores["textcaps"].keys() == set(probes.RECALLS) and list(scores["cifar"]) == ["ACC@1"]
    assert facts["imagenet"]["names"] == ["tench", "crane", "kite"] and facts["scenes"]["pictures"] == 6
    page = result.report.read_text()
    assert "Probes" in page and "24 questions, 12 answers" in page and "a photo of a {}." in page
    stored = json.loads((result.set / "set.json").read_text())
    assert "probes" not in stored["config"]["evaluate"] and str(formats_) not in json.dumps(stored)
    assert set(stored["metrics"]["full"]["probes"]) == set(asked_of(formats_))


def test_probes_added_later_do_not_change_other_scores(finished, tmp_path, formats_):
    bare, probed = run_of(tmp_path / "runs", {}), run_of(tmp_path / "runs", asked_of(formats_))
    assert bare.hash_of() == probed.hash_of() and run_folder(bare) == run_folder(probed)
    before = go(bare)
    assert "probes" not in before and not files(tmp_path, "*.trained.safetensors")
    patterns = ("student-*.json", "baseline-*.json", "*.ranks.safetensors")
    records = {p: t for pattern in patterns for p, t in files(tmp_path / "runs", pattern).items()}
    table = go(probed)["table"]
    assert table == finished[1].evaluation["table"]
    assert {row: {k: v for k, v in of.items() if k != "probes"} for row, of in table.items()} == before["table"]
    assert {p: p.stat().st_mtime_ns for p in records} == records


def test_new_probes_use_the_saved_students(finished, storage, formats_, monkeypatch):
    weights = files(storage, "*.trained.safetensors")
    assert len(weights) == 3
    monkeypatch.setattr("rmdd.runs.students.train_and_score", None)
    other = {"words": vqa_probe(formats_ / "coco", question_mark=True)}
    assert set(go(run_of(storage, other))["table"]["random"]["probes"]) == {"words"}
    for file in storage.rglob("*.probe-*.json"):
        file.unlink()
    assert go(run_of(storage, asked_of(formats_)))["table"] == finished[1].evaluation["table"], (
        "deleted scores must be computed again from saved weights"
    )
    assert files(storage, "*.trained.safetensors") == weights


def rmdd_(*words):
    result = CliRunner().invoke(cli.app, [*map(str, words), "--quiet", "--json"], catch_exceptions=False)
    return result.exit_code, result.stderr if result.exit_code else json.loads(result.stdout)


def test_a_set_can_be_probed_without_its_run(finished, storage, tmp_path, formats_):
    shutil.copytree(finished[1].set, tmp_path / "shared" / "set")
    shutil.rmtree(storage)
    file = tmp_path / "probes.yaml"
    file.write_text(json.dumps(asked_of(formats_)))
    away = [
        word for o in (f"storage={tmp_path / 'away'}", "ray=off", "track=none") for word in ("--set", f"runtime.{o}")
    ]
    code, output = rmdd_("probe", tmp_path / "shared" / "set", "--probes", file, *away)
    assert code == 0, output
    assert output["table"]["ptm_st"]["probes"] == finished[1].evaluation["table"]["ptm_st"]["probes"]
    assert "overlap" not in output["probes"]["cocoqa"], "a set does not record which images were distilled"
    file.write_text(json.dumps({"gone": zero_shot_probe(tmp_path / "gone")}))
    code, message = rmdd_("probe", tmp_path / "shared" / "set", "--probes", file, *away)
    assert code == 2 and "evaluate.probes.gone: evaluate.probes.gone.data.root" in message


PHASE = "{pairs: 2, start: 0, stop: 1, endpoint: 1, iterations: 2}"


@pytest.mark.parametrize(
    "changes",
    [
        ["evaluate.augment=randaugment"],
        ["evaluate.order=union", "evaluate.between=masked", f"distill.phases=[{PHASE}, {PHASE}]", "distill.batch=2"],
    ],
)
def test_a_set_with_other_students_can_be_probed_without_its_run(tmp_path, formats_, changes):
    run = run_of(tmp_path / "runs", {}, *changes, "evaluate.students=1")
    probe_configs = {"cocoqa": vqa_probe(formats_ / "coco")}
    path = go(run, "export")
    away = [f"runtime.{o}" for o in (f"storage={tmp_path / 'away'}", "ray=off", "track=none")]
    output = probe_set(path, set_probes.run_of(path, probe_configs, away), Progress(quiet=True))
    probed = go(run_of(tmp_path / "runs", probe_configs, *changes, "evaluate.students=1"))
    assert output["table"]["ptm_st"]["probes"] == probed["table"]["ptm_st"]["probes"]


def test_a_set_is_probed_in_its_own_order(finished, tmp_path, formats_):
    """The order stored with the set decides, even if the run file in the set has another one."""
    replace(DistilledSet.load(finished[1].set), order="cumulative", between="masked").save(tmp_path / "set")
    run = set_probes.run_of(tmp_path / "set", {"cocoqa": vqa_probe(formats_ / "coco")})
    assert (run.evaluate.order, run.evaluate.between) == ("cumulative", "masked")


def test_a_finished_run_can_be_probed(finished, storage, tmp_path, formats_):
    folder = run_folder(run_of(storage, {}))
    file = tmp_path / "probes.yaml"
    file.write_text(json.dumps({"cocoqa": vqa_probe(formats_ / "coco")}))
    code, output = rmdd_("probe", folder, "--probes", file)
    assert code == 0, output
    row = finished[1].evaluation["table"]["full"]["probes"]
    assert output["table"]["full"] == {"cocoqa": row["cocoqa"]}
    code, message = rmdd_("probe", folder, "--probes", file, "--set", "evaluate.students=3")
    assert code == 2 and "--set would make this another run" in message


def test_probes_of_a_run_whose_storage_is_a_uri(tmp_path, formats_):
    probe_configs = {"cocoqa": vqa_probe(formats_ / "coco")}
    run = run_of(f"file://{tmp_path}/there", probe_configs, f"runtime.scratch={tmp_path}/a")
    try:
        first = go(run)
        second = go(run.model_copy(update={"runtime": run.runtime.model_copy(update={"scratch": f"{tmp_path}/b"})}))
    finally:
        for root in [root for root in listeners if root.is_relative_to(tmp_path)]:
            listeners.pop(root, None)
    assert first["probes"] == second["probes"] and first["table"] == second["table"]
    assert list((tmp_path / "there").rglob("student-000.probe-*.json"))


def test_health_is_computed_on_a_machine_without_local_files(tmp_path):
    run = run_of(f"file://{tmp_path}/there", {}, f"runtime.scratch={tmp_path}/a")
    try:
        with open_pipeline(run, Progress(quiet=True)) as pipeline:
            pipeline.distill()
            item = pipeline.item()
        runtime = item.run.runtime.model_copy(update={"scratch": f"{tmp_path}/b"})
        assert CheckHealth()(replace(item, run=item.run.model_copy(update={"runtime": runtime})), Hooks())
    finally:
        for root in [root for root in listeners if root.is_relative_to(tmp_path)]:
            listeners.pop(root, None)
    assert list((tmp_path / "there").glob("probed-*/health.json"))
