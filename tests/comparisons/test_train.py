"""Check `rmdd train`: a model has the weights of the student in the evaluation of its run, to the bit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import QUIET
from typer.testing import CliRunner

import rmdd
from rmdd import config
from rmdd.cli.app import app
from rmdd.core.files import read_json
from rmdd.evaluate.protocol import Job, StudentProtocol, train_and_score
from rmdd.experts.store import Store
from rmdd.pipeline import open_pipeline
from rmdd.runs.students import training_pairs


@pytest.fixture
def run(storage):
    """Fixture: the first of the two finished runs."""
    (file,) = storage.glob("one-*/run.yaml")
    return config.load(file, [f"runtime.storage={storage}"])


def student_of(run, job):
    """Return the model that the evaluation trains for a job, and its scores."""
    kept = []
    with open_pipeline(run, QUIET) as pipeline:
        item = replace(pipeline.distilled(), job=job, iterations=tuple(pipeline.evaluate()["iterations"]))
        splits, device = [pipeline.prepared_split(name) for name in ("val", "test")], torch.device("cpu")
        subsets = training_pairs(item, pipeline.storage)
        scores = train_and_score(job, StudentProtocol.of(item.run), subsets, *splits, device, finished=kept.append)
    return kept[0], scores


def assert_same_bits(model, expected):
    weights = expected.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in model.encoder.state_dict().items())
    assert model.encoder.temperature == expected.temperature


def test_student_i_of_a_set_has_the_bits_of_student_i_of_the_evaluation(run, storage, tmp_path):
    folder = storage / run.folder_name
    expected, scores = student_of(run, Job("student", 1))
    assert scores["val"] == read_json(folder / "students" / "student-001.json")["val"]
    model = rmdd.train(folder, student=1, progress=QUIET)
    assert model.path.parent == storage / "models" and model.path.name.startswith("one-set-")
    assert_same_bits(rmdd.load_model(model.path), expected)
    assert model.scores == {"val": scores["val"]} and model.trained_on["pairs"] == 7
    alone = shutil.copytree(folder / "set", tmp_path / "alone")
    portable = rmdd.train(alone, "set", [f"runtime.storage={tmp_path / 'new'}"], student=1, progress=QUIET)
    assert_same_bits(portable, expected)
    assert portable.scores == {} and not (tmp_path / "new" / "data").exists()


def test_random_pairs_a_coreset_and_all_pairs_give_the_models_of_the_evaluation(run, storage):
    folder = storage / run.folder_name
    evaluation = read_json(folder / "evaluation.json")
    chosen = {name: evaluation["baseline"][name] for name in ("loss", "lr")}
    expected, scores = student_of(run, Job("baseline", 2, **chosen))
    drawn = rmdd.train(folder, "random", student=2, progress=QUIET)
    assert_same_bits(drawn, expected)
    assert drawn.scores["val"] == scores["val"] and drawn.trained_on["pairs"] == run.distill.budget
    assert rmdd.train(run, "random:5", progress=QUIET).trained_on["pairs"] == 5

    full = rmdd.train(folder, "all", student=1, out=storage / "full", progress=QUIET)
    (store,) = (storage / "experts").glob("*/store.json")
    weights = Store.open(store.parent)
    kept = weights.read(1, weights.epochs)
    assert all(torch.equal(t, kept[name]) for name, t in full.encoder.state_dict().items())
    (record,) = storage.glob("baselines/*/full-001.json")
    assert full.scores["val"] == read_json(record)["val"] and full.path == storage / "full"

    coreset = rmdd.coreset(run, method="random", pairs=6, progress=QUIET)
    (subset,) = storage.glob("coresets/*/subset.json")
    compared = rmdd.compare([f"mine={subset.parent}"], run, progress=QUIET)
    model = rmdd.train(folder, subset.parent, progress=QUIET)
    assert model.trained_on["pairs"] == len(coreset) and model.trained_on["method"] == "random"
    (records,) = {p.parent for p in storage.glob("comparisons/students/*/baseline-000.json")}
    assert model.scores["val"] == read_json(records / "baseline-000.json")["val"]
    assert model.trained_on["lr"] == compared.rows[0]["chosen"]["lr"]


def test_the_command_prints_the_score_and_the_folder(run, storage):
    words = ["train", str(storage / run.folder_name), "--set", "evaluate.epochs=1", "--quiet"]
    facts = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    text = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert text.splitlines() == [
        "trained on 7 pairs (distilled set)",
        f"val R@mean: {facts['scores']['val']['R@mean']:.1f} %",
        f"model: {facts['model']}",
    ]
    assert rmdd.load_model(facts["model"]).scores == facts["scores"]


def test_mistakes_are_named_before_any_training(run, storage, tmp_path):
    def refused(*arguments, **named):
        with pytest.raises(config.ConfigError) as error:
            rmdd.train(*arguments, progress=QUIET, **named)
        return str(error.value)

    folder = storage / run.folder_name
    unfinished = {**run.model_dump(mode="json"), "name": "new"}
    assert f"{storage}/new-" in refused(unfinished) and "has no distilled set yet; start its run" in refused(unfinished)
    assert "--on full: give set, random, random:N, all or the folder" in refused(run, "full")
    assert "--set model.width=4: a set fits the towers" in refused(folder, "set", ["model.width=4"])
    assert "no set.json, subset.json" in refused(run, tmp_path)
    assert "no set.json, subset.json" in refused(tmp_path)
    shutil.copytree(folder / "set", tmp_path / "bare", ignore=lambda *_: ["set.json", "captions.parquet"])
    assert "is no run or distilled set of rmdd" in refused(tmp_path / "bare")
    shutil.rmtree(folder / "set")
    assert "has no distilled set yet" in refused(folder)
