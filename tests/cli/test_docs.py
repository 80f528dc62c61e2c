"""Test the command `rmdd docs`, and the pages of the manual that are generated from code."""

import ast
import functools

import pytest
from typer.testing import CliRunner

from rmdd.cli import docs, reference
from rmdd.cli.app import app
from rmdd.config.recipes import BUILT_IN


def shown(*words):
    return CliRunner().invoke(app, ["docs", *words])


def test_all_pages_are_listed_with_their_title():
    lines = shown().stdout.splitlines()
    assert lines[0].split("  ")[0] == "quickstart" and lines[0].endswith("  Quick start")
    names = [line.split()[0] for line in lines]
    assert {*docs.ORDER} | {f"methods/{name}" for name in BUILT_IN} == {*names}
    assert all(line.split(maxsplit=1)[1] for line in lines)


def test_a_page_is_plain_text_in_a_pipe_and_drawn_on_a_terminal(monkeypatch):
    text = (docs.FOLDER / "methods" / "lors.md").read_text(encoding="utf-8")
    assert shown("methods/lors").stdout == shown("lors").stdout == text
    monkeypatch.setattr(docs, "_rendered", lambda text: "drawn")
    monkeypatch.setattr(docs, "sys", type("System", (), {"stdout": type("Terminal", (), {"isatty": lambda: True})}))
    assert shown("lors").stdout == "drawn\n"


def test_every_page_can_be_drawn():
    from rich.console import Console

    with open("/dev/null", "w") as nowhere:
        for path in docs.pages().values():
            Console(file=nowhere, width=100).print(docs._rendered(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("quickstrat", "did you mean quickstart"),
        ("lorss", "did you mean methods/lors"),
        ("zzz", "`rmdd docs` lists all pages"),
    ],
)
def test_an_unknown_page_names_the_closest_one(asked, hint):
    result = shown(asked)
    assert result.exit_code == 2 and f"unknown page '{asked}'; {hint}" in result.stderr and result.stdout == ""


@pytest.mark.parametrize("name", sorted([*(f"methods/{name}.md" for name in BUILT_IN), "api.md"]))
def test_generated_pages_are_up_to_date(name):
    text = generated()[name]
    path = docs.FOLDER / name
    assert path.is_file() and path.read_text(encoding="utf-8") == text, "run `python -m rmdd.cli.reference`"


@functools.cache
def generated():
    """Return the texts of all generated pages by path."""
    return reference.generated()


def test_no_page_is_left_of_a_method_that_does_not_exist():
    left = {path.stem for path in (docs.FOLDER / "methods").glob("*.md")} - set(BUILT_IN)
    assert left == set(), "run `python -m rmdd.cli.reference`"


def test_a_signature_keeps_what_was_written():
    source = "def f(self, a: int, b: 'Later' = 2, *c: str, d: float, e: str = 'x', **rest: object) -> 'Later': ..."
    node = ast.parse(source).body[0]
    text = "f(a: int, b: Later = 2, *c: str, d: float, e: str = 'x', **rest: object) -> Later"
    assert reference._signature(node, "f")[1] == text
