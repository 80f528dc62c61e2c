import copy
import pickle
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd import config, methods
from rmdd.config import ConfigError, load
from rmdd.config.runfile import MOVED, Section, validate

PHASE = {"pairs": 20, "start": 0, "stop": 2, "endpoint": 3, "iterations": 10}


def with_phase(changes: dict, **distill) -> dict:
    return {"distill": {"phases": [{**PHASE, **changes}], "batch": 10, **distill}}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (with_phase({"stop": 4}), "set distill.phases.0.stop to 3"),
        (with_phase({}, match_epochs=3), "lies 3 epoch(s) later, past the endpoint 3"),
        (with_phase({"stop": 3}, start_rule="inclusive"), "set distill.phases.0.stop to 2"),
        (with_phase({"stop": 3}, endpoint_rule="exclusive"), "set distill.phases.0.stop to 2"),
        (with_phase({"start": 2}), "is empty; raise stop"),
        (with_phase({"pairs": 1}), "a single pair has no negatives"),
        (with_phase({"pairs": 8}), "batch 10 is larger than the 8 pairs of distill.phases.0"),
        (
            with_phase({}, similarity={"kind": "low_rank", "rank": 11}),
            "use at most 10 or distill.similarity.kind: full",
        ),
        ({"distill": {"phases": []}}, "phases is empty"),
        (with_phase({"endpoint": 11}), "set experts.epochs to 11"),
        (with_phase({}, trajectory="original"), "set experts.keep: all"),
        ({"data": {"source": "table"}}, "--set data.root=FOLDER"),
        ({"data": {"split_fractions": [0.5, 0.1, 0.1]}}, "sum to 1"),
        ({"model": {"image": {"trainable": False}}}, "set model.image.projection: block"),
        ({"model": {"image": {"trainable": False, "weights": "random", "projection": "block"}}}, "or random:SEED"),
        ({"model": {"image": {"name": "convnet", "weights": "pretrained"}}}, "convnet has no pretrained weights"),
        ({"model": {"image": {"name": "convnet"}}, "data": {"normalise": "tower"}}, "convnet defines no normalisation"),
        (
            {"data": {"source": "lists", "root": "r", "annotations": {"dev": "d.json"}}},
            "data.annotations.dev: unknown key",
        ),
        (
            {"data": {"source": "lists", "root": "r", "annotations": {}}},
            "data.annotations or data.table.file is an empty mapping",
        ),
        ({"data": {"source": "karpathy", "root": "r", "annotations": {"val": "v.json"}}}, "use source: lists"),
        (
            {"experts": {"worker_group": {"workers": 2}}, "runtime": {"gpus_per_worker": 0.5}},
            "set runtime.gpus_per_worker to 1, or experts.worker_group.workers to 1",
        ),
        ({"runtime": {"gpus_per_worker": 1.5}}, "set a share up to 1, or a whole number"),
        ({"experts": {"epochz": 3}}, "experts.epochz: unknown key; did you mean epochs?"),
        (with_phase({"pirs": 3}), "distill.phases.0.pirs: unknown key; did you mean pairs?"),
        ({"distill": {"iteratons": 3}}, "iteratons: unknown key; did you mean distill.phases.0.iterations or distill."),
        ({"zebra": 3}, "zebra: unknown key; `rmdd init` writes a file with all keys"),
        ({"experts": {"gang": {"workers": 2}}}, "experts.gang: moved to experts.worker_group"),
        ({"name": "../escape"}, "name"),
        ({"seed": "many"}, "seed"),
    ],
)
def test_an_error_about_an_impossible_run_says_what_to_do(raw, words):
    with pytest.raises(ConfigError) as caught:
        load(raw)
    assert words in str(caught.value)


def test_a_frozen_random_tower_is_allowed_with_a_seed():
    image = {"name": "convnet", "weights": "random:3", "trainable": False, "projection": "block"}
    assert not load({"model": {"image": image}}).model.image.trainable


def test_a_run_file_can_extend_presets_and_files(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text(
        "extends: demo\nname: base\nexperts: {num: 5}\ndistill: {phases: [{pairs: 20, endpoint: 2}], lr_text: 0.5}\n"
    )
    (tmp_path / "mine.yaml").write_text("extends: below/base.yaml\nname: mine\nexperts: {epochs: 4}\ndistill:\n")
    monkeypatch.chdir(tmp_path / "below")
    demo, run = load("demo"), load(tmp_path / "mine.yaml")
    assert (run.name, run.experts.num, run.experts.epochs, run.experts.batch) == ("mine", 5, 4, demo.experts.batch)
    assert run.distill.phases == (config.Phase(pairs=20, endpoint=2),), "lists are not merged"
    assert run.distill.lr_text == 0.5 and run.distill.lr_image == demo.distill.lr_image
    assert load({"extends": "base.yaml", "name": "mine", "experts": {"epochs": 4}}) == run
    assert load(tmp_path / "mine.yaml", ["distill.phases.0.pairs=7", "distill.batch=4"]).distill.phases[0].pairs == 7
    assert load(yaml.safe_load(config.dump(run))) == run and "extends" not in config.dump(run)


def test_values_of_an_extended_file_of_the_user_win_over_the_defaults_of_the_method(tmp_path):
    (tmp_path / "base.yaml").write_text("distill: {method: mct, lr_image: 5000}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ndistill: {method: tesla_vl}\n")
    rule = load(tmp_path / "mine.yaml").distill
    assert (rule.similarity.kind, rule.lr_image, rule.trajectory) == ("identity", 5000, "original")


def test_a_run_file_may_state_fields_by_their_dotted_names(tmp_path):
    (tmp_path / "base.yaml").write_text("distill.batch: 9\ndata: {captions: {lowercase: false}}")
    (tmp_path / "a.yaml").write_text(
        "extends: base.yaml\ndistill: {steps: 3, batch: 7}\ndistill.steps: 4\ndata.captions.max_words: 5"
    )
    run, base = load(tmp_path / "a.yaml"), load(tmp_path / "base.yaml")
    assert (run.distill.steps, run.distill.batch, base.distill.batch) == (4, 7, 9)
    assert run.data.captions == config.Captions(lowercase=False, max_words=5)
    assert load({"distill.batch": 9, "data.captions.lowercase": False}) == base
    with pytest.raises(ConfigError, match=r"distill\.bacth: unknown key"):
        load({"distill.bacth": 9})
    with pytest.raises(ConfigError, match=r"seed\.x: 'seed' is a value, not a section"):
        load({"seed": 1, "seed.x": 2})


def test_errors_about_extends(tmp_path):
    for text, words in (
        ("extends: demoo", "extends: no preset 'demoo'; did you mean demo?"),
        ("extends: other.yaml", f"there is no file {tmp_path / 'other.yaml'}"),
        ("extends: [demo]", "give the name of a preset or the path of a YAML file, found ['demo']"),
        ("extends: list.yaml", "expected sections such as `data:` at the top, found a list"),
        ("extends: run.yaml", "in a circle, run.yaml -> run.yaml"),
        ("extends: a.yaml", "in a circle, a.yaml -> b.yaml -> a.yaml"),
    ):
        for name, content in (("run", text), ("a", "extends: b.yaml"), ("b", "extends: a.yaml"), ("list", "- 1")):
            (tmp_path / f"{name}.yaml").write_text(content)
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "run.yaml")
        assert words in str(caught.value)


def test_a_config_error_has_all_mistakes_and_can_be_pickled():
    with pytest.raises(ConfigError) as caught:
        load({"seed": "x", "experts": {"num": 0}, "nonsense": 1}, ["evaluate.students=0", "no-equals"])
    assert len(caught.value.mistakes) == 5
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_bad_combinations_are_reported_beside_invalid_fields():
    raw = {
        "seed": "x",
        "data": {"source": "table", "image_size": 1},
        "experts": {"num": 0, "epochs": 2},
        **with_phase({"pairs": 8}, steps=0, lr_lr="fast"),
    }
    with pytest.raises(ConfigError) as caught:
        load(raw)
    fields = ("seed: ", "data.image_size: ", "experts.num: ", "distill.steps: ", "distill.lr_lr: ")
    clashes = (
        "source 'table' reads files",
        "distill.batch 10 is larger",
        "need expert epoch 3, but experts are trained for 2 epochs",
    )
    for words in fields + clashes:
        assert sum(words in mistake for mistake in caught.value.mistakes) == 1, words
    assert len(caught.value.mistakes) == len(fields + clashes)


@pytest.mark.parametrize(
    "raw",
    [
        {"data": {"source": "table", "root": 3}},
        {"experts": {"epochs": "two"}, **with_phase({"endpoint": 12})},
        with_phase({"pairs": "eight"}),
        {"distill": {"phases": [{"endpoint": 3}], "batch": 200}},
        {"distill": [3]},
        {"experts": {3: 1}},
        {"data": {"source": "lists", "root": "r", "annotations": 3}},
    ],
)
def test_an_invalid_field_is_reported_once(raw):
    with pytest.raises(ConfigError) as caught:
        load(raw)
    places = {".".join(mistake.partition(": ")[0].split(".")[:2]) for mistake in caught.value.mistakes}
    assert len(places) == 1


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (with_phase({"pairs": 8}, batches=3), "distill.batches"),
        (with_phase({"pairs": 8}, method=3), "distill.method"),
        (with_phase({"start": 2}, start_rule="inclusiv"), "distill.start_rule"),
        (with_phase({"stop": 4}, trajectory=3), "distill.trajectory"),
        ({"distill": {"phases": [], "plan": {"kind": 3}}}, "distill.plan.kind"),
    ],
)
def test_a_combination_is_not_checked_if_one_of_its_fields_is_invalid(raw, field):
    with pytest.raises(ConfigError) as caught:
        load(raw)
    assert all(mistake.startswith(f"{field}: ") for mistake in caught.value.mistakes)


def test_a_section_of_another_package_may_return_its_clashes_as_plain_strings():
    class Options(Section):
        share: float = 2

        def clashes(self):
            return ["share is more than 1"]

    assert validate(Options, {}) == (None, ["share is more than 1"])


def test_a_section_created_in_code_is_checked_too():
    with pytest.raises(ValueError, match="set data.root"):
        config.Data(source="table")


def test_a_preset_is_not_hidden_by_a_file_or_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load("demo").name == "demo"
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="no preset 'mine'"):
        load("mine")
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("name: here")
    assert (load("demo").name, load("./demo").name) == ("demo", "here")


@pytest.mark.parametrize("name", config.preset_names())
def test_a_preset_run_can_be_a_dict_key(name):
    run, again = (load(name, [] if name == "demo" else ["data.root=somewhere"]) for _ in range(2))
    assert len({run, again}) == 1


def test_an_override_changes_an_entry_of_a_default_list():
    run = load({}, ["distill.phases.0.pairs=20", "model.image.widths.1=64", "experts.augment.crop_scale.0=0.25"])
    assert run.distill.phases == (config.Distill().phases[0].model_copy(update={"pairs": 20}),)
    assert run.model.image.widths == (64, 64, 128) and run.experts.augment.crop_scale == (0.25, 1.0)
    with pytest.raises(ConfigError, match="no entry '1'; the list has 1 entries"):
        load({}, ["distill.phases.1.pairs=20"])


def test_an_override_changes_an_entry_of_a_list_of_the_method():
    for raw, named in (({"distill": {"method": "lors"}}, []), ({}, ["distill.method=lors"])):
        (phase,) = load(raw, ["distill.phases.0.pairs=30", *named]).distill.phases
        assert (phase.pairs, phase.iterations) == (30, 3000)


def test_an_override_of_the_method_sets_the_defaults_of_that_method():
    run = load("flickr30k_ptm_st_100", ["data.root=x", "distill.method=lors", "distill.lr_text=7"])
    rule = run.distill
    assert (rule.trajectory, rule.similarity.kind, rule.ema, rule.estimator) == (
        "original",
        "low_rank",
        0,
        "first_order",
    )
    assert (rule.lr_image, rule.lr_text, run.experts.keep) == (100, 7, "all")
    same = load("flickr30k_ptm_st_100", ["data.root=x", "distill.method=ptm_st"])
    assert same == load("flickr30k_ptm_st_100", ["data.root=x"])


def test_ranges_found_from_drift_have_their_ends_included():
    with pytest.raises(ConfigError, match="drift already includes the last start epoch"):
        load("emoji_amd_100", ["data.root=x", "distill.trajectory=convexified", "distill.start_rule=inclusive"])


@pytest.mark.parametrize("field", [name for name in MOVED if name.startswith("distill.")])
def test_the_error_about_a_moved_field_names_its_new_place(field):
    section, _, name = field.partition(".")
    words = rf"^run: 1 mistake\(s\)\n  - {field}: moved to {re.escape(MOVED[field])}$"
    with pytest.raises(ConfigError, match=words):
        load({section: {name: "x"}})
    with pytest.raises(ConfigError, match=words):
        load({}, [f"{field}=x"])


def test_default_options_have_the_same_hash_written_or_not():
    bare, written = (load({"distill": {"method": "mct", **more}}) for more in ({}, {"options": {"anchors": 2}}))
    assert bare == written and bare.distill.options["anchors"] == 2 and bare.hash_of() == written.hash_of()
    raw = config.Run.model_validate({"distill": bare.distill.model_dump() | {"options": {}}})
    for section in ("distill", "experts"):
        assert raw.hashed(section, "phases") == bare.hashed(section, "phases")
    assert load({"distill": {"method": "mct", "options": {"anchors": 3}}, "experts": {"keep": "all"}}).hash_of() != (
        load({"distill": {"method": "mct"}, "experts": {"keep": "all"}}).hash_of()
    )


def test_options_of_the_method_in_the_file_are_dropped_for_another_method():
    raw = load({"distill": {"method": "mct", "options": {"rate_branches": "same"}}}).model_dump(mode="json")
    assert load(raw, ["distill.method=lors"]).distill.options == {"rate_branches": "same"}
    with pytest.raises(ConfigError, match="distill.options.anchors: unknown key; `rmdd methods lors` lists them"):
        load(raw, ["distill.method=lors", "distill.options.anchors=3"])


def test_overrides_change_sections_and_list_entries_only():
    raw = {"distill": {"phases": [{**PHASE}, {**PHASE}], "batch": 10}}
    run = load(raw, ["distill.phases.1.pairs=12", "experts.augment.flip=0", "model.image.widths=[8, 16]"])
    assert [p.pairs for p in run.distill.phases] == [20, 12]
    assert run.experts.augment.flip == 0 and run.model.image.widths == (8, 16)
    for override, words in (
        ("distill.phases.2.pairs=3", "no entry '2'; the list has 2 entries"),
        ("seed.deep=1", "'seed' is a value, not a section"),
        ("seed={", "is not a YAML value"),
    ):
        with pytest.raises(ConfigError) as caught:
            load({**raw, "seed": 1}, [override])
        assert words in str(caught.value)


def test_overrides_do_not_change_the_given_mapping():
    raw = {"seed": 1, "experts": {"num": 2}}
    load(raw, ["seed=5", "experts.num=3"])
    assert raw == {"seed": 1, "experts": {"num": 2}}


@pytest.mark.parametrize("word", ["on", "off"])
def test_ray_on_and_off_are_read_as_words_from_yaml(word, tmp_path):
    assert load({}, [f"runtime.ray={word}"]).runtime.ray == word
    (tmp_path / "run.yaml").write_text(f"runtime: {{ray: {word}}}")
    assert load(tmp_path / "run.yaml").runtime.ray == word
    assert load({}, [f"distill.inner_dropout={w}" for w in ("same_mask", "off")]).distill.inner_dropout == "off"


def test_errors_about_files_that_are_not_run_files(tmp_path):
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


@settings(deadline=None)
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


PATHS = st.text(min_size=1).filter(lambda text: "://" not in text)  # a random text with :// may be an invalid URI


@settings(deadline=None)
@given(storage=PATHS, workers=st.integers(1, 64), root=PATHS)
def test_paths_and_resources_of_a_run_are_not_hashed(storage, workers, root):
    base = {"data": {"source": "table", "root": "here"}}
    moved = {
        "name": "other",
        "data": {"source": "table", "root": root},
        "runtime": {"storage": storage, "workers": workers},
    }
    assert load(base).hash_of() == load(moved).hash_of()


@pytest.mark.parametrize("field", ["guard.retries=9", "checkpoint_every=7", "budget_check=warn"])
def test_retries_and_checkpoint_intervals_are_not_hashed(field):
    assert load({}, [f"distill.{field}"]).hash_of() == load({}).hash_of()


def test_the_hash_changes_with_fields_that_change_results():
    hashes = {load({}, [change]).hash_of() for change in ("seed=0", "seed=1", "distill.steps=7", "evaluate.students=6")}
    assert len(hashes) == 4
    own = load({"experts": {"seed": 3}, "distill": {"seed": 3}, "evaluate": {"seed": 3}})
    assert own.hash_of() == load({"seed": 3}).hash_of()
    assert load({}, ["evaluate.students=6"]).hash_of("experts") == load({}).hash_of("experts")


def test_every_field_has_a_description():
    sections = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, config.Section)]
    missing = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and field.annotation in sections)
    ]
    assert missing == []


def test_a_run_can_be_a_dict_key():
    lists = {"source": "lists", "root": "here", "annotations": {"train": "t.json", "val": "v.json"}}
    a, b = load({"data": lists}), load({"data": lists})
    assert {a: 1}[b] == 1 and load({"data": lists}, ["seed=1"]) not in {a}
    assert hash(a.data.scenes) == hash(config.Scenes())


def test_overrides_do_not_change_the_defaults_of_a_method():
    before = copy.deepcopy(methods.find("lors").defaults)
    lors = ["distill.method=lors", "distill.path_start=theta_0", "distill.path_lag=null", "distill.path_epochs=null"]
    run = config.load("demo", [*lors, "distill.phases.0.pairs=27", "distill.similarity.rank=2"])
    assert run.distill.phases[0].pairs == 27 and run.distill.similarity.rank == 2
    assert methods.find("lors").defaults == before
