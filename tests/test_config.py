import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rmdd import config
from rmdd.config import ConfigError, load

PHASE = {"pairs": 20, "start": 0, "stop": 2, "endpoint": 3, "iterations": 10}


def with_phase(changes: dict, **distill) -> dict:
    return {"distill": {"phases": [{**PHASE, **changes}], "batch": 10, **distill}}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (with_phase({"stop": 4}), "set phases.0.stop to 3"),
        (with_phase({}, match_epochs=3), "ends past the endpoint 3"),
        (with_phase({"stop": 3}, start_rule="inclusive"), "set phases.0.stop to 2"),
        (with_phase({"stop": 3}, endpoint_rule="exclusive"), "set phases.0.stop to 2"),
        (with_phase({"start": 2}), "is empty; raise stop"),
        (with_phase({"pairs": 1}), "one pair has no negatives"),
        (with_phase({"pairs": 8}), "batch 10 is larger than phases.0 with its 8 pairs"),
        (with_phase({}, similarity={"kind": "low_rank", "rank": 11}), "use at most 10 or similarity.kind: full"),
        ({"distill": {"phases": []}}, "phases is empty"),
        (with_phase({"endpoint": 11}), "set experts.epochs to 11"),
        (with_phase({}, trajectory="original"), "set experts.keep: all"),
        ({"data": {"source": "table"}}, "--set data.root=FOLDER"),
        ({"data": {"split_fractions": [0.5, 0.1, 0.1]}}, "sum to 1"),
        ({"model": {"image": {"trainable": False}}}, "set model.image.projection: block"),
        ({"experts": {"epochz": 3}}, "experts.epochz: unknown key"),
        ({"name": "../escape"}, "name"),
        ({"seed": "many"}, "seed"),
    ],
)
def test_impossible_runs_say_what_to_do(raw, words):
    with pytest.raises(ConfigError) as caught:
        load(raw)
    assert words in str(caught.value)


def test_all_mistakes_at_once_and_picklable():
    with pytest.raises(ConfigError) as caught:
        load({"seed": "x", "experts": {"num": 0}, "nonsense": 1}, ["evaluate.students=0", "no-equals"])
    assert len(caught.value.mistakes) == 5
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_overrides_reach_sections_lists_and_nothing_else():
    raw = {"distill": {"phases": [{**PHASE}, {**PHASE}], "batch": 10}}
    run = load(raw, ["distill.phases.1.pairs=12", "experts.augment.flip=0", "model.image.widths=[8, 16]"])
    assert [p.pairs for p in run.distill.phases] == [20, 12]
    assert run.experts.augment.flip == 0 and run.model.image.widths == (8, 16)
    for override, words in (
        ("distill.phases.2.pairs=3", "no entry '2' (there are 2)"),
        ("seed.deep=1", "'seed' is a value, not a section"),
        ("seed={", "is not a YAML value"),
    ):
        with pytest.raises(ConfigError) as caught:
            load({**raw, "seed": 1}, [override])
        assert words in str(caught.value)


def test_overrides_leave_the_mapping_as_it_was():
    raw = {"seed": 1, "experts": {"num": 2}}
    load(raw, ["seed=5", "experts.num=3"])
    assert raw == {"seed": 1, "experts": {"num": 2}}


@pytest.mark.parametrize("word", ["on", "off"])
def test_ray_is_switched_in_yaml_as_it_is_written(word, tmp_path):
    assert load({}, [f"runtime.ray={word}"]).runtime.ray == word
    (tmp_path / "run.yaml").write_text(f"runtime: {{ray: {word}}}")
    assert load(tmp_path / "run.yaml").runtime.ray == word
    assert load({}, [f"distill.inner_dropout={w}" for w in ("same_mask", "off")]).distill.inner_dropout == "off"


def test_files_that_are_no_run(tmp_path):
    for text, words in (("a: [", "not valid YAML"), ("- 1", "expected sections"), ("", None)):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        if words is None:
            assert load(file) == config.Run()
            continue
        with pytest.raises(ConfigError, match=words):
            load(file)
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.yaml")


@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(1e-6, 1e6),
    pairs=st.integers(10, 400),
    epochs=st.integers(3, 30),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_a_dumped_run_loads_to_itself(seed, lr, pairs, epochs, name):
    run = load({"name": name, "seed": seed, "experts": {"epochs": epochs}, **with_phase({"pairs": pairs}, lr_image=lr)})
    again = load(yaml.safe_load(config.dump(run)))
    assert again == run and again.hash_of() == run.hash_of()


@given(storage=st.text(min_size=1), workers=st.integers(1, 64), root=st.text(min_size=1))
def test_places_and_width_of_a_run_are_not_in_its_hash(storage, workers, root):
    base = {"data": {"source": "table", "root": "here"}}
    moved = {
        "name": "other",
        "data": {"source": "table", "root": root},
        "runtime": {"storage": storage, "workers": workers},
    }
    assert load(base).hash_of() == load(moved).hash_of()


def test_the_hash_follows_what_is_computed():
    hashes = {load({}, [change]).hash_of() for change in ("seed=0", "seed=1", "distill.steps=7", "evaluate.students=6")}
    assert len(hashes) == 4
    own = load({"experts": {"seed": 3}, "distill": {"seed": 3}, "evaluate": {"seed": 3}})
    assert own.hash_of() == load({"seed": 3}).hash_of()
    assert load({}, ["evaluate.students=6"]).hash_of("experts") == load({}).hash_of("experts")


def test_every_field_says_what_it_is():
    sections = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, config.Section)]
    silent = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and field.annotation in sections)
    ]
    assert silent == []


def test_a_run_is_a_value_that_can_be_a_key():
    lists = {"source": "lists", "root": "here", "annotations": {"train": "t.json", "val": "v.json"}}
    a, b = load({"data": lists}), load({"data": lists})
    assert {a: 1}[b] == 1 and load({"data": lists}, ["seed=1"]) not in {a}
    assert hash(a.data.scenes) == hash(config.Scenes())
