"""Tests of which hashes contain each field of a run file, by the table in `tests/hash_table.py`."""

import importlib
import inspect
import pkgutil
from typing import get_args

import pytest
from changing import RUN, hashes, moved, sections
from hash_table import MOVES, WITHIN

import rmdd
from rmdd import config
from rmdd.config.hashing import Purpose
from rmdd.config.runfile import Section
from rmdd.runs import paths


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_each_field_changes_the_hashes_listed_in_the_table_and_every_field_is_listed(monkeypatch):
    table = {field: moves.split() for moves, fields in MOVES.items() for field in fields.split()}
    changed = moved(monkeypatch)
    assert changed.keys() == table.keys(), "add a new field to tests/hash_table.py, with the hashes that it changes"
    wrong = {
        field: names
        for field, names in changed.items()
        if names != ([] if table[field] == ["nothing"] else table[field])
    }
    assert wrong == {}


def test_fields_of_method_options_are_in_the_table_and_have_no_hash_mark():
    """A field without `no_hash` or `hash_only` is in every hash that contains its section."""
    for module in pkgutil.walk_packages(rmdd.__path__, "rmdd."):
        importlib.import_module(module.name)
    fields_of, marked = {}, []
    for kind in derived(Section) - {type(section) for section in sections(RUN)}:
        declared = inspect.get_annotations(kind)
        declared_fields = {name: field for name, field in kind.model_fields.items() if name in declared}
        if declared_fields and kind.__module__.startswith("rmdd."):
            fields_of[f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"] = set(declared_fields)
        marked += [f"{kind.__qualname__}.{name}" for name, field in declared_fields.items() if field.json_schema_extra]
    assert fields_of == {name: set(fields.split()) for name, fields in WITHIN.items()}, "update tests/hash_table.py"
    assert marked == []


def derived(kind):
    return {kind}.union(*map(derived, kind.__subclasses__()))


@pytest.mark.parametrize("purpose", get_args(Purpose))
def test_the_default_order_is_in_no_hash(purpose):
    assert not {"order", "between"} & RUN.hashed("evaluate", purpose).keys()


TRAINED = {"run", "store", "phases", "baseline"}
TWO_PHASES = {"distill": {"phases": [{"pairs": 20}, {"pairs": 20}]}, "evaluate": {"batch": 20}}
CHAINED = {"path_start": "student", "phases": [{"pairs": 40}, {"pairs": 40}]}
THREE_CHAINED = {**CHAINED, "phases": [{"pairs": 30}] * 3}
WINDOWED = {"experts": {"shuffle": {"kind": "windowed"}}}


@pytest.mark.parametrize(
    ("base", "change", "moves"),
    [
        ({}, {"experts": {"shuffle": {"block": 8}}}, set()),
        (
            {"experts": {"shuffle": {"kind": "windowed"}}},
            {"experts": {"shuffle": {"block": 8}}},
            TRAINED,
        ),
        ({}, {"experts": {"worker_group": {"strategy": "zero1"}}}, set()),
        ({}, {"experts": {"forgetting": 100}}, TRAINED),
        ({}, {"evaluate": {"augment": "dsa"}}, {"run", "baseline"}),
        ({}, {"evaluate": {"between": "masked"}}, set()),
        (TWO_PHASES, {"evaluate": {"order": "cumulative"}}, {"run", "baseline"}),
        ({"evaluate": {"order": "union"}}, {"evaluate": {"between": "masked"}}, {"run"}),
        ({}, {"seed": 3}, TRAINED | {"plan"}),
        ({}, {"distill": {"guard": {"retries": 9}}}, set()),
        ({"distill": CHAINED}, {"distill": {"path_lag": 5}}, {"run", "phases", "plan"}),
        ({"distill": CHAINED}, {"distill": {"path_epochs": 3}}, {"run", "phases", "plan"}),
        ({"distill": CHAINED}, {"evaluate": {"epochs": 3}}, TRAINED - {"store"}),
        ({"distill": {**CHAINED, "path_epochs": 4}}, {"evaluate": {"epochs": 3}}, {"run", "baseline"}),
        ({"distill": CHAINED}, {"evaluate": {"eval_every": 3}}, {"run"}),
        ({"distill": CHAINED}, {"evaluate": {"seed": 3}}, {"run", "baseline"}),
        ({"distill": CHAINED}, {"evaluate": {"schedule": "shared", "lr": "last"}}, {"run"}),
        ({"distill": THREE_CHAINED}, {"evaluate": {"schedule": "shared"}}, {"run", "phases"}),
        ({"distill": THREE_CHAINED}, {"evaluate": {"lr": "last"}}, {"run", "phases"}),
        ({"distill": THREE_CHAINED}, {"evaluate": {"between": "masked"}}, set()),
        ({}, {"distill": {"path_start": "student", "path_epochs": 3}}, set()),
        ({"distill": CHAINED}, {"evaluate": {"order": "union"}}, {"run", "baseline"}),
        ({"distill": THREE_CHAINED}, {"evaluate": {"order": "union"}}, TRAINED - {"store"}),
        ({"distill": {"phases": "auto"}}, {"distill": {"plan": {"reach": 0.5}}}, {"run", "plan"}),
        ({"distill": {"phases": "adaptive"}}, {"distill": {"plan": {"reach": 0.5}}}, {"run", "plan", "phases"}),
        ({"distill": {"phases": "auto"}}, {"distill": {"plan": {"chain": False}}}, {"run", "plan"}),
        ({"distill": {"phases": "auto", "trajectory": "original"}}, {"distill": {"plan": {"chain": False}}}, set()),
        ({"distill": {"phases": "adaptive"}}, {"distill": {"plan": {"chain": False}}}, set()),
        ({"distill": {"phases": "auto"}}, {"evaluate": {"order": "union"}}, set()),
        ({"distill": THREE_CHAINED}, {"distill": {"path_order": "union"}}, {"run", "phases", "plan"}),
        ({"data": {"reencode": None}}, {"data": {"background": (0, 0, 0)}}, TRAINED),
        ({}, {"data": {"table": {"file": "x.csv"}}}, {"run"}),
    ],
)
def test_a_field_that_has_no_effect_with_the_other_values_is_not_hashed(base, change, moves, monkeypatch):
    for name in ("image_identity", "encoder_identity"):
        monkeypatch.setattr(paths, name, lambda tower: "")

    def hashed(*layers):
        value = RUN.model_dump(mode="json")
        for layer in layers:
            value = config.runfile.filled(layer, value)
        return hashes(config.Run.model_validate(value))

    before, after = hashed(base), hashed(base, change)
    assert {name for name in before if before[name] != after[name]} == moves
