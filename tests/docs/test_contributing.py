"""Files for contributors: the versions that they state agree, and the paths that they name exist."""

import re
import tomllib

import pytest
import yaml
from manual import CONTRIBUTING, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_workflow_calls_the_same_script_as_people():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert {"run": ".ci/run"} in workflow["jobs"]["tests"]["steps"]
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert least in workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]


def test_hooks_have_the_versions_of_the_project():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pinned = {requirement for hook in hooks for requirement in hook.get("additional_dependencies", ())}
    extra = PROJECT["project"]["optional-dependencies"]["test"]
    assert pinned == {requirement for requirement in extra if requirement.startswith("ruff")}
    assert {hook["entry"].split()[0] for hook in hooks} == {"ruff", "mypy"}


def test_citation_and_changelog_have_the_version_of_the_project():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (version, PROJECT["project"]["license"])
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == version


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms(template):
    form = yaml.safe_load(template.read_text(encoding="utf-8"))
    if template.stem != "config":
        assert form["name"] and form["description"]
        ids = [part["id"] for part in form["body"]]
        assert len(set(ids)) == len(ids) and all(part["attributes"]["label"] for part in form["body"])


@pytest.mark.parametrize("page", [CONTRIBUTING, ROOT / "tests" / "README.md"], ids=lambda path: path.name)
def test_named_paths_exist(page):
    words = re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8"))
    paths = [word for word in words if "/" in word and not re.search(r"NAME|DATASET|^dist/|^/", word)]
    missing = [
        path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "rmdd", ROOT / "tests"))
    ]
    assert paths and missing == []


def test_every_room_of_tests_is_listed():
    rooms = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.rglob("test_*.py"))}
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert {room for room in rooms if f"| `{room}/` |" not in text} == set()
    helpers = {path.name for path in (ROOT / "tests").glob("*.py")} - {"conftest.py"}
    assert {name for name in helpers if f"`{name}`" not in text} == set()
