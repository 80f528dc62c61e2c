"""Test what users of a shell expect: short options, completion, narrow terminals, and readers that go away."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rmdd import __version__, config
from rmdd.cli import app as cli
from rmdd.cli import console
from rmdd.cli.table import FittedTable

METRICS = ("R@mean", "IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")


def rmdd_(*words: str, **variables: str):
    return CliRunner().invoke(cli.app, list(words), env=variables, catch_exceptions=False)


def test_the_version_is_an_option():
    done = rmdd_("--version")
    assert (done.exit_code, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("words", [[], ["run"], ["bench"], ["bench", "step"]])
def test_every_command_has_a_short_option_for_help(words):
    short, long = rmdd_(*words, "-h"), rmdd_(*words, "--help")
    assert short.exit_code == 0 and short.stdout == long.stdout and "-h, --help" in short.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rmdd heal", ["health"]),
        ("rmdd bench e", ["estimator"]),
        ("rmdd run --qu", ["--quiet"]),
        ("rmdd run flickr30k_l", [n for n in config.preset_names() if n.startswith("flickr30k_l")]),
        ("rmdd search demo", ["demo"]),
    ],
)
def test_a_shell_completes_commands_options_and_presets(line, expected):
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_RMDD_COMPLETE": "complete_bash"}
    done = CliRunner().invoke(cli.app, [], prog_name="rmdd", env=words)
    assert expected and done.stdout.split() == expected


def test_a_table_without_columns_is_empty():
    drawn = Console(file=io.StringIO(), width=40)
    drawn.print(FittedTable())
    assert not drawn.file.getvalue().strip()


def test_the_script_for_completion_is_printed(monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the test runner is no shell
    assert "complete -o default" in rmdd_("--show-completion", "bash").stdout


@pytest.mark.parametrize("words", [["presets"], ["presets", "demo"], ["methods", "--json"]])
def test_a_reader_that_goes_away_ends_the_command_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from rmdd.cli.app import main; main({words!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_tables_in_a_pipe_are_as_wide_as_columns_says():
    widths = {c: max(map(len, rmdd_("check", "demo", COLUMNS=c).stdout.splitlines())) for c in ("70", "100", "")}
    assert widths["70"] <= 70 < widths["100"] <= 100 < widths[""] <= 132


def evaluation():
    recalls = {metric: {"mean": 10.0 + n, "std": 1.5, "n": 5} for n, metric in enumerate(METRICS)}
    table = {"random": {"val": recalls, "test_last": recalls}, "full": {"val": recalls, "test_last": recalls}}
    table["lors"] = {"val": recalls, "test_last": recalls, "test_best_reference": recalls}
    return {"table": table, "spread": "over students"}


@pytest.mark.parametrize("width", [132, 80, 60, 40])
def test_scores_are_shown_whole_at_any_width(width):
    drawn = Console(width=width, record=True, file=io.StringIO())
    drawn.print(console.results(evaluation()))
    text = drawn.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for word in ("random", "LoRS", "IR@10", *(f"{10 + n}.0" for n in range(len(METRICS)))):
        assert word in text


def test_published_results_are_shown_whole_on_a_narrow_terminal():
    shown = rmdd_("published", "--method", "NCFM", COLUMNS="60").stdout
    rows = json.loads(rmdd_("published", "--method", "NCFM", "--json").stdout)
    assert "…" not in shown and shown.count("method ") == len(rows)
    assert all(row["source"].split()[0] in shown for row in rows)
