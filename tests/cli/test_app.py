import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import rmdd.pipeline
from rmdd import config
from rmdd.cli import app as cli
from rmdd.core.failures import MustChange
from rmdd.core.layout import require_layout
from rmdd.core.storage import open_storage
from rmdd.distill.guard import PhaseDiverged
from rmdd.execution.tasks import Interrupted

TINY = [
    "data.scenes={train: 24, val: 8, test: 8, size: 16}",
    "data.image_size=16",
    "model.image.widths=[8, 8]",
    "distill.phases=[{pairs: 8, start: 0, stop: 1, endpoint: 2, iterations: 4}]",
    "distill.budget=10",
    "distill.batch=4",
]


def rmdd_(*words: str):
    return CliRunner().invoke(cli.app, list(words), catch_exceptions=False)


def sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(autouse=True)
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Steps:
    """Stand-in for `Pipeline` that computes nothing and records its runs; its method `all` raises `error` if set."""

    error: BaseException | None = None
    runs: list[config.Run] = field(default_factory=list)
    folder: Path = Path()

    def install(self, monkeypatch):
        from contextlib import contextmanager

        @contextmanager
        def opened(run, progress=None):
            self.runs.append(run)
            require_layout(open_storage(run.runtime))  # the real `open_pipeline` does this too
            self.folder = rmdd.pipeline.run_folder(run)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.yaml").write_text(config.dump(run))
            yield self

        monkeypatch.setattr(rmdd.pipeline, "open_pipeline", opened)
        return self

    def all(self) -> Any:
        print("output of a library")
        if self.error:
            raise self.error
        value = {"mean": 20.0, "std": 1.5, "n": 5}
        recalls = dict.fromkeys(("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "R@mean"), value)
        alone = {metric: {**v, "std": math.nan} for metric, v in recalls.items()}
        table = {"random": {"val": recalls, "test_last": recalls}, "full": {"val": alone, "test_last": alone}}
        table["ptm_st"] = {"val": recalls, "test_last": recalls, "test_best_reference": recalls}
        evaluation = {"table": table, "spread": "over students"}
        files = self.folder / "set", self.folder / "report.html"
        return rmdd.pipeline.Result(*files, "49 pairs reach half of 98.", evaluation, {"distill": 3.0})


LIGHT = (
    "annotated_doc annotated_types cython_runtime pydantic pydantic_core rich shellingham typer typing_extensions "
    "typing_inspection yaml"
)
"""Packages that `rmdd --help` may import: those that parse command lines and declare run files."""


def test_help_imports_only_what_it_needs():
    code = (
        "import sys; before = set(sys.modules); from rmdd.cli import app; sys.argv = ['rmdd', '--help']\n"
        "try: app.main()\nexcept SystemExit: pass\n"
        "packages = {name.split('.')[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names\n"
        "print('PACKAGES', *sorted(p for p in packages if p[0] != '_'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    helped, _, packages = done.stdout.partition("PACKAGES")
    assert {*packages.split()} <= {"rmdd", *LIGHT.split()} and "resume" in helped


def test_all_mistakes_are_reported_together(workdir):
    bad = sets("experts.num=0", "distil.budget=3", "evaluate.students=many", "distill.phases.7.pairs=3")
    done = rmdd_("run", "demo", *bad)
    assert done.exit_code == 2 and done.stdout == ""
    word = rmdd_("run", "demo", *sets("distill.phases=automatic"))
    assert word.exit_code == 2 and "phases: must be a list of phases, or one of auto and adaptive" in word.stderr
    for words in (
        "experts.num",
        "distil: unknown key; did you mean distill?",
        "evaluate.students",
        "no entry '7'",
        "4 mistake",
    ):
        assert words in done.stderr
    assert not list(workdir.iterdir())


@pytest.mark.parametrize("command", ["check", "ingest", "experts", "distill", "evaluate", "report", "run"])
def test_an_unknown_preset_is_a_config_mistake(command):
    done = rmdd_(command, "dmeo")
    assert done.exit_code == 2 and "no preset 'dmeo'; did you mean demo?" in done.stderr


def test_presets_are_listed_and_printed():
    listed: dict[str, list[str]] = {}
    file = ""
    for line in rmdd_("presets").stdout.splitlines():
        if line.startswith("│"):
            first, keys = (cell.strip() for cell in line.split("│")[1:-1])
            file = first or file  # only the first line of a row names the file
            listed.setdefault(file, []).extend(keys.replace(",", "").split())
    names = [f"{file}_{key}" for file, keys in listed.items() if file != "demo" for key in keys]
    assert sorted(names) == [name for name in config.preset_names() if name != "demo"]
    assert "demo" in listed
    assert yaml.safe_load(rmdd_("presets", "demo").stdout)["name"] == "demo"
    assert rmdd_("presets", "nope").exit_code == 2
    short, resolved = (yaml.safe_load(rmdd_("presets", "coco_amd_500", *more).stdout) for more in ((), ("--whole",)))
    assert short["extends"] == "coco_lors_500" and "extends" not in resolved
    assert resolved["distill"]["method"] == "amd" and resolved["distill"]["lr_image"] == 5000
    assert rmdd_("version").stdout.strip()


@pytest.mark.parametrize("dataset", ["flickr30k", "coco", "emoji", "cc3m", "flickr8k"])
def test_the_presets_of_a_dataset_fit_a_screen(dataset):
    lines = rmdd_("presets", dataset).stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert all(line.startswith(f"│ {dataset}_") or line[:3] == "│  " for line in lines[3:] if line.startswith("│"))


def test_a_preset_file_is_printed_with_all_its_budgets():
    assert list(yaml.safe_load(rmdd_("presets", "coco_edge").stdout)["budgets"]) == [500, 1000]
    assert yaml.safe_load(rmdd_("presets", "bases/lors").stdout)["distill"]["method"] == "lors"
    assert "'coco_edge' has several budgets" in rmdd_("presets", "coco_edge", "--whole").stderr


def test_methods_are_listed_with_their_presets():
    listed = {each["name"]: each for each in json.loads(rmdd_("methods", "--json").stdout)}
    assert {"mtt_vl", "tesla_vl", "lors", "repblend", "ptm_st", "datm", "mct", "amd"} <= listed.keys()
    assert listed["lors"]["summary"].startswith("LoRS: low-rank similarity mining")
    users = [preset for each in listed.values() for preset in each["presets"]]
    assert sorted(users) == config.preset_names()
    assert "demo" in listed["ptm_st"]["presets"]


def test_the_table_of_methods_fits_a_terminal():
    listed = json.loads(rmdd_("methods", "--json").stdout)
    lines = rmdd_("methods").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    rows = [row for row in cells if row[0]]
    plain = [[each["name"], each["family"], each["card"].removeprefix("arXiv ")] for each in listed]
    assert [row[:2] + row[3:4] for row in rows] == plain
    assert rows[[row[0] for row in rows].index("lors")][2] == "experts"
    for each in listed:
        assert each["family"] in ("trajectory", "distribution", "generative"), each["name"]
        assert each["card"] and {"experts", "features", "diffusion", "captioner"} >= set(each["needs"]), each["name"]
        assert "Not verified" in each["status"], f"{each['name']} must state what was not verified"
    families = [each["family"] for each in listed]
    assert families == sorted(families, key=["trajectory", "distribution", "generative"].index), (
        "the methods of a family must stand together"
    )
    words = " ".join(row[4] for row in cells)
    assert all(" ".join(each["status"].split()[:2]) in words for each in listed)


def test_methods_describes_one_method():
    shown = rmdd_("methods", "mct").stdout
    assert "theta_l(t) = theta_l(0)" in shown and "start_points: continuous" in shown and "emoji_mct_100" in shown
    facts = json.loads(rmdd_("methods", "mct", "--json").stdout)
    assert facts["defaults"]["distill"]["trajectory"] == "convexified" and facts["place"] == "rmdd.methods.mct:MCT"
    assert (facts["family"], facts["needs"], facts["card"]) == ("trajectory", ["experts"], "2406.19827")
    assert f"status: {facts['status']}" in shown and "family: trajectory; needs: experts" in shown
    wrong = rmdd_("methods", "lros")
    assert wrong.exit_code == 2 and "did you mean lors?" in wrong.stderr


def test_check_writes_nothing_and_counts_pairs_and_cost(workdir):
    done = rmdd_("check", "demo", "--json", *sets(*TINY))
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["data"]["counts"]["train"] == [24, 120]
    assert facts["phases"][0]["pairs"] == 8 and not facts["data"]["ingested"]
    assert facts["time"]["seconds"]["distill"] > 0 and facts["memory"]["matching_step"] > 0
    shown = rmdd_("check", "demo", *sets(*TINY))
    assert "Phases" in shown.stdout and "time: assumes" in shown.stdout
    assert not list(workdir.iterdir())


def test_check_prints_the_recipe_and_the_values_of_the_method_that_files_replace(workdir, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a table wider than the terminal would be turned
    (workdir / "mine.yaml").write_text("extends: demo\ndistill: {method: lors, ema: 0.5}\n")
    words = ("check", "mine.yaml", *sets("distill.lr_text=7"))
    recipe = json.loads(rmdd_(*words, "--json").stdout)["recipe"]
    assert (recipe["method"], recipe["trajectory"], recipe["estimator"]) == ("lors", "original", "first_order")
    assert recipe["similarity"] == {"kind": "low_rank", "rank": 10, "alpha": 3.0} and recipe["optimiser"] == "sgd"
    assert (recipe["loss"], recipe["rates"]["lr_image"], recipe["phases"][0]["iterations"]) == ("wbce", 100, 3000)
    rows = [(row["field"], row["own"], row["used"], row["by"]) for row in recipe["overridden"]]
    assert rows[1:] == [("distill.lr_text", 100, 7, "--set"), ("distill.ema", 0, 0.5, "mine.yaml")]
    assert "distill.stored_size" in recipe["gave_way"]
    shown = " ".join(rmdd_(*words).stdout.split())
    for line in (
        "lors; trajectory original; estimator first_order; loss wbce; similarity low_rank (rank 10, alpha 3)",
        "Values of lors that are replaced",
        "│ distill.ema │ 0 │ 0.5 │ mine.yaml │",
        "│ distill.phases │ 99 pairs, 3000 updates │ 49 pairs, 3000 updates │ distill.budget │",
        "note: these values of demo were tuned for ptm_st and are not used with lors: distill.batch",
    ):
        assert line in shown


def test_check_refuses_phases_over_budget_and_unknown_towers(workdir):
    over = rmdd_("check", "demo", *sets(*TINY, "distill.budget=3"))
    assert over.exit_code == 2 and "over by" in over.stderr
    tower = rmdd_("check", "demo", *sets("model.image.name=nfnet_10"))
    assert tower.exit_code == 2 and "nfnet_l0" in tower.stderr


def test_check_includes_the_search_space(workdir):
    space = "search.space={distill.lr_image: {loguniform: [0.01, 0.1]}, experts.lr_image: {choice: [0.1, 0.2]}}"
    shown = rmdd_("check", "demo", *sets(*TINY, space))
    assert shown.exit_code == 0, shown.stderr
    assert "2 fields, 24 trials, each trial repeats experts and distillation" in shown.stdout
    grid = ("search.space={distill.steps: {int: [2, 4]}}", "search.sampler=grid")
    facts = json.loads(rmdd_("check", "demo", "--json", *sets(*TINY, *grid)).stdout)
    assert facts["search"] == {"fields": ["distill.steps"], "trials": 3, "experts": "shared"}
    wrong = ("{distill.lr_imgae: {uniform: [1, 2]}}", "{distill.phases.0.endpoint: {int: [1, 99]}}")
    for space, words in zip(wrong, ("lr_imgae: at 1.0: distill.lr_imgae: unknown key", "at 99: "), strict=True):
        done = rmdd_("check", "demo", *sets(*TINY, f"search.space={space}"))
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("mistake") == 1
    assert not list(workdir.iterdir())


def test_a_published_preset_is_checked_without_its_data_or_weights(workdir):
    done = rmdd_("check", "flickr30k_ptm_st_100", "--json", "--set", "data.root=absent")
    facts = json.loads(done.stdout)
    assert facts["model"]["image"] == 32_769_488 and facts["model"]["text"] == 7_087_104
    assert "published" in facts["data"]["origin"]


def test_run_prints_the_table_and_the_paths_of_its_results(workdir, monkeypatch):
    Steps().install(monkeypatch)
    done = rmdd_("demo", "--quiet", "--storage", "out")
    assert done.exit_code == 0, done.stderr
    expected = ("random pairs", "PTM-ST", "full data", "20.0 ± 1.5", "picked on test", "distilled set:", "page:")
    for words in (*expected, "seconds:"):
        assert words in done.stdout
    assert done.stdout.startswith("49 pairs reach half of 98.\n")
    assert "output of a library" not in done.stdout and (workdir / "out").is_dir()


def test_json_is_one_object_and_nothing_else(workdir, monkeypatch):
    Steps().install(monkeypatch)
    facts = json.loads(rmdd_("run", "demo", "--json", *sets("seed=4")).stdout)
    assert facts["table"]["full"]["val"]["R@mean"] == {"mean": 20.0, "std": None, "n": 5}
    assert Path(facts["set"]).parent == Path(facts["run"]) == Path(facts["page"]).parent


@pytest.mark.parametrize(
    ("error", "code", "words", "resumable"),
    [
        (ValueError("no such thing"), 1, "error: no such thing", False),
        (
            FloatingPointError("not finite"),
            1,
            "error: not finite\nlower the learning rates named above and start `rmdd run`",
            False,
        ),
        (PhaseDiverged("not finite; halve"), 1, "error: not finite; halve\n", False),
        (
            MustChange("expert 0 diverged; lower experts.lr_image"),
            1,
            "expert 0 diverged; lower experts.lr_image\n",
            False,
        ),
        (RuntimeError("worker died"), 1, "error: worker died\nafter fixing the problem, resume with: ", True),
        (OSError("disk full"), 1, "error: disk full", True),
        (KeyboardInterrupt(), 130, "stopped; resume with: ", True),
        (Interrupted(), 130, "stopped; resume with: ", True),
    ],
)
def test_a_failed_run_prints_its_error_and_how_to_resume(workdir, monkeypatch, error, code, words, resumable):
    steps = Steps(error).install(monkeypatch)
    done = rmdd_("run", "demo", "--quiet")
    assert done.exit_code == code and done.stdout == ""
    assert words in done.stderr and (f"rmdd resume {steps.folder}" in done.stderr) == resumable
    assert "Traceback" not in done.stderr
    assert "Traceback" in rmdd_("run", "demo", "--quiet", "--debug").stderr


def test_sigterm_stops_like_ctrl_c(workdir, monkeypatch):
    class Terminated(Steps):
        def all(self):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)

    Terminated().install(monkeypatch)
    done = rmdd_("run", "demo", "--quiet")
    assert done.exit_code == 130 and "rmdd resume" in done.stderr


def test_resume_works_in_a_moved_run_folder(workdir, monkeypatch):
    steps = Steps().install(monkeypatch)
    rmdd_("run", "demo", "--quiet", *sets("seed=7"))
    (workdir / "runs").rename(workdir / "moved")
    folder = workdir / "moved" / steps.folder.name
    (workdir / "elsewhere").mkdir()
    monkeypatch.chdir(workdir / "elsewhere")
    assert rmdd_("resume", str(folder), "--quiet").exit_code == 0
    assert steps.folder == folder and steps.runs[0].hash_of() == steps.runs[1].hash_of()


@pytest.mark.parametrize("command", ["check", "run", "report"])
def test_a_run_folder_stands_for_its_run(workdir, monkeypatch, command):
    steps = Steps().install(monkeypatch)
    steps.report = lambda: steps.folder / "report.html"
    rmdd_("run", "demo", "--quiet", *sets("seed=7", "runtime.storage=there"))
    folder = steps.folder
    monkeypatch.chdir(folder)
    done = rmdd_(command, str(folder), "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["run"] == str(folder)
    assert rmdd_("run", str(folder), "--quiet", *sets("seed=8")).exit_code == 0
    assert steps.runs[-1].seed == 8 and steps.folder.parent == folder.parent
    wrong = rmdd_(command, str(workdir))
    assert (
        wrong.exit_code == 2 and "no run.yaml in it; give a preset, a run file or the folder of a run" in wrong.stderr
    )


def test_resume_refuses_other_folders_and_changed_run_files(workdir, monkeypatch):
    advice = "give the folder of a run, sweep, search or comparison"
    assert f"this folder does not exist; {advice}" in rmdd_("resume", "nowhere").stderr
    assert "no run.yaml, sweep.json, search.json or comparison.json in it" in rmdd_("resume", str(workdir)).stderr
    steps = Steps().install(monkeypatch)
    rmdd_("run", "demo", "--quiet")
    file = steps.folder / "run.yaml"
    file.write_text(file.read_text().replace("budget: 50", "budget: 60"))
    changed = rmdd_("resume", str(steps.folder))
    assert changed.exit_code == 2 and "the file was changed" in changed.stderr


def test_relative_paths_are_made_absolute(workdir, monkeypatch):
    monkeypatch.setattr("rmdd.runs.preflight.problems_of", lambda run: [])
    steps = Steps().install(monkeypatch)
    (workdir / "bert").mkdir()
    local = ("data.root=images", "model.image.weights=w/nfnet.pth", "model.text.name=bert")
    rmdd_("run", "flickr30k_ptm_st_100", "--quiet", *sets(*local))
    rmdd_("run", "flickr30k_ptm_st_100", "--quiet", *sets("data.root=images"))
    first, second = steps.runs
    assert first.data.root == second.data.root == str(workdir / "images")
    assert first.model.image.weights == str(workdir / "w" / "nfnet.pth") and first.model.text.name == str(
        workdir / "bert"
    )
    assert (second.model.image.weights, second.model.text.name) == ("pretrained", "bert-base-uncased")


@pytest.mark.parametrize("command", ["run", "experts", "distill", "evaluate", "report"])
def test_mistakes_are_reported_before_any_folder_is_created(workdir, command):
    wrong = ("model.image.name=nfnet_10", "model.image.weights=absent.pth", "distill.budget=3")
    done = rmdd_(command, "demo", *sets(*TINY, *wrong))
    assert done.exit_code == 2 and "2 mistake(s)" in done.stderr
    assert f"no weights file '{workdir / 'absent.pth'}'" in done.stderr and "over by" in done.stderr
    for changes, words in (
        (("model.image.name=nfnet_10",), "the closest names are nfnet_l0"),
        (("data.normalise=tower",), "convnet defines no normalisation"),
        (("model.image.name=lcnet_035",), "no second derivative"),
        (("model.text.name=package:absent",), "not an installed package"),
    ):
        done = rmdd_(command, "demo", *sets(*TINY, *changes))
        assert done.exit_code == 2 and words in done.stderr
    assert not list(workdir.iterdir())


@pytest.mark.parametrize("command", ["check", "run", "experts", "evaluate"])
def test_an_empty_split_is_refused_before_anything_starts(workdir, command):
    (workdir / "captions.csv").write_text("image,caption,split\na.png,one,train\nb.png,two,test\nc.png,three,train\n")
    table = ("data.source=table", f"data.root={workdir}")
    done = rmdd_(command, "demo", *sets(*TINY, *table))
    assert done.exit_code == 2 and "split val is empty, and a run needs train, val and test" in done.stderr
    assert "train 2, val 0, test 1" in done.stderr and "set data.splits: {val: 1}" in done.stderr
    assert not (workdir / "runs").exists()
    if command == "check":
        assert rmdd_(command, "demo", *sets(*TINY, *table, "data.splits={val: 1}")).exit_code == 0


def test_an_empty_split_that_only_the_ingest_finds_is_refused_after_it(workdir):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    columns = {"image": [buffer.getvalue()] * 3, "caption": ["one", "two", "three"]}
    pq.write_table(pa.table(columns), workdir / "train.parquet")
    parquet = ("data.source=parquet", f"data.root={workdir}", "runtime.ray=off")
    for _ in range(2):  # the second call finds the ingested dataset
        done = rmdd_("run", "demo", *sets(*TINY, *parquet))
        assert done.exit_code == 2 and "splits val and test are empty" in done.stderr
        assert "train 3, val 0, test 0; set data.splits: {val: 1, test: 1}" in done.stderr
    assert not (workdir / "runs" / "experts").exists()


def test_ingest_and_check_say_what_was_lost_and_what_is_in_two_splits(workdir):
    for name, colour in {"a": "red", "b": "red", "c": "blue", "d": "green"}.items():
        Image.new("RGB", (8, 8), colour).save(workdir / f"{name}.png")
    splits = {"a": "train", "b": "test", "c": "val", "d": "train", "gone": "train"}
    (workdir / "t.csv").write_text("image,caption,split\n" + "".join(f"{n}.png,x {n},{s}\n" for n, s in splits.items()))
    table = ("data.source=table", "data.table.file=t.csv", "runtime.ray=off")
    (workdir / "empty").mkdir()
    shutil.copy(workdir / "t.csv", workdir / "empty")
    done = rmdd_("ingest", "demo", *sets(*TINY, *table, f"data.root={workdir / 'empty'}"))
    assert done.exit_code == 1 and "the ingest kept 0 of 5 images: 5 missing_file" in done.stderr
    assert f"set data.root to {workdir} and data.table.file to empty/t.csv" in done.stderr
    table += (f"data.root={workdir}",)
    for command in ("ingest", "check"):
        done = rmdd_(command, "demo", *sets(*TINY, *table))
        assert done.exit_code == 0, done.stderr
        said = " ".join(done.stdout.split())
        assert "quarantine: 1 missing_file; see " in said and "quarantine.jsonl" in said
        assert "are in two splits (1 in train and test)" in said and "duplicates.jsonl" in said
