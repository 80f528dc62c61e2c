"""The example method of CONTRIBUTING, installed outside of rmdd and named by its import path or its entry point."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from manual import example, install

import rmdd
from rmdd import config, methods
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.methods.about import about, listing
from rmdd.models.dual import build
from rmdd.pipeline import open_pipeline

METHOD = example("decaying.py")
EXAMPLE = example("decaying.yaml")
PRESET = """
name: toy
data: {image_size: 16, scenes: {train: 12, val: 5, test: 5, size: 16}}
model:
  image: {name: convnet, weights: random, widths: [4], groups: 2, projection: linear}
  text: {name: hashing, width: 16, projection: linear}
  width: 8
experts: {num: 1, epochs: 2, batch: 16, augment: {crop: false, flip: 0, randaugment_ops: 0}}
distill:
  method: NAME
  options: {decay: 0.5}
  budget: 5
  phases: [{pairs: 4, start: 0, stop: 1, endpoint: 1, iterations: 3}]
  batch: 3
  steps: 2
  lr_image: 1
  lr_text: 1
  lr_similarity: 0.1
  lr_lr: 0.00001
evaluate: {epochs: 1, students: 1, reference: false, baseline_lrs: [0.1], baseline_losses: [infonce], baseline_draws: 1}
runtime: {ray: off, track: none, num_cpus: 2}
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Fixture: a folder on the Python path that holds the example method as a module."""
    (tmp_path / "decaying.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("decaying", None)


@pytest.fixture
def installed(outside):
    """Fixture: like `outside`, and the method also has an entry point, as if its package were installed."""
    install(outside, "decaying", "rmdd.methods")
    importlib.invalidate_caches()
    return outside


def preset(folder, name):
    (folder / "toy.yaml").write_text(PRESET.replace("NAME", name))
    return folder / "toy.yaml"


@pytest.mark.parametrize(("name", "row"), [("decaying:Decaying", "Decaying"), ("decaying", "decaying")])
def test_it_runs_from_its_preset_to_a_page(installed, name, row):
    run = config.load(preset(installed, name), [f"runtime.storage={installed / 'runs'}"])
    assert (run.distill.method, run.distill.options, run.distill.inner_dropout) == (name, {"decay": 0.5}, "off")
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        result = pipeline.all()
    assert set(result.evaluation["table"]) == {"random", row, "full"}
    assert rmdd.load(result.set).method == row and f"distilled by {row}" in result.report.read_text()
    assert config.load(run_folder(run) / "run.yaml") == run


def test_it_is_listed_with_what_it_says(installed):
    (listed,) = [each for each in listing() if each["name"] == "decaying"]
    assert (
        listed["summary"] == "Decaying: trajectory matching whose students have weight decay."
        and listed["place"] == "decaying:Decaying"
    )
    facts = about("decaying:Decaying")
    assert facts["options"] == {"decay": "weight of the squared parameters (default 0.1)"}
    assert facts["defaults"] == {"distill": {"inner_dropout": "off"}}


def test_its_run_file_loads(outside):
    (outside / "example.yaml").write_text(EXAMPLE)
    run = config.load(outside / "example.yaml", ["data.root=somewhere"])
    assert (run.name, run.distill.options, run.distill.inner_dropout) == ("emoji_decaying_100", {"decay": 0.5}, "off")


def test_its_hook_is_what_students_minimise(outside):
    file = preset(outside, "decaying:Decaying")
    run, undecayed = config.load(file), config.load(file, ["distill.options.decay=0"])
    ours, plain = (methods.find(r.distill.method)(r) for r in (run, undecayed))
    model = build(run.model, 16, run.data.image_size, 0, "student", 0)
    params = {name: p.detach() for name, p in model.trained().items()}
    drawn = ours.draw(0, 0, 1, {"image": (0, 1), "text": (0, 1)})
    batch = torch.rand(3, 3, 16, 16), torch.rand(3, 16), torch.eye(3), 0
    added = ours.student_loss(model, drawn)(params, *batch) - plain.student_loss(model, drawn)(params, *batch)
    torch.testing.assert_close(added, 0.5 * sum(p.square().sum() for p in params.values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distill.options.decay=-1", "distill.options.decay: Input should be greater than or equal to 0, found -1"),
        ("distill.options.decays=1", "distill.options.decays: unknown key"),
        ("distill.method=decaying:Decayin", "cannot import method 'decaying:Decayin'"),
        ("distill.method=decays:Decaying", "or add its folder to PYTHONPATH"),
        ("distill.method=decaying:Field", "derive it from rmdd.methods.Method"),
        ("distill.method=decay", "unknown method 'decay'"),
    ],
)
def test_mistakes_in_it_are_reported_as_config_errors(outside, change, words):
    with pytest.raises(config.ConfigError) as caught:
        config.load(preset(outside, "decaying:Decaying"), [change])
    assert words in str(caught.value) and len(caught.value.mistakes) == 1


def test_a_method_may_not_be_named_like_a_row_of_the_result_table(outside):
    with (outside / "decaying.py").open("a") as file:
        file.write("\n\nfull = Decaying\n")
    with pytest.raises(config.ConfigError, match="'full' is the name of a baseline"):
        config.load(preset(outside, "decaying:full"))


@pytest.mark.ray
def test_workers_of_ray_find_it_on_the_python_path(outside, tmp_path):
    storage = f"runtime.storage={tmp_path / 'runs'}"
    file = preset(outside, "decaying:Decaying")
    with open_pipeline(config.load(file, [storage]), Progress(quiet=True)) as pipeline:
        pipeline.experts()
    command = ["distill", str(file), "--json", "--set", "runtime.ray=on", "--set", storage]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(outside), os.getcwd()]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rmdd", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (phase,) = json.loads(done.stdout)["phases"]
    assert len((Path(phase) / "metrics.jsonl").read_text().splitlines()) == 3
