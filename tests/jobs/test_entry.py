"""The entries of `jobs/` hand their words to the command line."""

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
def handed(monkeypatch):
    """The words that the command line was given; `monkeypatch` puts what it ends with."""
    words: list[str] = []
    monkeypatch.setattr(cli, "main", lambda given: words.extend(given))
    return words


def start(monkeypatch, step: str, *words: str) -> None:
    """As `python jobs/STEP.py WORDS` does it."""
    monkeypatch.syspath_prepend(str(JOBS))
    monkeypatch.setattr(sys, "argv", [f"jobs/{step}.py", *words])
    spec = importlib.util.spec_from_file_location("__main__", JOBS / f"{step}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_there_is_an_entry_for_every_step() -> None:
    assert {p.stem for p in JOBS.glob("*.py")} == {*STEPS, *COMPARISONS, "entry"}


@pytest.mark.parametrize("step", STEPS)
def test_an_entry_does_its_step(monkeypatch, handed, step) -> None:
    start(monkeypatch, step, "--config", "demo", *STORED, "--quiet", "--set", "experts.num=3")
    assert handed == [step, "demo", *STORED, "--set", "experts.num=3", "--quiet"]


@pytest.mark.parametrize("verb", COMPARISONS)
def test_an_entry_of_a_comparison_hands_on_what_is_compared(monkeypatch, handed, verb) -> None:
    start(monkeypatch, verb, "--config", "demo", *STORED, *COMPARISONS[verb])
    assert handed == [verb, "--config", "demo", *STORED, *COMPARISONS[verb]]


@pytest.mark.parametrize("preset", config.preset_names())
def test_every_preset_can_be_a_job(monkeypatch, handed, preset) -> None:
    start(monkeypatch, "run", "--config", preset, *STORED, "--set", "data.root=/shared/data")
    assert handed[:2] == ["run", preset]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "demo"], "runtime.storage: 'runs' would lie in the job's copy"),
        (["--config", "demo", *STORED, "--set", "data.root=images"], "data.root: 'images' would lie"),
        (["--config", "dmeo", *STORED], "demo"),
        (["--config", "demo", *STORED, "--set", "model.image.weights=w.pt"], "model.image.weights: 'w.pt' would lie"),
        (["--config", "demo", *STORED, "--set", "model.text.name=rmdd"], "model.text.name: 'rmdd' would lie"),
    ],
)
def test_what_would_be_lost_is_refused(monkeypatch, handed, capsys, words, told) -> None:
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, "run", *words)
    assert end.value.code == 2 and handed == [] and told in capsys.readouterr().err


def test_a_uri_is_a_place_of_its_own(monkeypatch, handed) -> None:
    start(monkeypatch, "run", "--config", "demo", "--set", "runtime.storage=s3://bucket/runs")
    assert handed[0] == "run"


@pytest.mark.parametrize(("code", "says"), [(0, False), (None, False), (2, False), (1, True), (130, True)])
def test_an_end_that_can_be_mended_tells_how_to_submit_again(monkeypatch, capsys, code, says) -> None:
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


def test_the_runtime_environment_ships_the_code_and_no_more() -> None:
    environment = yaml.safe_load((JOBS / "runtime_env.yaml").read_text())
    assert environment.keys() == {"excludes", "env_vars"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    left_out = {p.strip("/") for p in environment["excludes"]}
    assert {".git", ".venv", "runs", "tests"} <= left_out and not {"rmdd", "jobs"} & left_out
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
