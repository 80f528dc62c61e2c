import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from rmdd import config
from rmdd.cli import app as cli
from rmdd.config import budget
from rmdd.runs import first_run
from rmdd.runs.first_run import MINILM, FirstRun, Machine


def rmdd_(*words: str):
    return CliRunner().invoke(cli.app, list(words), catch_exceptions=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Fixture: the working folder, with 12 images and a table of captions in `mine`; MiniLM is not installed."""
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == MINILM else found(name, *more))
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: cls(2, 8.0, ())))
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "mine" / "photos" / f"{i}.png")
    rows = [f"photos/{i}.png,a picture of number {i}" for i in range(12)]
    (tmp_path / "mine" / "list.csv").write_text("\n".join(["file,words", *rows]), encoding="utf-8")
    return tmp_path


def test_init_without_data_writes_a_run_on_drawn_scenes_and_overwrites_only_if_told(folder):
    done = rmdd_("init")
    assert done.exit_code == 0 and "2 cores" in done.stdout and "wrote run.yaml" in done.stdout
    run = config.load("run.yaml")
    assert run.data.source == "scenes" and run.model.text.name == "hashing" and run.distill.optimiser == "normalised"
    (folder / "run.yaml").write_text("name: mine", encoding="utf-8")
    again = rmdd_("init")
    assert again.exit_code == 2 and "exists already" in again.stderr and "--force" in again.stderr
    assert (folder / "run.yaml").read_text(encoding="utf-8") == "name: mine"
    assert rmdd_("init", "--force").exit_code == 0 and config.load("run.yaml") == run


def test_init_describes_the_data_and_check_accepts_the_run(folder):
    done = rmdd_("init", "a.yaml", "--data", "mine")
    assert done.exit_code == 0, done.stderr
    for words in (
        "source    table",
        "12, with 12 captions (1 per image)",
        "12 x 9",
        "words     median 5 per caption",
        "train 8, val 2, test 2",
        "column file holds paths of images, and words holds captions",
        "the data names no split",
    ):
        assert words in done.stdout
        assert words in (folder / "a.yaml").read_text(encoding="utf-8")
    run = config.load("a.yaml")
    assert run.name == "mine" and run.data.root == str(folder / "mine") and run.runtime.gpus_per_worker == 0
    assert sum(phase.pairs for phase in run.distill.phases) < 8 and run.distill.budget < 8 and run.experts.batch <= 8
    checked = rmdd_("check", "a.yaml", "--json")
    assert checked.exit_code == 0, checked.stderr
    facts = json.loads(checked.stdout)
    assert facts["budget"]["over"] is None and facts["data"]["counts"]["val"] == [2, 2]


@pytest.mark.parametrize(("words", "limit"), [(30, 30), (50, 50), (500, 160)])
def test_init_keeps_the_words_of_long_captions(folder, words, limit):
    rows = [f"photos/{i}.png," + " ".join(["word"] * (words - 1) + [str(i)]) for i in range(12)]
    (folder / "mine" / "list.csv").write_text("\n".join(["file,words", *rows]), encoding="utf-8")
    assert rmdd_("init", "a.yaml", "--data", "mine", "--for", "gpu").exit_code == 0
    run = config.load("a.yaml")
    assert run.data.captions.max_words == limit and run.model.text.max_tokens == max(64, int(1.6 * limit))


def test_init_refuses_data_with_too_few_images_to_train_on(folder):
    rows = "".join(f"photos/{i}.png,a picture\n" for i in range(4))
    (folder / "mine" / "few.csv").write_text(f"file,words\n{rows}", encoding="utf-8")
    done = rmdd_("init", "a.yaml", "--data", "mine/few.csv")
    assert done.exit_code == 1 and "4 images, which give the splits train 2, val 1, test 1" in done.stderr
    assert not (folder / "a.yaml").exists()


def test_each_commented_field_can_be_uncommented_alone_or_with_all_others(folder):
    assert rmdd_("init", "--data", "mine").exit_code == 0
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    run, lines = config.load("run.yaml"), text.splitlines()
    fields = [i for i, line in enumerate(lines) if line[:1] == "#" and line[1:2] not in (" ", "")]
    assert len(fields) > 100
    for i in [*fields[::12], fields]:
        chosen = i if isinstance(i, list) else [i]
        changed = [line[1:] if n in chosen else line for n, line in enumerate(lines)]
        (folder / "b.yaml").write_text("\n".join(changed), encoding="utf-8")
        assert config.load("b.yaml").hash_of() == run.hash_of(), [changed[n] for n in chosen][:1]
    named = {lines[i][1:].partition(":")[0] for i in fields}
    stated = {"name", "data.source", "data.root", "data.table.file", "data.table.image", "data.table.caption"}
    stated |= {"data.splits.val", "data.splits.test", "model.text.name", "experts.batch", "experts.epochs"}
    stated |= {f"distill.{name}" for name in ("budget", "batch", "phases", "match_epochs")}
    assert not stated & named and stated | named == set(leaves(config.Run(), ""))


def leaves(section, prefix):
    """Return the dotted names of all fields of a section and of the sections in it."""
    for key in type(section).model_fields:
        value = getattr(section, key)
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, config.Section) else (f"{prefix}{key}",)


def test_init_for_a_gpu_takes_pretrained_towers(folder, monkeypatch):
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: cls(16, 64.0, ("NVIDIA H200", "NVIDIA H200"))))
    done = rmdd_("init", "--data", "mine/list.csv")
    assert done.exit_code == 0 and "2 GPU (NVIDIA H200)" in done.stdout
    run = config.load("run.yaml")
    assert run.runtime.gpus_per_worker == 1 and run.model.image.weights == "pretrained"
    assert rmdd_("init", "cpu.yaml", "--data", "mine", "--for", "cpu").exit_code == 0
    assert config.load("cpu.yaml").runtime.gpus_per_worker == 0


def test_init_fits_a_preset_to_the_data_and_names_missing_data(folder):
    assert rmdd_("init", "--preset", "demo", "--data", "mine").exit_code == 0
    run = config.load("run.yaml")
    assert len(run.distill.phases) == 2 and sum(phase.pairs for phase in run.distill.phases) <= 8
    assert run.distill.stored_size == 8 and run.experts.batch == 4 and rmdd_("check", "run.yaml").exit_code == 0
    assert rmdd_("init", "b.yaml", "--preset", "flickr30k_ptm_st_100").exit_code == 0
    assert config.load("b.yaml").data.root == "FOLDER"
    both = rmdd_("init", "c.yaml", "--preset", "demo", "--for", "gpu")
    unknown = rmdd_("init", "c.yaml", "--preset", "dmeo")
    absent = rmdd_("init", "c.yaml", "--data", "nothing")
    assert (
        both.exit_code == unknown.exit_code == 2 and "not both" in both.stderr and "did you mean demo" in unknown.stderr
    )
    assert absent.exit_code == 1 and "nothing does not exist" in absent.stderr and not (folder / "c.yaml").exists()


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 2_000_000), st.integers(1, 6))
def test_the_sizes_are_valid_for_any_number_of_images(images, each):
    run = FirstRun({"extends": "bases/small_cpu", "name": "a"})
    first_run.choose_sizes(run, {"train": (images, each * images)})
    rule = config.load(run.values)
    (phase,) = rule.distill.phases
    similarity = rule.distill.similarity
    paid = (rule.data.image_size, rule.model.text.width, similarity.kind, similarity.rank, rule.distill.stored_size)
    assert budget.check([phase.pairs], rule.distill.budget, *paid) is None and 2 * similarity.rank <= phase.pairs
    assert rule.distill.budget < images and 2 <= phase.pairs < images and rule.distill.batch <= phase.pairs
    assert 2 <= rule.experts.batch <= each * images / 2
    updates = rule.distill.match_epochs * (each * images // rule.experts.batch)
    assert updates >= 75 * 2 / 3 or rule.distill.match_epochs == 40


def test_large_data_is_limited_so_that_each_step_takes_minutes():
    run = FirstRun({"extends": "bases/small_cpu", "name": "a", "data": {"scenes": {"train": 3}}})
    counts = {"train": (600_000, 600_000), "val": (20_000, 20_000), "test": (20_000, 20_000)}
    first_run.choose_sizes(run, counts)
    first_run.limit_time(run, counts)
    rule = config.load(run.values)
    assert (
        rule.data.train_limit is not None and 1000 <= rule.data.train_limit < 600_000 and rule.data.eval_limit == 1000
    )
    seconds = first_run.seconds_of(run, counts)
    assert all(seconds[step] < 60 * minutes * 1.2 for step, minutes in first_run.MINUTES.items())
    assert sum(seconds.values()) < 900
