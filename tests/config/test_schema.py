"""Test the JSON Schema of run files: it accepts what rmdd accepts, and marks wrong fields and values."""

import json
import re

import jsonschema
import pytest
from manual import ROOT, blocks
from typer.testing import CliRunner

from rmdd import config
from rmdd.cli.app import app
from rmdd.config.presets import preset
from rmdd.config.runfile import parse
from rmdd.config.schema import run_file_schema
from rmdd.config.template import template


@pytest.fixture(scope="module")
def validator():
    """Fixture: a validator with the schema of run files."""
    schema = run_file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def mistakes(validator, raw) -> list[str]:
    return [error.message for error in validator.iter_errors(json.loads(json.dumps(raw)))]


def test_all_presets_are_valid_alone_and_with_what_they_extend(validator):
    for name in config.preset_names():
        assert mistakes(validator, preset(name)) == mistakes(validator, config.read(name)) == [], name


def test_the_examples_of_the_manual_are_valid(validator):
    pages = (ROOT / "rmdd" / "docs").glob("*.md")
    sections = {*config.Run.model_fields, "extends"}
    texts = [block.text for page in pages for block in blocks(page) if block.kind == "yaml"]
    files = [
        file for file in map(parse, texts) if isinstance(file, dict) and {k.split(".")[0] for k in file} <= sections
    ]
    assert len(files) > 10
    for file in files:
        assert mistakes(validator, file) == [], file


def test_a_written_run_and_the_template_are_valid(validator):
    written = parse(config.dump(config.load("demo", ["seed=4", "distill.batch=3"])))
    assert written["for_any_method"] == {"distill": {"batch": 3}} and mistakes(validator, written) == []
    text = template({"extends": "demo", "name": "mine"}, {}, [])
    assert mistakes(validator, parse(text)) == [] == mistakes(validator, parse(re.sub(r"(?m)^#(?=\w)", "", text)))


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"extends": "../base.yaml", "distill": None},
        {"distill": {"phases": "auto", "method": "my.module:Method", "options": {"sharpness": 3}}},
        {"distill": {"method": "mct", "options": {"anchors": 5}}, "distill.phases.0.pairs": 3, "distill.batch": 3},
        {"evaluate": {"reference": False, "probes": {"p": {"kind": "vqa"}}}, "runtime": {"track": "none"}},
    ],
)
def test_files_that_a_user_may_write_are_valid(validator, raw):
    assert mistakes(validator, raw) == []


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"distil": {}}, "'distil' does not match"),
        ({"distill": {"btch": 3}}, "'btch' was unexpected"),
        ({"distill": {"batch": "many"}}, "'many' is not of type 'integer'"),
        ({"distill.batch": 0}, "0 is less than"),
        ({"distill.btch": 3}, "'distill.btch' does not match"),
        ({"distill.phases.0.batch": 3}, "does not match"),
        ({"distill": {"method": "lros"}}, "'lros' is not valid"),
        ({"distill": {"method": "mct", "options": {"rank": 3}}}, "'rank' was unexpected"),
        ({"distill": {"phases": [{"pairs": 3, "endpoint": -1}]}}, "not valid"),
        ({"evaluate": {"probes": {"p": {"kind": "zero_shot", "colour": 1}}}}, "not valid"),
        ({"runtime": {"ray": "maybe"}}, "'maybe' is not"),
        ({"extends": 3}, "3 is not valid"),
    ],
)
def test_wrong_fields_and_values_are_marked(validator, raw, words):
    found = mistakes(validator, raw)
    assert len(found) == 1 and words in found[0]


def test_fields_are_explained(validator):
    fields = validator.schema["$defs"]["Distill"]["properties"]
    described = [name for name, field in fields.items() if "description" in field or "$ref" in field]
    assert described == list(fields)
    assert "demo" in validator.schema["properties"]["extends"]["anyOf"][0]["enum"]


def test_the_command_prints_or_writes_the_schema(tmp_path, validator):
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == validator.schema
    done = CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "s.json")])
    assert json.loads((tmp_path / "s.json").read_text()) == validator.schema
    assert f"# yaml-language-server: $schema={tmp_path}/s.json" in done.stdout
