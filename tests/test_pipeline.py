"""Check one run in this process: reuse of finished work, errors, and results."""

import io
import json
import re
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image
from rich.console import Console
from tiny import go

import rmdd
from rmdd import config
from rmdd import pipeline as pipeline_module
from rmdd.cli.console import result_table
from rmdd.core.failures import MustChange
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.data.ingest import ingest
from rmdd.distill.sets import load_set, save_set
from rmdd.execution.backend import Backend
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.pipeline import Pipeline, open_pipeline
from rmdd.runs import steps as steps_module
from rmdd.runs.steps import Steps

CLOCKS = ("seconds.json", "cost.json", "report.html")
TINY = tiny.changed(
    distill={
        "phases": [
            {"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 4},
            {"pairs": 4, "start": 0, "stop": 2, "endpoint": 2, "iterations": 3},
        ],
        "snapshots": 2,
    }
)


def load(storage, *overrides, **sections):
    return config.load(tiny.stored(storage, TINY, **sections), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Fixture: a storage folder with a finished run; tests must copy it before they change it."""
    storage = tmp_path_factory.mktemp("runs")
    go(load(storage))
    return storage


@pytest.fixture
def storage(finished, tmp_path):
    """Fixture: a copy of the storage folder `finished`, with the same file times."""
    return shutil.copytree(finished, tmp_path / "runs")


def stamps(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_a_table_a_set_and_a_page(finished):
    run = load(finished)
    folder = run_folder(run)
    assert folder.parent == finished and config.load(folder / "run.yaml") == run
    table = json.loads((folder / "evaluation.json").read_text())["table"]
    assert set(table) == {"random", "ptm_st", "full"}
    assert {k: v["test_last"]["R@mean"]["n"] for k, v in table.items()} == {"random": 2, "ptm_st": 2, "full": 1}
    assert {"ingest", "embed", "experts", "distill", "evaluate", "export", "report"} <= json.loads(
        (folder / "seconds.json").read_text()
    ).keys()
    assert (folder / "report.html").stat().st_size > 1000
    examples = json.loads((folder / "examples.json").read_text())
    assert examples["images"] == 5 and len({query["image"] for query in examples["queries"]}) == 5
    for query in examples["queries"]:
        assert set(query["found"]) == {"random", "ptm_st", "full"}
        assert all(row["images"][row["place"] - 1] == query["image"] for row in query["found"].values())
    assert not list(finished.rglob("*.tmp"))


def test_the_page_reports_certainty_and_peeking(storage):
    run = load(storage, "evaluate.reference=edge", "evaluate.scores=true", "evaluate.students=1")
    go(run)
    evaluation = json.loads((run_folder(run) / "evaluation.json").read_text())
    table, results = evaluation["table"], evaluation["certainty"]
    for row, recalls in results["test_last"].items():
        for metric, interval in recalls.items():
            assert interval["low"] <= interval["high"]
            assert interval["mean"] == pytest.approx(table[row]["test_last"][metric]["mean"])
    gain = results["minus_random"]["ptm_st"]["R@mean"]["mean"]
    rows = [table[row]["test_last"]["R@mean"]["mean"] for row in ("ptm_st", "random")]
    assert gain == pytest.approx(rows[0] - rows[1])
    reference, picked = evaluation["reference"], table["ptm_st"]["test_best_reference"]["R@mean"]
    assert (reference["protocol"], reference["scorings"], reference["students"], picked["n"]) == ("edge", 40, 1, 1)
    assert reference["minus_test_last"] == pytest.approx(picked["mean"] - rows[0])
    assert set(evaluation["scores"]["points"]) == {"HLR", "IOR", "augmented", "plain"}
    assert evaluation["scores"]["rates"] == {"dsa": 0.1, "none": 0.1}
    assert evaluation["galleries"]["test"]["pairs"] == 5 and evaluation["chance"]["test"]["IR@5"] == 100
    assert evaluation["size"]["pairs"] == 8 and evaluation["size"]["set_bytes"] == 4 * (8 * (768 + 16) + 32 + 4)
    cost = json.loads((run_folder(run) / "cost.json").read_text())
    assert cost["seconds_per_iteration"] > 0 and cost["iterations_timed"] == 7 and cost["gpu_hours"] == 0
    page = (run_folder(run) / "report.html").read_text()
    assert "Difference of the paper" in page and "IOR: the set minus random pairs with the same recipe" in page


def test_incomplete_records_are_computed_again(storage):
    (baseline,) = (storage / "baselines").iterdir()
    ranks, apart = baseline / "baseline-000.ranks.safetensors", baseline / "baseline-001.test.json"
    before = ranks.read_bytes(), apart.read_bytes()
    ranks.unlink()
    apart.unlink()
    go(load(storage), "evaluate")
    assert (ranks.read_bytes(), apart.read_bytes()) == before


def test_the_exported_set_loads_and_trains(finished):
    distilled = rmdd.load(run_folder(load(finished)) / "set")
    assert [s.pairs for s in distilled.subsets] == [4, 4]
    pairs = distilled.as_dataset()
    assert len(pairs) == 8
    assert pairs[5]["image"].shape == (3, 16, 16) and pairs[5]["text"].shape == (16,) and pairs[5]["subset"] == 1
    assert all(torch.isfinite(t).all() for s in distilled.subsets for t in (s.images, s.texts, *s.similarity.values()))
    table = json.loads((run_folder(load(finished)) / "evaluation.json").read_text())["table"]
    assert distilled.metrics["ptm_st"]["val"]["R@mean"] == table["ptm_st"]["val"]["R@mean"]


def test_a_run_starts_from_a_mapping_a_file_a_preset_and_a_run(storage, tmp_path):
    raw, file = tiny.stored(storage, TINY), tmp_path / "mine.yaml"
    run = config.load(raw)
    file.write_text(config.dump(run))
    forms = [(raw, []), (file, [f"runtime.storage={storage}"]), (run, [])]
    results = [rmdd.run(form, overrides, progress=Progress(quiet=True)) for form, overrides in forms]
    assert {result.folder for result in results} == {run_folder(run)}
    with pytest.raises(config.ConfigError, match=r"demo: 1 mistake(.|\n)*experts.num"):
        rmdd.run("demo", ["experts.num=0"])
    assert rmdd.load_config(run) is run and rmdd.load_config(run, ["seed=3"]).seed == 3


def test_the_result_of_a_run_has_its_folder_and_the_rows_of_the_printed_table(storage):
    result = go(load(storage))
    assert result.folder == run_folder(load(storage)) and (result.folder / "run.yaml").is_file()
    assert [row["trained on"] for row in result.table] == ["random pairs", "PTM-ST", "full data"]
    table = json.loads((result.folder / "evaluation.json").read_text())["table"]
    for row, scores in zip(result.table, table.values(), strict=True):
        assert row["protocol"] == "test_last" and row["val R@mean"] == scores["val"]["R@mean"]["mean"]
        assert (row["TR@5"], row["TR@5 spread"]) == tuple(scores["test_last"]["TR@5"][k] for k in ("mean", "std"))
    console = Console(width=160, file=io.StringIO())
    console.print(result_table(result.evaluation))
    assert all(f"{row['test R@mean']:.1f}" in console.file.getvalue() for row in result.table)


def test_reprs_are_short_lines(finished):
    result = go(load(finished))
    distilled = rmdd.load(result.set)
    for value in (result, distilled, distilled.subsets[0], distilled.as_dataset(), load(finished)):
        assert "\n" not in repr(value) and len(repr(value)) < 200, repr(value)
    assert "4 + 4 pairs, method ptm_st" in repr(distilled) and "images 3 x 16 x 16" in repr(distilled.subsets[0])
    assert f"{result.table[1]['test R@mean']:.1f}" in repr(result)


STEPS = ("ingest", "locate", "embed", "experts", "check_budget", "plan", "begin_phases", "distill", "probes")
STEPS += ("evaluate", "cost", "health")


def test_a_run_does_each_step_once_and_computes_its_paths_once(tmp_path, monkeypatch):
    calls = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def counting(*arguments, **named):
            calls[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)

    for name in STEPS:
        counted(Steps, name)
    for name in ("assemble", "write_report"):
        counted(pipeline_module, name)
    counted(steps_module, "paths_of")
    go(load(tmp_path))
    assert calls == dict.fromkeys([*STEPS, "assemble", "write_report", "paths_of"], 1)
    calls.clear()
    planned = load(
        tmp_path, "distill.phases=auto", "distill.plan.min_pairs=2", "distill.plan.max_phases=1", "name=planned"
    )
    go(planned, "plan")
    assert (calls["plan"], calls["paths_of"]) == (1, 2), "the paths are computed again after the phases are planned"


def test_running_again_changes_nothing(finished):
    def contents():
        files = [p for p in finished.rglob("*") if p.is_file() and p.name not in CLOCKS]
        return {str(p.relative_to(finished)): p.read_bytes() for p in files}

    before, folders = contents(), ("data", "cache", "experts", "phases", "baselines")
    times = {f: stamps(finished / f) for f in folders}
    go(load(finished))
    assert contents() == before
    assert {f: stamps(finished / f) for f in folders} == times


def test_workers_get_the_absolute_path_of_a_relative_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    class Elsewhere(SequentialExecutor):
        def map(self, task, items, names, on_report):
            seen.extend(item.run.runtime for item in items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline(load("runs"), Backend(Elsewhere()), Progress(quiet=True)).experts()
    assert seen and {runtime.storage for runtime in seen} == {str(tmp_path / "runs")}


def test_another_evaluation_reuses_experts_and_phases(storage):
    times = {f: stamps(storage / f) for f in ("data", "cache", "experts", "phases")}
    other = load(storage, "evaluate.epochs=1", "evaluate.students=1")
    assert run_folder(other) != run_folder(load(storage))
    go(other, "evaluate")
    assert {f: stamps(storage / f) for f in times} == times
    assert len(list((storage / "baselines").iterdir())) == 2


def test_fewer_students_reuse_the_random_pairs(storage):
    before = stamps(storage / "baselines")
    go(load(storage, "evaluate.students=1"), "evaluate")
    assert stamps(storage / "baselines") == before


def test_another_distillation_reuses_experts_and_baselines(storage):
    times = {f: stamps(storage / f) for f in ("data", "cache", "experts", "baselines")}
    go(load(storage, "distill.lr_image=2", "distill.steps=1"), "evaluate")
    assert {f: stamps(storage / f) for f in times} == times
    assert len(list((storage / "phases").iterdir())) == 2


def test_over_budget_stops_before_anything_is_trained(tmp_path):
    run = load(tmp_path, "distill.budget=8")
    with pytest.raises(ValueError, match=r"budget 8 allows .* phases of 4\+4 = 8 pairs need .*pairs of the phases to"):
        go(run)
    assert not (tmp_path / "experts").exists() and not (tmp_path / "data").exists()


def test_over_budget_can_be_a_warning(storage):
    run = load(storage, "distill.budget=8", "distill.budget_check=warn")
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        said = []
        pipeline.progress.say = said.append
        pipeline.check_budget()
    assert len(said) == 1 and said[0].startswith("warning: budget 8 allows ")


def test_an_expert_that_diverges_says_what_to_change_and_not_to_resume(tmp_path):
    with pytest.raises(MustChange, match="expert 0 on .* diverged in epoch 1.*lower experts.lr_image"):
        go(load(tmp_path, "experts.lr_image=1e38", "experts.lr_text=1e38"), "experts")


def test_results_of_other_data_are_not_mixed_with_new_ones(tmp_path):
    for seed in (0, 1):
        ingest(load(tmp_path, f"data.scenes.seed={seed}").data, tmp_path / str(seed))

    def with_data(name):
        return load(tmp_path / "runs", data={"source": "dataset", "root": str(tmp_path / name), "image_size": 16})

    go(with_data("0"), "ingest")
    shutil.copytree(tmp_path / "0", tmp_path / "moved")
    assert go(with_data("moved"), "ingest").path == tmp_path / "moved", "the data folder may be moved"
    assert go(with_data("1"), "ingest").path == tmp_path / "1", "data may be corrected while there are no results"
    (run_folder(with_data("1")) / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has results of other data; .* `name`") as wrong:
        go(with_data("0"), "ingest")
    assert not re.search("[0-9a-f]{64}", str(wrong.value))


@pytest.fixture
def photos(tmp_path):
    """Fixture: a function that writes a table of n images and returns a run with these images and `overrides`."""
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")

    def write(n, *overrides):
        rows = "".join(f"{i}.png,image {i}\n" for i in range(n))
        (tmp_path / "photos" / "captions.csv").write_text("image,caption\n" + rows)
        data = {"source": "table", "root": str(tmp_path / "photos"), "table": {"file": "captions.csv"}}
        return load(tmp_path / "runs", *overrides, data={**data, "image_size": 16, "splits": {"val": 1, "test": 1}})

    return write


def test_new_rows_in_a_table_are_used_after_the_advice_of_the_messages(photos):
    run = photos(5)
    dataset = go(run, "ingest")
    (run_folder(run) / "evaluation.json").write_text("{}")
    photos(6)
    with pytest.raises(ValueError) as refused:
        go(run, "ingest")
    assert "the annotations changed (captions.csv) since" in str(refused.value)
    assert f"{dataset.path} was written" in str(refused.value) and "delete this folder and change `name`" in str(
        refused.value
    )
    shutil.rmtree(dataset.path)
    with pytest.raises(ValueError, match="has results of other data; to start .* change `name`"):
        go(run, "ingest")
    renamed = go(photos(6, "name=renamed"), "ingest")
    assert sum(count["pairs"] for count in renamed.counts.values()) == 6


def test_a_failed_start_keeps_the_run_file_of_earlier_results(photos, tmp_path):
    run = photos(5)
    with pytest.raises(ValueError, match="is not a folder"):
        go(photos(5, "data.root=/nowhere"), "ingest")
    assert config.load(run_folder(run) / "run.yaml").data.root == "/nowhere", "the first start can be resumed"
    go(run, "ingest")
    before = (run_folder(run) / "run.yaml").read_text()
    assert config.load(run_folder(run) / "run.yaml") == run
    with pytest.raises(ValueError, match="is not a folder"):
        go(photos(5, "data.root=/nowhere"), "ingest")
    assert (run_folder(run) / "run.yaml").read_text() == before
    (tmp_path / "photos").rename(tmp_path / "moved")
    moved = config.load(run, [f"data.root={tmp_path / 'moved'}"])
    go(moved, "ingest")
    assert config.load(run_folder(run) / "run.yaml") == moved


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("flickr30k", {"val": "flickr30k_val_first60.json", "test": "flickr30k_test_first60.json"}),
        ("coco", {"train": "coco_karpathy_test_first60.json", "test": "coco_karpathy_test_six_captions.json"}),
    ],
)
def test_real_annotations_without_their_images_are_counted_and_then_refused(shared, tmp_path, layout, files):
    root = str(shared / "reference" / "real_annotations")
    data = {"source": "lists", "layout": layout, "root": root, "annotations": files, "image_size": 16}
    run = load(tmp_path, data=data)
    for step in ("ingest", "all"):
        with pytest.raises(
            ValueError, match=r"the ingest kept 0 of \d+ images: \d+ missing_file .*(\n.*)*quarantine.jsonl"
        ):
            go(run, step)
    assert not (tmp_path / "experts").exists()


def test_a_time_limit_stops_a_run_like_ctrl_c(storage):
    def limited(minutes):
        return load(storage, "distill.phases.0.iterations=20000", f"runtime.time_limit={minutes}")

    said = []
    progress = Progress(quiet=True)
    progress.say = said.append
    with pytest.raises(KeyboardInterrupt), open_pipeline(limited(0.05), progress) as pipeline:
        pipeline.distill()
    assert said[-1] == "the time limit of 0.05 minutes (runtime.time_limit) was reached"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with (
        pytest.raises(ValueError, match="runtime.time_limit works only in the main thread"),
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(go, limited(1), "ingest").result()


def test_health_is_computed_for_every_snapshot_and_repeatable(tmp_path):
    run = load(tmp_path)
    results = go(run, "health")
    assert [row.get("iterations") for row in results["rows"]] == [[0, 0], [2, 2], [4, 3], None, None]
    assert [row["set"] for row in results["rows"]] == [*["distilled"] * 3, "random pairs", "val"]
    assert [row["pairs"] for row in results["rows"]] == [8, 8, 8, 8, 5]
    first, last = results["rows"][0], results["rows"][2]
    assert first["stripes"] == 0 < last["stripes"]
    assert first["cosine_image"] != last["cosine_image"]
    file = run_folder(run) / "health.json"
    before = file.read_bytes()
    shutil.rmtree(run_folder(run))
    go(run, "health")
    assert file.read_bytes() == before


def test_a_collapsed_set_is_warned_of(tmp_path):
    run = load(tmp_path)
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        pipeline.distill()
        places = pipeline.item().paths
        for p, iteration in enumerate((4, 3)):
            file = places.set(p, iteration)
            whole = load_set(file)
            save_set(replace(whole, images=whole.images[:1].expand_as(whole.images).clone()), file)
        assert any("image" in message for message in pipeline.health()["warnings"])
