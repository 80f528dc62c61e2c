"""What each field shapes: the same hashes as ever, and none for a field that does not say."""

import importlib
import inspect
import pkgutil

import pytest
from changing import RUN, hashes, moved, sections
from hash_table import MOVES, WITHIN

import rmdd
from rmdd import config
from rmdd.config.runfile import Section
from rmdd.runs import paths


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_field_moves_the_hashes_of_the_table_and_a_new_one_has_to_be_in_it(monkeypatch):
    table = {field: moves.split() for moves, fields in MOVES.items() for field in fields.split()}
    found = moved(monkeypatch)
    assert found.keys() == table.keys(), "a new field goes into tests/hash_table.py: what does it shape?"
    wrong = {
        field: names for field, names in found.items() if names != ([] if table[field] == ["nothing"] else table[field])
    }
    assert wrong == {}


def test_a_field_of_options_or_of_a_listed_section_is_in_the_table_and_has_no_mark():
    """A field without a mark enters every hash that its section enters."""
    for module in pkgutil.walk_packages(rmdd.__path__, "rmdd."):
        importlib.import_module(module.name)
    found, marked = {}, []
    for kind in derived(Section) - {type(section) for section in sections(RUN)}:
        declared = inspect.get_annotations(kind)
        own = {name: field for name, field in kind.model_fields.items() if name in declared}
        if own and kind.__module__.startswith("rmdd."):
            found[f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"] = set(own)
        marked += [f"{kind.__qualname__}.{name}" for name, field in own.items() if field.json_schema_extra]
    assert found == {name: set(fields.split()) for name, fields in WITHIN.items()}, "it goes into tests/hash_table.py"
    assert marked == []


def derived(kind):
    return {kind}.union(*map(derived, kind.__subclasses__()))


TRAINED = {"run", "store", "phases", "baseline"}
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
        ({}, {"seed": 3}, TRAINED | {"plan"}),
        ({}, {"distill": {"guard": {"retries": 9}}}, set()),
        ({"distill": {"phases": "auto"}}, {"distill": {"plan": {"reach": 0.5}}}, {"run", "plan"}),
        ({"distill": {"phases": "adaptive"}}, {"distill": {"plan": {"reach": 0.5}}}, {"run", "plan", "phases"}),
        ({"data": {"reencode": None}}, {"data": {"background": (0, 0, 0)}}, TRAINED),
        ({}, {"data": {"table": {"file": "x.csv"}}}, {"run"}),
    ],
)
def test_what_changes_nothing_as_it_is_set_enters_no_hash(base, change, moves, monkeypatch):
    for name in ("image_identity", "encoder_identity"):
        monkeypatch.setattr(paths, name, lambda tower: "")

    def hashed(*layers):
        value = RUN.model_dump(mode="json")
        for layer in layers:
            value = config.runfile.filled(layer, value)
        return hashes(config.Run.model_validate(value))

    before, after = hashed(base), hashed(base, change)
    assert {name for name in before if before[name] != after[name]} == moves
