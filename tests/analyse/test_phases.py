"""Tests of `rmdd analyse phases` on a tiny chained run, with all its controls really distilled."""

import csv
import json
import re
from statistics import fmean, stdev

import pytest
import tiny
import torch
from typer.testing import CliRunner

from rmdd import config
from rmdd.analyse.phases import PhaseComparison
from rmdd.cli.app import app
from rmdd.core.storage import run_folder
from rmdd.distill.sets import load_set
from rmdd.evaluate import protocol
from rmdd.evaluate.protocol import pairs_of_subset
from rmdd.evaluate.students import StudentSchedule, TrainingPairs, score, train_student
from rmdd.models.dual import build
from rmdd.models.prepared import SplitSource
from rmdd.pipeline import open_pipeline
from rmdd.runs.paths import paths_of
from rmdd.runs.tasks import DistillPhase

PHASES = [
    {"pairs": 4, "start": 0, "stop": 1, "endpoint": 2, "iterations": 2},
    {"pairs": 3, "start": 0, "stop": 2, "endpoint": 3, "iterations": 3},
]
RUN = tiny.changed(
    data={"scenes": {"val": 40}},
    experts={"epochs": 3},
    distill={"phases": PHASES, "path_start": "student"},
    evaluate={"epochs": 3},
)
THETA_0 = ("--set", "distill.path_start=theta_0")
TWO = f"distill.phases={json.dumps([PHASES[0]] * 2)}"
ORDERS = ["first to last", "last to first", "cumulative", "union, zeros", "union, masked"]


def analyse(storage, *words):
    """Call `rmdd analyse phases` with `words`; return its exit code, its parsed output and its messages."""
    file = storage / "run.yaml"
    file.write_text(config.dump(config.load(tiny.stored(storage / "runs", RUN))))
    done = CliRunner().invoke(app, ["analyse", "phases", str(file), *words, "--json", "--quiet"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else None, " ".join(done.stderr.split())


def rows_of(storage, *words):
    code, result, messages = analyse(storage, *words)
    assert code == 0, messages
    return {row["row"]: row for row in result["rows"]}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory, painted):
    """Fixture: the storage folder, the rows of the table, and the names of the splits that were opened."""
    storage, opened = tmp_path_factory.mktemp("phases"), []
    original = SplitSource.open

    def noted(self, split):
        opened.append(split)
        return original(self, split)

    with pytest.MonkeyPatch.context() as patched, painted():
        patched.setattr(SplitSource, "open", noted)
        return storage, rows_of(storage), opened


def sets_of(run):
    """Return the training pairs of each phase of a distilled run, and its val split."""
    with open_pipeline(run, tiny.QUIET) as pipeline:
        paths, val = paths_of(run, pipeline.ingest()), pipeline.prepared_split("val")
    sets = [load_set(paths.set(p, phase.iterations)) for p, phase in enumerate(run.distill.phases)]
    return [pairs_of_subset(each, 16) for each in sets], val


def test_the_table_has_a_row_for_every_order_of_every_control(analysed):
    storage, rows, _ = analysed
    chained = [f"chained: {name}" for name in ("phase 0 alone", "phase 1 alone", *ORDERS)]
    others = [f"{k}: {name}" for k in ("independent", "same early phase") for name in ("phase 1 alone", *ORDERS)]
    assert list(rows) == [*chained, *others, "one phase"]
    assert [rows[name]["pairs"] for name in ("chained: phase 1 alone", "independent: cumulative", "one phase")] == [
        *(3, 7, 8)
    ]
    assert [rows[name]["updates"] for name in ("chained: phase 0 alone", "chained: cumulative", "one phase")] == [
        *(3, 6, 3)
    ]
    folder = run_folder(config.load(tiny.stored(storage / "runs", RUN))) / "analyse"
    with open(folder / "phases.csv", newline="") as file:
        assert [float(r["student"]) for r in csv.DictReader(file)] == [r["student"] for r in rows.values()]
    words = re.findall(r"<!-- (.*?) -->", (folder / "phases.svg").read_text())
    assert {"phase 0 alone", *ORDERS, "chained", "independent", "same early phase", "one phase"} <= set(words)


def test_controls_differ_from_the_run_only_in_their_phases():
    run = config.load(tiny.stored("runs", RUN))
    runs = PhaseComparison(run).runs()
    assert runs.pop("chained") is run
    assert all(r.distill.path_start == "theta_0" and r.experts.num == run.experts.num for r in runs.values())
    listed = {
        name: [(p.pairs, p.start, p.stop, p.endpoint, p.iterations) for p in r.distill.phases]
        for name, r in runs.items()
    }
    assert listed == {
        "independent": [(4, 0, 1, 2, 2), (3, 0, 2, 3, 3)],
        "same early phase": [(4, 0, 1, 2, 2), (3, 0, 1, 2, 3)],
        "one phase": [(8, 0, 1, 2, 5)],
    }
    published = config.load(tiny.stored("runs", RUN), ["distill.path_start=theta_0"])
    assert list(PhaseComparison(published).runs()) == ["independent", "same early phase", "one phase"]
    alike = config.load(tiny.stored("runs", RUN), [TWO])
    assert list(PhaseComparison(alike).runs()) == ["chained", "independent", "one phase"]


def test_students_obey_the_order_of_each_row(analysed):
    """Train the students of several rows by hand, stage after stage, and compare their val scores."""
    storage, rows, _ = analysed
    run = config.load(tiny.stored(storage / "runs", RUN))
    sets, val = {}, None
    for kind, variant in PhaseComparison(run).runs().items():
        sets[kind], val = sets_of(variant)
    (a, b), (_, second), (_, early), (one,) = sets.values()

    def both(first, last, subset_of=None):
        rate = {n: (4 * getattr(first, n) + 3 * getattr(last, n)) / 7 for n in ("lr_image", "lr_text")}
        similarity = torch.zeros(7, 7)
        similarity[:4, :4], similarity[4:, 4:] = first.similarity, last.similarity
        images, texts = torch.cat([first.images, last.images]), torch.cat([first.texts, last.texts])
        return TrainingPairs(images, texts, similarity, *rate.values(), subset_of)

    stages = {
        "chained: phase 0 alone": [a],
        "chained: phase 1 alone": [b],
        "chained: first to last": [a, b],
        "chained: last to first": [b, a],
        "chained: cumulative": [a, both(a, b)],
        "chained: union, zeros": [both(a, b)],
        "chained: union, masked": [both(a, b, torch.tensor([0] * 4 + [1] * 3))],
        "independent: first to last": [a, second],
        "same early phase: union, zeros": [both(a, early)],
        "one phase": [one],
    }
    for name, trained_on in stages.items():
        scores = []
        for student in range(2):
            model = build(run.model, 16, 16, run.seed_of("evaluate"), "student", student)
            schedule = StudentSchedule.of(run.evaluate)
            train_student(model, trained_on, schedule, run.distill.loss, run.seed_of("evaluate"), student)
            scores.append(score(model, val, torch.device("cpu")).mean)
        row = rows[name]
        assert (row["student"], row["spread"]) == pytest.approx((fmean(scores), stdev(scores))), name
    assert len({rows[name]["student"] for name in stages}) > 5, "most rows must differ, or the comparison shows little"


def test_all_controls_with_several_phases_share_the_bits_of_the_first_phase(analysed):
    storage, _, _ = analysed
    (chained, later), (independent, _), (early, _), _ = (
        sets_of(r)[0] for r in PhaseComparison(config.load(tiny.stored(storage / "runs", RUN))).runs().values()
    )
    for other in (independent, early):
        assert torch.equal(chained.images, other.images) and torch.equal(chained.similarity, other.similarity)
    assert not torch.equal(chained.images[:3], later.images)


def test_the_analysis_never_reads_test(analysed):
    storage, _, opened = analysed
    assert set(opened) == {"train", "val"}
    assert not list(storage.rglob("*.test.json")) and not list(storage.rglob("*ranks*"))


def test_a_second_call_trains_only_missing_students(analysed, monkeypatch):
    storage, rows, _ = analysed
    trained, original = [], protocol.train_student

    def noted(model, subsets, *rest):
        trained.append(len(subsets))
        original(model, subsets, *rest)

    monkeypatch.setattr(protocol, "train_student", noted)
    monkeypatch.setattr(DistillPhase, "__call__", lambda *words: pytest.fail("distilled again"))
    assert rows_of(storage) == rows and trained == []
    records = sorted((storage / "runs" / "comparisons" / "students").glob("*/*.json"))
    assert len(records) == 2 * len(rows)
    records[0].unlink()
    assert rows_of(storage) == rows and len(trained) == 1
    one = rows_of(storage, "--epochs", "1", "--students", "1")
    assert len(trained) == 1 + len(rows) and all(row["spread"] is None for row in one.values())


def test_each_row_reports_its_best_number_of_passes(analysed):
    storage, rows, _ = analysed
    one, best = rows_of(storage, "--epochs", "1"), rows_of(storage, "--epochs", "3,1")
    for name, row in best.items():
        assert row == max((one[name], rows[name]), key=lambda r: r["student"])
    assert {row["passes"] for row in best.values()} == {1, 3}


def test_rows_that_fail_are_reported_and_the_others_are_scored(tmp_path):
    code, result, messages = analyse(tmp_path, "--set", "distill.budget=120", *THETA_0)
    assert code == 1 and "1 of 14 runs failed" in messages
    *scored, one = result["rows"]
    assert "wants" in one["error"] and all(row["student"] >= 0 for row in scored)
    words = ["--set", "evaluate.weight_decay=1e30", "--students", "1"]
    code, result, messages = analyse(tmp_path, *THETA_0, *words)
    assert code == 1 and "14 of 14 runs failed" in messages
    assert all("diverged" in row["error"] and "student" not in row for row in result["rows"])


def test_the_first_phase_is_scored_even_if_the_chained_phases_fail(tmp_path, monkeypatch):
    original = DistillPhase.__call__

    def failing(self, item, hooks):
        if self.wave is not None:
            raise ValueError("chained phases fail here")
        return original(self, item, hooks)

    monkeypatch.setattr(DistillPhase, "__call__", failing)
    code, result, _ = analyse(tmp_path, "--students", "1")
    rows = {row["row"]: row for row in result["rows"]}
    assert code == 1 and "fail here" in rows["chained: phase 0 alone"]["error"]
    assert "student" in rows["independent: phase 0 alone"] and "same early phase: phase 0 alone" not in rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", f"distill.phases={json.dumps(PHASES[:1])}"], "distill.phases has 1; list two or more phases"),
        (["--set", "distill.phases=auto"], "distill.phases is planned; list two or more phases"),
        (["--epochs", "0,3"], "--epochs 0 is not positive; give numbers such as 30,60"),
        (["--epochs", "3,x"], "--epochs 3,x: write whole numbers, such as 30,60,120"),
        (
            ["--set", "distill.method=mdm", "--set", "distill.options.partners=same_expert", *THETA_0, "--set", TWO],
            "method mdm does not match trajectories",
        ),
    ],
)
def test_invalid_calls_are_rejected_before_any_work(tmp_path, words, message):
    code, _, messages = analyse(tmp_path, *words)
    assert code == 2 and message in messages.replace("│ ", ""), messages
    assert not (tmp_path / "runs").exists()
