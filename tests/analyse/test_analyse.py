"""The analyses on a tiny run, through the words that people type and the functions below them."""

import copy
import csv
import json
import math

import pytest
from typer.testing import CliRunner

from rmdd import config
from rmdd.analyse.linearity import linearity
from rmdd.analyse.tables import collapse_members, table_settings
from rmdd.cli import app
from rmdd.experts.store import Store
from rmdd.pipeline import open_pipeline
from rmdd.places import places_of, run_folder
from rmdd.progress import Progress

EPOCHS = 3
PHASES = [
    {"pairs": 4, "start": 0, "stop": 1, "endpoint": 2, "iterations": 2},
    {"pairs": 4, "start": 1, "stop": 2, "endpoint": 3, "iterations": 2},
]
TINY = {
    "name": "tiny",
    "data": {"source": "scenes", "image_size": 16, "scenes": {"train": 12, "val": 5, "test": 5, "size": 16}},
    "model": {
        "image": {"name": "convnet", "weights": "random:0", "widths": [4], "groups": 2, "projection": "linear"},
        "text": {"name": "hashing", "width": 16, "projection": "linear"},
        "width": 8,
    },
    "experts": {
        "num": 2,
        "epochs": EPOCHS,
        "batch": 16,
        "keep": "all",
        "augment": {"crop": False, "flip": 0, "randaugment_ops": 0},
    },
    "distill": {
        "budget": 9,
        "phases": PHASES,
        "batch": 3,
        "steps": 2,
        "lr_image": 1.0,
        "lr_text": 1.0,
        "lr_similarity": 0.1,
        "lr_lr": 1e-5,
    },
    "evaluate": {
        "epochs": 2,
        "students": 2,
        "reference": False,
        "baseline_lrs": [0.1],
        "baseline_losses": ["infonce"],
        "baseline_draws": 2,
    },
}


def load(storage, *overrides):
    runtime = {"storage": str(storage), "ray": "off", "track": "none"}
    return config.load({**copy.deepcopy(TINY), "runtime": runtime}, overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A storage with the experts of the tiny run, and its run file."""
    folder = tmp_path_factory.mktemp("analyse")
    run = load(folder / "runs")
    (folder / "run.yaml").write_text(config.dump(run))
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        pipeline.experts()
    return folder


def say(trained, *words):
    """What `rmdd analyse WORDS --json` prints."""
    word, *rest = words
    done = CliRunner().invoke(app, ["analyse", word, str(trained / "run.yaml"), *rest, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_gradients_of_both_kinds_of_trajectory(trained):
    found = say(trained, "gradients", "--draws", "1")
    assert [(r["trajectory"], r["of"]) for r in found["rows"]] == [
        (t, p) for t in ("original", "shortcut") for p in ("images", "texts")
    ]
    folder = run_folder(load(trained / "runs")) / "analyse"
    rows = rows_of(folder / "gradients.csv")
    assert len(rows) == 2 * 2 * EPOCHS**2
    own = {(r["trajectory"], r["of"], r["start"], r["other"]): float(r["cosine"]) for r in rows}
    for (kind, part, a, b), cosine in own.items():
        assert cosine == pytest.approx(own[kind, part, b, a]) and (a != b or cosine == pytest.approx(1))
    first = found["rows"][0]
    beside = [own["original", "images", str(t), str(t + 1)] for t in range(EPOCHS - 1)]
    assert first["adjacent"] == pytest.approx(sum(beside) / len(beside))
    assert {r["start"] for r in rows_of(folder / "gradient_norms.csv")} == {"0", "1", "2"}
    assert (folder / "gradients.svg").stat().st_size > 1000


def test_components_of_the_gradients(trained):
    found = say(trained, "pca", "--draws", "2", "--endpoint", "2")
    assert all(0 <= r["second"] <= r["first"] <= 1 for r in found["rows"])
    points = rows_of(found["files"][0])
    assert len(points) == 2 * 2 * 2 * 2, "kinds, starts, experts, draws"
    for kind in ("original", "shortcut"):
        assert sum(float(p["first"]) for p in points if p["trajectory"] == kind) == pytest.approx(0, abs=1e-6)


def test_the_collapse_has_teacher_and_student(trained):
    found = say(trained, "collapse", "--epochs", "1,3", "--iterations", "2", "--trajectories", "original,shortcut")
    assert [(r["trajectory"], r["epoch"]) for r in found["rows"]] == [
        ("original", 1),
        ("original", 3),
        ("shortcut", 1),
        ("shortcut", 3),
    ]
    run = load(trained / "runs")
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        store = Store.open(places_of(run, pipeline.ingest()).store)
    val = [store.record(e)["metrics"][3]["val"] for e in (0, 1)]
    assert found["rows"][1]["teacher"] == pytest.approx(sum(val) / 2)
    assert all(0 <= r["student"] <= 100 for r in found["rows"])
    assert len(list((trained / "runs" / "experts").glob("*/"))) == 1, "no expert is trained again"


def test_a_cell_of_the_collapse_is_one_phase_with_the_whole_budget():
    run = load("runs", "distill.budget=9")
    (member,) = collapse_members(run, [2], ["original"], 7)
    (phase,) = member.run.distill.phases
    assert (phase.start, phase.stop, phase.iterations, phase.pairs) == (0, 2, 7, 8)
    with pytest.raises(ValueError, match=r"below epoch 4 do not fit experts of 3 epochs; give epochs from 1 to 3"):
        collapse_members(run, [4], ["original"])


def test_tables_of_phases():
    run = load("runs")
    assert [[(p["start"], p["stop"]) for p in row] for row in table_settings(run, "delta").values()] == [
        [(0, 1), (0, 1)],
        [(0, 1), (1, 2)],
        [(0, 1), (2, 3)],
    ]
    shift = table_settings(run, "shift")
    assert shift["as given"] == [p.model_dump(mode="json") for p in run.distill.phases]
    assert [p["start"] for p in shift["ranges not shifted"]] == [0, 0]
    assert [p["endpoint"] for p in shift["endpoints not shifted"]] == [2, 2]
    assert list(table_settings(run, "endpoints")) == ["1+2", "2+3"], "3+4 ends past the experts"
    with pytest.raises(ValueError, match="the run has one; give it two or more"):
        table_settings(load("runs", f"distill.phases={json.dumps(PHASES[:1])}"), "shift")
    with pytest.raises(ValueError, match="one of shift, endpoints, delta"):
        table_settings(run, "sizes")


def test_a_table_is_a_sweep(trained):
    found = say(trained, "sweep", "--table", "endpoints")
    assert [r["row"] for r in found["rows"]] == ["1+2", "2+3"] and all(r["student"] >= 0 for r in found["rows"])
    assert (trained / "runs" / "sweeps").is_dir()


def test_the_gradient_is_linear_in_the_start_on_a_straight_path(trained):
    """The ratio settles, once no ReLU turns between the two starts any more."""
    with open_pipeline(load(trained / "runs"), Progress(quiet=True)) as pipeline:
        found = linearity(pipeline, halvings=10, start=1.3)
    assert [row["d"] for row in found["rows"]] == [0.1 / 2**i for i in range(11)]
    for name in ("shortcut", "joined"):
        ratios = [row[name] for row in found["rows"]]
        assert all(math.isfinite(r) and r > 0 for r in ratios)
        assert abs(ratios[-1] - ratios[-2]) < 0.01 * ratios[-1]


def test_a_start_past_the_path_is_refused(trained):
    done = CliRunner().invoke(app, ["analyse", "linearity", str(trained / "run.yaml"), "--start", "1.95", "--quiet"])
    assert done.exit_code == 1 and "must lie in 0-2; give another start" in done.stderr


def test_stores_that_keep_endpoints_have_shortcuts_only(trained):
    sets = ["--set", "experts.keep=endpoints"]
    done = CliRunner().invoke(app, ["analyse", "gradients", str(trained / "run.yaml"), *sets, "--quiet"])
    assert done.exit_code == 1
    assert "original trajectories need every epoch" in done.stderr and "experts.keep: all" in done.stderr
    assert "--shortcut-only" in done.stderr
    found = say(trained, "gradients", *sets, "--shortcut-only", "--draws", "1")
    assert {r["trajectory"] for r in found["rows"]} == {"shortcut"}
