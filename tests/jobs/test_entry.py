"""Test that the scripts of `jobs/` pass their arguments to the command `rmdd` and reject relative paths."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from rmdd import config
from rmdd.cli import app as cli

JOBS = Path(__file__).parents[2] / "jobs"
STEPS = ("ingest", "experts", "distill", "evaluate", "report", "run", "search")
COMPARISONS = {"compare": ["A", "random"], "transfer": ["SET", "--to", "resnet18"]}
STORED = ["--set", "runtime.storage=/shared/runs"]


@pytest.fixture
def passed(monkeypatch):
    """Fixture: replace `main` by a stand-in that runs nothing, and return the arguments that job scripts pass to it."""
    words: list[str] = []
    monkeypatch.setattr(cli, "main", lambda arguments: words.extend(arguments))
    return words


def start(monkeypatch, step: str, *words: str) -> None:
    """Run a job script in this process, as `python jobs/STEP.py WORDS` would."""
    monkeypatch.syspath_prepend(str(JOBS))
    monkeypatch.setattr(sys, "argv", [f"jobs/{step}.py", *words])
    spec = importlib.util.spec_from_file_location("__main__", JOBS / f"{step}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_step_has_a_job_script() -> None:
    assert {p.stem for p in JOBS.glob("*.py")} == {*STEPS, *COMPARISONS, "entry"}


@pytest.mark.parametrize("step", STEPS)
def test_a_job_runs_its_step(monkeypatch, passed, step) -> None:
    start(monkeypatch, step, "--config", "demo", *STORED, "--quiet", "--set", "experts.num=3")
    assert passed == [step, "demo", *STORED, "--set", "experts.num=3", "--quiet"]


@pytest.mark.parametrize("verb", COMPARISONS)
def test_a_comparison_job_passes_its_sets_on(monkeypatch, passed, verb) -> None:
    start(monkeypatch, verb, "--config", "demo", *STORED, *COMPARISONS[verb])
    assert passed == [verb, "--config", "demo", *STORED, *COMPARISONS[verb]]


@pytest.mark.parametrize("preset", config.preset_names())
def test_every_preset_can_be_a_job(monkeypatch, passed, preset) -> None:
    start(monkeypatch, "run", "--config", preset, *STORED, "--set", "data.root=/shared/data")
    assert passed[:2] == ["run", preset]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "demo"], "runtime.storage: 'runs' would be inside the job's temporary copy"),
        (["--config", "demo", *STORED, "--set", "data.root=images"], "data.root: 'images' would be inside"),
        (["--config", "dmeo", *STORED], "demo"),
        (
            ["--config", "demo", *STORED, "--set", "model.image.weights=w.pt"],
            "image.weights: 'w.pt' would be inside",
        ),
        (["--config", "demo", *STORED, "--set", "model.text.name=rmdd"], "model.text.name: 'rmdd' would be inside"),
    ],
)
def test_relative_paths_are_refused(monkeypatch, passed, capsys, words, message) -> None:
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, "run", *words)
    assert end.value.code == 2 and passed == [] and message in capsys.readouterr().err


def test_a_uri_is_accepted_as_storage(monkeypatch, passed) -> None:
    start(monkeypatch, "run", "--config", "demo", "--set", "runtime.storage=s3://bucket/runs")
    assert passed[0] == "run"


@pytest.mark.parametrize(("code", "says"), [(0, False), (None, False), (2, False), (1, True), (130, True)])
def test_a_failed_or_stopped_job_prints_how_to_submit_it_again(monkeypatch, capsys, code, says) -> None:
    def ends(words: list[str]) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "main", ends)
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, "run", "--config", "demo", *STORED, "--set", "data.root=/my data")
    line = (
        "ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- "
        "python jobs/run.py --config demo --set runtime.storage=/shared/runs --set 'data.root=/my data'"
    )
    assert end.value.code == code and (line in capsys.readouterr().err) == says


def test_the_runtime_environment_sends_only_the_code() -> None:
    environment = yaml.safe_load((JOBS / "runtime_env.yaml").read_text())
    assert environment.keys() == {"excludes", "env_vars"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    excluded = {p.strip("/") for p in environment["excludes"]}
    assert {".git", ".venv", "runs", "tests"} <= excluded and not {"rmdd", "jobs"} & excluded
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
