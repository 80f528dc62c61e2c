"""Tests of the `rmdd analyse` commands on a tiny run, and of the functions that compute the results."""

import csv
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from rmdd import config
from rmdd.analyse.linearity import linearity
from rmdd.analyse.setting import TRAJECTORIES, Setting
from rmdd.analyse.tables import collapse_axes, collapse_members, table_settings
from rmdd.cli.app import app
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.experts.store import Store
from rmdd.experts.train import kept_epochs
from rmdd.methods import matching_method
from rmdd.pipeline import open_pipeline
from rmdd.runs.paths import paths_of
from rmdd.searches.sweeps import members_in

EPOCHS = 3
PHASES = [
    {"pairs": 4, "start": 0, "stop": 1, "endpoint": 2, "iterations": 2},
    {"pairs": 4, "start": 1, "stop": 2, "endpoint": 3, "iterations": 2},
]
TINY = tiny.changed(
    model={"image": {"weights": "random:0"}},
    experts={"num": 2, "epochs": EPOCHS, "keep": "all"},
    distill={
        "phases": PHASES,
        "reuse_graphs": 2,  # keeps the graphs of both inner steps
        "estimator": "exact",  # `gradients` and `pca` use first_order nevertheless
    },
)


@pytest.fixture
def ink(painted):
    with painted():
        yield


def load(storage, *overrides):
    return config.load(tiny.stored(storage, TINY), overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Fixture: a tiny run with trained experts. Return the folder of its run file and storage."""
    folder = tmp_path_factory.mktemp("analyse")
    run = load(folder / "runs")
    (folder / "run.yaml").write_text(config.dump(run))
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        pipeline.experts()
    return folder


def analyse(trained, *words):
    """Run `rmdd analyse WORDS --json` and return the parsed output."""
    word, *rest = words
    done = CliRunner().invoke(app, ["analyse", word, str(trained / "run.yaml"), *rest, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_gradients_of_both_kinds_of_trajectory(trained, ink):
    result = analyse(trained, "gradients", "--draws", "1")
    assert [(r["trajectory"], r["of"]) for r in result["rows"]] == [
        (t, p) for t in ("original", "shortcut") for p in ("images", "texts")
    ]
    folder = run_folder(load(trained / "runs")) / "analyse"
    rows = rows_of(folder / "gradients.csv")
    assert len(rows) == 2 * 2 * EPOCHS**2
    cosines = {(r["trajectory"], r["of"], r["start"], r["other"]): float(r["cosine"]) for r in rows}
    for (kind, part, a, b), cosine in cosines.items():
        assert cosine == pytest.approx(cosines[kind, part, b, a]) and (a != b or cosine == pytest.approx(1))
    first = result["rows"][0]
    adjacent = [cosines["original", "images", str(t), str(t + 1)] for t in range(EPOCHS - 1)]
    assert first["adjacent"] == pytest.approx(sum(adjacent) / len(adjacent))
    assert {r["start"] for r in rows_of(folder / "gradient_norms.csv")} == {"0", "1", "2"}
    assert (folder / "gradients.svg").stat().st_size > 1000


def test_components_of_the_gradients(trained):
    result = analyse(trained, "pca", "--draws", "2", "--endpoint", "2")
    assert all(0 <= r["second"] <= r["first"] <= 1 for r in result["rows"])
    points = rows_of(result["files"][0])
    assert len(points) == 2 * 2 * 2 * 2, "expected 2 trajectories x 2 starts x 2 experts x 2 draws"
    for kind in ("original", "shortcut"):
        assert sum(float(p["first"]) for p in points if p["trajectory"] == kind) == pytest.approx(0, abs=1e-6)


def test_the_collapse_table_has_teacher_and_student(trained, ink):
    result = analyse(trained, "collapse", "--epochs", "1,3", "--iterations", "2", "--trajectories", "original,shortcut")
    words = re.findall(r"<!-- (.*?) -->", Path(result["files"][1]).read_text())
    assert "students: stop (exclusive end of the start range); teacher: epoch" in words
    assert not [w for w in words if re.fullmatch(r"\d\.\d+", w) and float(w) <= 3], (
        "epochs on the axis must be integers"
    )
    assert [(r["trajectory"], r["stop"]) for r in result["rows"]] == [
        ("original", 1),
        ("original", 3),
        ("shortcut", 1),
        ("shortcut", 3),
    ]
    run = load(trained / "runs")
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        store = Store.open(paths_of(run, pipeline.ingest()).store)
    val = [store.record(e)["metrics"][3]["val"] for e in (0, 1)]
    assert result["rows"][1]["teacher"] == pytest.approx(sum(val) / 2)
    assert all(0 <= r["student"] <= 100 for r in result["rows"])
    assert len(list((trained / "runs" / "experts").glob("[!.]*/"))) == 1, (
        "all cells of the table must share the experts"
    )


def test_a_cell_of_the_collapse_is_one_phase_with_the_whole_budget():
    run = load("runs", "distill.budget=9")
    (member,) = collapse_members(run, [2], ["original"], 7)
    (phase,) = member.run.distill.phases
    assert (phase.start, phase.stop, phase.iterations, phase.pairs) == (0, 2, 7, 8)
    assert member.label == "original, 2"
    with pytest.raises(
        config.ConfigError, match=r"stop 4 .exclusive end.* not fit experts with 3 epochs; give .* 1 to 3"
    ):
        collapse_axes(EPOCHS, range(EPOCHS + 1), run.distill.match_epochs, [4], ["original"])


ONE = ["distill.phases.1.start=0", "distill.phases.1.stop=1"]
OTHER_METHOD = [
    f"distill.phases={json.dumps([PHASES[0], PHASES[1] | {'start': 0, 'stop': 1}])}",
    "distill.similarity.kind=full",
    "experts.keep=all",
]


@pytest.mark.parametrize(
    "sets",
    [
        ["distill.match_epochs=2", *ONE],
        ["distill.start_rule=inclusive", "distill.phases.0.endpoint=3", *ONE],
        ["distill.endpoint_rule=exclusive", "distill.phases.0.endpoint=3", "distill.phases.1.endpoint=4"],
        ["distill.method=mct", "distill.trajectory=shortcut", *OTHER_METHOD],
        ["distill.method=mct", "distill.options.anchors=3", *OTHER_METHOD],
        ["distill.method=amd", *OTHER_METHOD],
    ],
)
def test_a_cell_draws_all_its_start_epochs_for_every_setting_of_the_run(sets):
    """Every start below `stop` must be drawn, for the default stops and both kinds of trajectory."""
    run = load("runs", *sets)
    epochs, kinds = collapse_axes(EPOCHS, range(EPOCHS + 1), run.distill.match_epochs, None, TRAJECTORIES)
    cells = collapse_members(run, epochs, kinds)
    assert epochs[-1] == EPOCHS - run.distill.match_epochs + 1 and len(cells) == 2 * len(epochs)
    for cell in cells:
        (phase,) = cell.run.distill.phases
        draws = [matching_method(cell.run).draw(0, i, 2, phase.ranges) for i in range(30)]
        assert {d.start for d in draws} == {d.start_text for d in draws} == set(range(phase.stop))
        assert cell.run.distill.trajectory == "original" or cell.run.endpoint_of(0) == EPOCHS


def test_cells_use_the_store_of_the_run():
    """The runs of a table must keep the expert epochs of the original run; otherwise new experts would be trained."""
    run = load("runs", "experts.keep=endpoints", f"distill.phases={json.dumps(PHASES[:1])}")
    (member,) = collapse_members(run, [1], ["shortcut"])
    assert kept_epochs(member.run.experts, member.run.endpoints) == kept_epochs(run.experts, run.endpoints) == (2, 3)


def test_tables_of_phases():
    run = load("runs")
    delta, skipped = table_settings(run.distill, EPOCHS, "delta")
    assert not skipped
    assert [[(p["start"], p["stop"]) for p in row] for row in delta.values()] == [
        [(0, 1), (0, 1)],
        [(0, 1), (1, 2)],
        [(0, 1), (2, 3)],
    ]
    shift, _ = table_settings(run.distill, EPOCHS, "shift")
    assert shift["as given"] == [p.model_dump(mode="json") for p in run.distill.phases]
    assert [p["start"] for p in shift["ranges not shifted"]] == [0, 0]
    assert [p["endpoint"] for p in shift["endpoints not shifted"]] == [2, 2]
    rows, skipped = table_settings(run.distill, EPOCHS, "endpoints")
    assert list(rows) == ["1+2", "2+3"] and skipped == ["3+4"], "experts have no epoch 4"
    twice = load("runs", f"distill.phases={json.dumps([PHASES[0]] * 2)}")
    alike, _ = table_settings(twice.distill, EPOCHS, "endpoints")
    assert list(alike) == ["1+1", "2+2", "3+3"]
    original = load("runs", "distill.trajectory=original")
    assert list(table_settings(original.distill, EPOCHS, "shift")[0]) == ["as given", "ranges not shifted"]
    apart = json.dumps([PHASES[0] | {"start_text": 0, "stop_text": 1}, PHASES[1]])
    of_amd = ["distill.method=amd", "distill.options.ranges=stated", "distill.similarity.kind=full"]
    independent = load("runs", f"distill.phases={apart}", *of_amd)
    moved, _ = table_settings(independent.distill, EPOCHS, "delta")
    assert [(p["start_text"], p["stop_text"]) for p in moved["delta 1"]] == [(0, 1), (1, 2)]


def test_failed_cells_are_reported_with_exit_code_1(trained):
    pairs = json.dumps([{**PHASES[0], "pairs": 100}])
    words = ["--table", "endpoints", "--set", f"distill.phases={pairs}", "--set", "distill.budget=120"]
    done = CliRunner().invoke(app, ["analyse", "sweep", str(trained / "run.yaml"), *words, "--json", "--quiet"])
    assert done.exit_code == 1 and "3 of 3 runs failed" in done.stderr and "wants 100 pairs" in done.stderr
    assert all("wants 100 pairs" in row["error"] for row in json.loads(done.stdout)["rows"])


def test_a_table_is_a_sweep(trained, ink):
    result = analyse(trained, "sweep", "--table", "endpoints")
    assert [r["row"] for r in result["rows"]] == ["1+2", "2+3"] and all(r["student"] >= 0 for r in result["rows"])
    words = re.findall(r"<!-- (.*?) -->", Path(result["files"][1]).read_text())
    assert "students by endpoints of the phases" in words and {"1+2", "2+3"} <= set(words)
    assert [m.label for m in members_in(result["sweep"])] == ["1+2", "2+3"]
    assert (trained / "runs" / "sweeps").is_dir()


def test_the_gradient_is_linear_in_the_start_on_a_straight_path(trained):
    """The ratio must converge as the distance shrinks. At a small distance, no ReLU switches between the two starts."""
    with open_pipeline(load(trained / "runs"), Progress(quiet=True)) as pipeline:
        result = linearity(pipeline, halvings=10, start=1.3)
    for name in ("shortcut", "joined"):
        rows = [row for row in result["rows"] if row["trajectory"] == name]
        assert [(row["start"], row["distance"]) for row in rows] == [(1.3, 0.1 / 2**i) for i in range(11)]
        ratios = [row["ratio"] for row in rows]
        assert all(math.isfinite(r) and r > 0 for r in ratios)
        assert abs(ratios[-1] - ratios[-2]) < 0.01 * ratios[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["linearity", "--start", "1.95"], "must lie in 0-2; give another --start"),
        (["linearity", "--endpoint", "1"], "must lie in 0-0; give another --start or --endpoint"),
        (["gradients", "--endpoint", "4"], "--endpoint 4 is outside of the experts' epochs; give one from 1 to 3"),
        (["gradients", "--draws", "0"], "--draws"),
        (["pca", "--endpoint", "2", "--experts", "1", "--draws", "1"], "needs 3 gradients but gets 2"),
        (["collapse", "--epochs", "2,x"], "--epochs 2,x: write whole numbers, such as 2,4,6"),
        (["collapse", "--epochs", "0,2,4"], "stop 4 (exclusive end of the start range) does not fit experts with 3"),
        (
            ["collapse", "--trajectories", "orignal"],
            "unknown trajectory 'orignal'; give one or both of original, shortcut",
        ),
        (["sweep", "--table", "sizes"], "unknown table 'sizes'; give one of shift, endpoints, delta"),
        (["sweep", "--set", "distill.phases=" + json.dumps(PHASES[:1])], "distill.phases has one; list two or more"),
        (["sweep", "--table", "endpoints", "--set", "distill.trajectory=original"], "has no endpoint to move"),
        (["sweep", "--table", "endpoints", "--set", "experts.keep=endpoints"], "lacks the epochs [1]"),
        (["collapse", "--set", "distill.budget=2"], "budget 2 allows"),
        (["collapse", "--set", "experts.keep=endpoints"], "original trajectories need every epoch"),
        (["gradients", "--set", "experts.keep=endpoints"], "experts.keep: all, or give --shortcut-only"),
        (
            ["gradients", "--set", "experts.keep=[2,3]", "--shortcut-only", "--endpoint", "1"],
            "--endpoint 1 is not stored: the experts keep epochs [0, 2, 3]",
        ),
    ],
)
def test_invalid_options_are_rejected_before_experts_are_trained(trained, words, message):
    before = set((trained / "runs" / "experts").iterdir())
    word, *rest = words
    done = CliRunner().invoke(app, ["analyse", word, str(trained / "run.yaml"), *rest, "--set", "seed=77", "--quiet"])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert set((trained / "runs" / "experts").iterdir()) == before


def test_stores_that_keep_endpoints_allow_shortcuts(trained, ink):
    result = analyse(trained, "gradients", "--set", "experts.keep=endpoints", "--shortcut-only", "--draws", "1")
    assert {r["trajectory"] for r in result["rows"]} == {"shortcut"}
    words = set(re.findall(r"<!-- (.*?) -->", Path(result["files"][2]).read_text()))
    assert {"start epoch", "cosine", "shortcut: images", "gradient norm"} <= words


def test_norms_and_components_equal_those_of_single_gradients(trained):
    """Compare gradient_norms.csv and pca.csv with matching gradients that are computed one by one."""
    folder = run_folder(load(trained / "runs")) / "analyse"
    analyse(trained, "gradients", "--draws", "2")
    analyse(trained, "pca", "--draws", "2")
    with open_pipeline(load(trained / "runs"), Progress(quiet=True)) as pipeline:
        setting = Setting(pipeline, TRAJECTORIES)
        for kind in TRAJECTORIES:
            matcher, first = setting.matcher(kind), setting.initial(matching_method(setting.run_on(kind)))
            result = []
            for start, expert, d in itertools.product(range(EPOCHS), (0, 1), (0, 1)):
                drawn = dataclasses.replace(matcher.draw(d), expert=expert, start=start, start_text=start)
                result.append(
                    matcher.gradient(first, drawn, estimator="first_order").gradient.images.double().flatten()
                )
            rows = torch.stack(result)
            norms = [float(r["images"]) for r in rows_of(folder / "gradient_norms.csv") if r["trajectory"] == kind]
            assert norms == pytest.approx(rows.unflatten(0, (EPOCHS, 4)).mean(1).norm(dim=1).tolist(), rel=1e-4)
            points = [r for r in rows_of(folder / "pca.csv") if r["trajectory"] == kind]
            assert [float(p["length"]) for p in points] == pytest.approx(rows.norm(dim=1).tolist(), rel=1e-4)
            centred = rows - rows.mean(0)
            slow = (centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]).abs()
            assert [abs(float(p["first"])) for p in points] == pytest.approx(slow.tolist(), rel=1e-3, abs=1e-5)
