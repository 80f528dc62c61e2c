"""Test that the example command of CONTRIBUTING works as a new file of `rmdd/cli` and as an entry point."""

import importlib
import json
import sys

import pytest
from manual import example, install
from typer.testing import CliRunner

import rmdd.cli
from rmdd.cli.app import build

COMMANDS = example("counting.py")


@pytest.fixture(params=["a file of the folder", "a group of the folder", "an entry point"])
def words(request, tmp_path, monkeypatch):
    """Fixture: install the example command as a file or an entry point (by parameter); yield the words that call it."""
    if request.param == "an entry point":
        name, folder = "counting", tmp_path
        install(folder, name, "rmdd.commands", demo="counting:count_pairs")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        name, folder = "counting", tmp_path / "more"
        folder.mkdir()
        monkeypatch.setattr(rmdd.cli, "__path__", [*rmdd.cli.__path__, str(folder)])
    group = request.param == "a group of the folder"
    (folder / f"{name}.py").write_text(COMMANDS + ("\nGROUP = 'Countings.'\n" if group else ""))
    importlib.invalidate_caches()
    yield ["counting", "count-pairs"] if group else ["count-pairs"]
    sys.modules.pop(name, None)
    sys.modules.pop(f"rmdd.cli.{name}", None)


def test_a_new_command_has_the_common_options_output_and_exit_codes(words):
    app = build()
    use = lambda *more: CliRunner().invoke(app, [*words, *more])  # noqa: E731
    listed = CliRunner().invoke(app, [*words[:-1], "--help"], terminal_width=120).stdout
    assert "count-pairs" in listed and "Count the pairs of a budget." in listed
    text = use("--help").stdout
    assert all(word in text for word in ("CONFIG", "--set", "--times", "--json", "--quiet", "--debug"))
    assert use("demo", "--set", "distill.budget=30").stdout == "30 pairs\n"
    assert json.loads(use("demo", "--set", "distill.budget=30", "--times", "2", "--json").stdout) == {"pairs": 60}
    odd = use("demo", "--set", "distill.budget=31")
    assert odd.exit_code == 2 and odd.stdout == "31 pairs\n" and "31 is odd; set an even" in odd.stderr
    nothing = use("demo", "--times", "0")
    assert nothing.exit_code == 1 and nothing.stderr.endswith("error: nothing to count\n")
    assert use("dmeo").exit_code == 2


def test_a_plugin_cannot_replace_a_command_of_rmdd(words):
    assert "Distil drawn scenes" in CliRunner().invoke(build(), ["demo", "--help"]).stdout
