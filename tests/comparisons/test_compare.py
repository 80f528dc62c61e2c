"""Tests that `rmdd compare` gives the same scores as runs, can be resumed, and rejects entries that do not fit."""

import csv
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from processes import Rmdd, done
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rmdd
from rmdd import config
from rmdd.artefact.distilled import DistilledSet
from rmdd.cli import app as cli
from rmdd.comparisons import engine
from rmdd.comparisons.compare import prepare_comparison
from rmdd.comparisons.entries import open_entries
from rmdd.comparisons.published import for_dataset
from rmdd.comparisons.resume import comparison_in
from rmdd.core.progress import Progress
from rmdd.core.seeding import generator
from rmdd.coresets.subset import Coreset
from rmdd.data.shards import Dataset
from rmdd.data.splits import load_split
from rmdd.evaluate import bootstrap
from rmdd.evaluate.retrieval import Ranks
from rmdd.runs.students import TrainStudent
from rmdd.searches.formats import verify

QUIET = Progress(quiet=True)
RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "R@mean")
OTHER = {"name": "two", "distill": {"seed": 9, "loss": "infonce", "temperature": 0.3}}


def folders(storage):
    return tuple(next(storage.glob(f"{name}-*/")) for name in ("one", "two"))


def table_of(run):
    return json.loads((run / "evaluation.json").read_text())["table"]


def records(storage):
    result = storage.glob("comparisons/students/*/*.json")
    return {p: p.stat().st_mtime_ns for p in result if not p.name.endswith(".test.json")}


def full_record(record):
    """Return the record of a student at path `record` with its test scores, which can be in a separate file."""
    test_scores = record.with_suffix(".test.json")
    return json.loads(record.read_text()) | (json.loads(test_scores.read_text()) if test_scores.is_file() else {})


def protocol(storage):
    return config.load(folders(storage)[0] / "run.yaml", [f"runtime.storage={storage}"])


def train_split(storage):
    (manifest,) = storage.glob("data/*/manifest.json")
    return load_split(Dataset.open(manifest.parent), "train", protocol(storage).data, storage / "cache")


def subset_of(storage, rows, **facts):
    split, pairs = train_split(storage), []
    first = {image: int((split.image_of == image).argmax()) for image in range(len(split))}
    for row in rows:
        image = int(split.image_of[row])
        pairs.append((split.pair_ids[image], row - first[image]))
    return Coreset("herding", {}, 0, "record", split.dataset.hash, {}, tuple(pairs), facts)


@pytest.fixture(scope="module")
def compared(two_runs, tmp_path_factory):
    one, two = folders(shutil.copytree(two_runs, tmp_path_factory.mktemp("compared") / "runs"))
    return rmdd.compare([one, two / "set", "random", "random:4", "full"], progress=QUIET)


def test_the_scores_equal_those_of_the_runs(two_runs, compared):
    one, two = map(table_of, folders(two_runs))
    rows = {row["name"]: row for row in compared.rows}
    expected = {folders(two_runs)[0].name: one["ptm_st"], "random": one["random"], "full": one["full"]}
    for name, scores in expected.items():
        for split in ("val", "test_last"):
            assert rows[name][split] == scores[split], name
    other = rows[folders(two_runs)[1].name]
    assert other["test_last"] == two["ptm_st"]["test_last"], "each set keeps the loss of its run"
    assert rows["random:4"]["costs"]["pairs"] == 4 and rows["random"]["costs"]["pairs"] == 9
    assert not compared.failed and compared.published == []


def test_all_table_formats_show_the_same_scores(compared):
    folder = compared.folder
    assert {p.name for p in folder.iterdir()} >= {"table.md", "table.csv", "table.html", "results.json"}
    assert json.loads((folder / "results.json").read_text())["rows"] == compared.rows
    with open(folder / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    text, page = (folder / "table.md").read_text(), (folder / "table.html").read_text()
    assert "http" not in page.replace("<!doctype", "") and "<script" not in page
    for line, row in zip(lines, compared.rows, strict=True):
        assert line["name"] == row["name"] and line["published"] == "False"
        for metric in RECALLS:
            assert float(line[f"test_last_{metric}_mean"]) == row["test_last"][metric]["mean"]
        cells = next(c for c in text.splitlines() if c.startswith(f"| {row['name']} |"))
        for shown in (f"{row['test_last'][m]['mean']:.1f}" for m in RECALLS):
            assert shown in cells and shown in page
    assert all("±" in line for line in text.splitlines() if line.startswith("| random"))


def test_differences_are_paired_and_ratios_are_of_means(compared):
    rows = {row["kind"]: row for row in compared.rows}
    random, full, own = (compared.rows[2]["students"], rows["full"], compared.rows[0])
    gains = [a - b for a, b in zip(own["students"], random, strict=True)]
    assert own["difference"]["mean"] == pytest.approx(sum(gains) / 3) and own["difference"]["n"] == 3
    assert own["difference"]["to"] == "random" and "difference" not in compared.rows[2]
    assert full["difference"] is None, "experts cannot be paired with students"
    bound = full["test_last"]["R@mean"]["mean"]
    assert own["of_full"] == pytest.approx(100 * own["test_last"]["R@mean"]["mean"] / bound)
    assert own["costs"]["parameters"] == DistilledSet.load(Path(own["from"]) / "set").budget()["total"]["parameters"]
    assert own["costs"]["seconds"] > 0 and full["costs"]["bytes"] > 0


def test_published_numbers_have_a_separate_table(storage):
    one, _ = folders(storage)
    result = rmdd.compare([one], None, ["data.layout=flickr30k", "distill.budget=100"], progress=QUIET)
    assert result.published == for_dataset("flickr30k", 100) and len(result.rows) == 1
    ours, theirs = (result.folder / "table.md").read_text().split("## published, not measured here")
    assert "LoRS" not in ours and "picked on test" in theirs and "arXiv:2603.25388" in theirs
    assert "<section class=apart>" in (result.folder / "table.html").read_text()
    with open(result.folder / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["published"] for line in lines] == ["False"] + ["True"] * len(result.published)
    assert all(line["source"] and not line["test_last_R@mean_mean"] for line in lines[1:])


def test_an_added_row_trains_only_its_own_students(storage):
    one, two = folders(storage)
    rmdd.compare([one, "random"], progress=QUIET)
    before = records(storage)
    assert len(before) == 3, "only the set needs new students; those of random pairs were trained by the run"
    result = rmdd.compare([one, two, "random"], progress=QUIET)
    after = records(storage)
    assert len(after) == 6 and {p: after[p] for p in before} == before
    assert comparison_in(result.folder).execute(QUIET).rows == result.rows and records(storage) == after
    assert not verify(str(result.folder)).faults
    result = rmdd.compare([one, two, "random"], overrides=["evaluate.epochs=1"], progress=QUIET)
    assert len(records(storage)) == 12, "a changed protocol (evaluate.epochs) must train new students"


def test_a_coreset_and_a_run_end_to_end(storage):
    one, _ = folders(storage)
    run = protocol(storage)
    chosen = rmdd.coreset(run, method="herding", pairs=6, progress=QUIET)
    (folder,) = (f.parent for f in storage.glob("coresets/*/subset.json"))
    result = CliRunner().invoke(cli.app, ["compare", str(one), f"core={folder}", "random", "full", "--json", "--quiet"])
    assert result.exit_code == 0, result.stderr
    own, core, random, full = json.loads(result.stdout)["rows"]
    assert (core["name"], core["method"], core["rates"]) == ("core", "herding", "tuned")
    assert core["costs"]["bytes"] == chosen.facts["bytes"]["total"]
    assert core["costs"]["parameters"] == chosen.facts["parameters"] and core["costs"]["pairs"] == 6
    split, draws = train_split(storage), []
    for draw in range(3):
        order = torch.randperm(len(split.captions), generator=generator(run.seed_of("evaluate"), "random pairs", draw))
        rows = order[:9].tolist()
        images = sum(len(split.encoded(i)) for i in {int(split.image_of[r]) for r in rows})
        draws.append(images + sum(len(split.captions[r].encode()) for r in rows))
    assert random["costs"]["bytes"] == round(sum(draws) / 3)
    all_bytes = sum(len(split.encoded(i)) for i in range(12)) + sum(len(c.encode()) for c in split.captions)
    assert full["costs"]["bytes"] == all_bytes and full["costs"]["pairs"] == 12
    assert len(core["students"]) == 3 and core["difference"]["to"] == "random" and not own["remarks"]


def test_a_set_with_fewer_phases_has_a_remark_on_its_updates(storage):
    one, _ = folders(storage)
    distilled = DistilledSet.load(one / "set")
    replace(distilled, subsets=distilled.subsets[:1]).save(storage.parent / "half")
    rows = rmdd.compare([storage.parent / "half"], protocol(storage), progress=QUIET).rows
    assert rows[0]["remarks"] == ["its students train for 3 updates, students of real pairs for 6"]


@pytest.mark.parametrize("between", ["zeros", "masked"])
def test_a_set_is_learned_in_its_own_order(storage, between):
    """The rows have the scores of the runs that made the sets, whichever of the two run files gives the protocol."""
    one, _ = folders(storage)
    changes = [f"runtime.storage={storage}", "name=union", "evaluate.order=union", f"evaluate.between={between}"]
    run = config.load(one / "run.yaml", changes)
    union = rmdd.run(run, progress=QUIET).set.parent
    distilled = DistilledSet.load(union / "set")
    assert (distilled.order, distilled.between, distilled.stages) == ("union", between, ((0, 1),))
    assert "Students of the set train on all subsets at once" in (union / "report.html").read_text()
    for protocol_run in (protocol(storage), run):
        rows = rmdd.compare([one, union], protocol_run, progress=QUIET).rows
        for row, folder in zip(rows, (one, union), strict=True):
            for split in ("val", "test_last"):
                assert row[split] == table_of(folder)["ptm_st"][split]
        assert rows[1]["remarks"][0].startswith("its students train on all subsets at once")
    assert rows[0]["test_last"] != rows[1]["test_last"]
    transferred = rmdd.transfer(union, ["test_resnet"], protocol(storage), progress=QUIET)
    assert transferred.rows[0]["test_last"] == rows[1]["test_last"]


def test_subsets_are_checked_against_the_split_before_training(storage, monkeypatch):
    one, _ = folders(storage)
    foreign = replace(subset_of(storage, [0, 1]), records=(("nowhere", 0),))
    foreign.save(storage.parent / "foreign")
    replace(foreign, records=()).save(storage.parent / "none")
    monkeypatch.setattr(engine.ComparedRun, "embed", lambda self: pytest.fail("captions were embedded"))
    words = ["compare", str(one), "full", str(storage.parent / "foreign"), str(storage.parent / "none"), "--quiet"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2, result.output
    assert "foreign: 1 of 1 pairs are not in split 'train'" in result.stderr and "none holds no pairs" in result.stderr


def test_markup_in_names_is_escaped(storage):
    one, _ = folders(storage)
    odd = shutil.copytree(one / "set", storage.parent / "a[red]|<b>&=1")
    words = ["compare", str(odd), "--config", str(one / "run.yaml"), "--set", f"runtime.storage={storage}", "--quiet"]
    result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.stderr
    assert "a[red]|<b>&=1" in result.stdout
    folder = Path(result.stdout.split("comparison: ")[-1].split(" (table.md")[0])
    page = (folder / "table.html").read_text()
    assert "a[red]|&lt;b&gt;&amp;=1" in page and "<b>" not in page
    assert r"| a[red]\|<b>&=1 |" in (folder / "table.md").read_text()


def test_a_subset_chooses_its_rates_on_val_like_random_pairs(storage):
    run = protocol(storage)
    total = len(train_split(storage).captions)
    draw = torch.randperm(total, generator=generator(run.seed_of("evaluate"), "random pairs", 0))[:9].tolist()
    subset_of(storage, draw, seconds=2.5).save(storage.parent / "chosen")
    result = rmdd.compare([storage.parent / "chosen", "random"], run, progress=QUIET)
    ours, random = result.rows
    assert ours["chosen"]["lr"] in run.evaluate.baseline_lrs and len(ours["chosen"]["val"]) == 2
    assert (ours["method"], ours["rates"], ours["name"]) == ("herding", "tuned", "chosen")
    assert {"pairs": 9, "seconds": 2.5}.items() <= ours["costs"].items()
    assert ours["chosen"] == random["chosen"], "the subset is draw 0 of random pairs, so both must choose the same"
    assert ours["students"][0] == random["students"][0], "equal training pairs must give equal students"
    assert len(records(storage)) == 2 + 3
    tuned = [json.loads(p.read_text()) for p in records(storage) if p.name.startswith("tune")]
    assert tuned and all("test" not in str(record) for record in tuned)


def test_bare_tensors_without_rates_choose_them_on_val(storage):
    one, _ = folders(storage)
    distilled = DistilledSet.load(one / "set")
    tensors = {f"{k}.{n}": t for k, s in enumerate(distilled.subsets) for n, t in s.tensors().items()}
    save_file(tensors, storage.parent / "bare.safetensors")
    save_file({n: t for n, t in tensors.items() if ".lr_" not in n}, storage.parent / "rateless.safetensors")
    save_file({"images": tensors["0.images"], "texts": tensors["0.texts"]}, storage.parent / "plain.safetensors")
    words = [one, *(storage.parent / f"{n}.safetensors" for n in ("bare", "rateless", "plain"))]
    own, bare, rateless, plain = rmdd.compare(words, progress=QUIET).rows
    assert bare["test_last"] == own["test_last"] and bare["val"] == own["val"]
    assert "rmdd cannot check that they fit" in bare["remarks"][0]
    assert rateless["rates"] == plain["rates"] == "tuned" and rateless["chosen"]["lr"] in (0.03, 0.3)
    assert plain["costs"]["pairs"] == 4 and rateless["costs"]["pairs"] == 7
    save_file({"images": tensors["0.images"]}, storage.parent / "half.safetensors")
    with pytest.raises(config.ConfigError, match="needs images and texts"):
        rmdd.compare([one, storage.parent / "half.safetensors"], progress=QUIET)


def test_lock_files_matched_by_a_shell_pattern_are_ignored(storage):
    one, _ = folders(storage)
    lock = one.with_name(f"{one.name}.lock")
    lock.touch()
    assert [entry.name for entry in open_entries([str(one), str(lock)])] == [one.name]


def test_entries_that_do_not_fit_are_refused_by_name_before_training(storage, bert):
    one, two = folders(storage)
    text = json.dumps({"name": str(bert), "projection": "linear", "max_tokens": 40})
    words = [str(one), f"second={two}", "random", "--json", "--quiet"]
    sets = [f"model.text={text}", "data.image_size=32", "model.image.name=test_resnet", "model.image.weights=random"]
    result = CliRunner().invoke(cli.app, ["compare", *words, *(w for s in sets for w in ("--set", s))])
    assert result.exit_code == 2 and not (storage / "comparisons").exists()
    for name in (one.name, "second"):
        for words_shown in ("images of 16 pixels, but students use 32", "image tower convnet", "text encoder hashing"):
            assert f"{name} was made for" in result.stderr and words_shown in result.stderr
    assert "--reencode" in result.stderr and "rmdd transfer" in result.stderr
    for words, words_shown in (
        ([str(one), str(two / "set"), str(storage / "nothing")], "tensors.safetensors in this folder"),
        ([str(one), str(one / "set")], "have the same content; remove one of them"),
        ([f"x={one}", f"x={two}"], "two rows have the name x"),
        ([str(one), "--against", "full"], "--against full: unknown row"),
        (["random", "full"], "give --config CONFIG"),
        ([str(one), "--set", "evaluate.epochs=0"], "evaluate.epochs"),
    ):
        result = CliRunner().invoke(cli.app, ["compare", *words, "--quiet"])
        assert result.exit_code == 2 and words_shown in result.stderr, words_shown
    assert not (storage / "comparisons").exists()


def test_a_set_or_subset_of_other_data_is_refused(storage, tmp_path):
    one, _ = folders(storage)
    subset_of(storage, [0, 1, 2]).save(tmp_path / "chosen")
    words = [str(one), str(tmp_path / "chosen"), "random", "--quiet", "--set", "data.scenes.seed=5"]
    result = CliRunner().invoke(cli.app, ["compare", *words])
    assert result.exit_code == 2
    assert f"{one.name} was made from different data" in result.stderr and "chosen was made from diff" in result.stderr


def test_reencode_embeds_captions_with_another_encoder(storage, bert):
    one, _ = folders(storage)
    text = json.dumps({"name": str(bert), "projection": "linear", "max_tokens": 40})
    result = rmdd.compare([one], None, [f"model.text={text}"], reencode=True, progress=QUIET)
    captions = [c for s in DistilledSet.load(one / "set").subsets for c in s.captions]
    twice = len(captions) - len(set(captions))
    assert (
        result.rows[0]["costs"]["duplicates"] == twice
        and f"{twice} of 7 pairs have the same caption" in result.rows[0]["remarks"][0]
    )


def test_images_are_normalised_with_the_constants_of_the_protocol(storage):
    one, _ = folders(storage)
    (row,) = rmdd.compare([one], None, ["data.normalise=half"], progress=QUIET).rows
    assert "normalised again" in row["remarks"][0]
    (file,) = (storage / "comparisons" / "pairs").glob("*.safetensors")
    distilled, ours = DistilledSet.load(one / "set"), load_file(file)["0.images"]
    mean, std = (torch.tensor(c)[:, None, None] for c in (distilled.mean, distilled.std))
    torch.testing.assert_close(ours * 0.5 + 0.5, distilled.subsets[0].images * std + mean)


def test_a_diverged_student_scores_0_and_an_error_stops_no_other_row(storage, tmp_path, monkeypatch):
    one, two = folders(storage)
    distilled = DistilledSet.load(one / "set")
    wild = replace(distilled, subsets=tuple(replace(s, lr_image=-1.0) for s in distilled.subsets))
    wild.save(tmp_path / "wild")
    compared = rmdd.compare([f"wild={tmp_path / 'wild'}", one], protocol(storage), progress=QUIET)
    assert compared.rows[0]["students"] == [0.0] * 3 and "3 of 3 students diverged" in compared.rows[0]["remarks"][0]

    work = TrainStudent.__call__

    def fails(self, item, hooks):
        if item.run.student_temperature == 0.3:
            raise OSError("no such disk")
        return work(self, item, hooks)

    monkeypatch.setattr(TrainStudent, "__call__", fails)
    result = CliRunner().invoke(cli.app, ["compare", str(one), f"second={two}", "--json", "--quiet"])
    assert result.exit_code == 1 and "1 of 2 rows failed" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert rows[1]["error"] == "OSError: no such disk" and "test_last" in rows[0] and rows[0]["of_full"] is None


def test_probes_of_the_run_file_are_ignored(storage):
    one, _ = folders(storage)
    raw = protocol(storage).model_dump(mode="json")
    raw["evaluate"]["probes"] = {"elsewhere": {"kind": "retrieval", "data": raw["data"]}}
    compared = rmdd.compare([one, "random"], raw, progress=QUIET)
    assert [row.get("error") for row in compared.rows] == [None, None]
    assert compared.rows[0]["students"] == rmdd.compare([one, "random"], progress=QUIET).rows[0]["students"]


def test_intervals_come_from_the_rank_files_of_the_students(storage):
    one, two = folders(storage)
    compared = rmdd.compare([one, two], progress=QUIET)
    files = {full_record(r)["test_last"]["R@mean"]: r.with_suffix(".ranks.safetensors") for r in records(storage)}
    first, second = ([Ranks.load(files[score]) for score in row["students"]] for row in compared.rows)
    ours, other = compared.rows
    assert ours["interval"] == asdict(bootstrap.interval(first))
    assert other["interval"] == asdict(bootstrap.interval(second))
    assert other["difference"]["interval"] == asdict(bootstrap.difference(second, first))
    assert (
        f"{ours['interval']['low']:.1f} to {ours['interval']['high']:.1f}" in (compared.folder / "table.md").read_text()
    )


def test_a_killed_comparison_can_be_resumed(storage):
    one, two = folders(storage)
    process = Rmdd("compare", one, two, "random", "full", "--quiet", "--set", "evaluate.students=6")
    while not (before := records(storage)):
        assert process.poll() is None, "the comparison ended before the test could kill it"
        time.sleep(0.02)
    process.kill()
    (folder,) = [p.parent for p in storage.glob("comparisons/*/comparison.json")]
    assert not (folder / "results.json").exists() and len(before) < 12
    resumed = json.loads(done("resume", folder, "--json"))
    again = records(storage)
    assert len(again) == 12 and {p: again[p] for p in before} == before
    unbroken = rmdd.compare([one, two, "random", "full"], None, ["evaluate.students=6"], progress=QUIET)
    assert resumed["rows"] == unbroken.rows and records(storage) == again


def test_a_comparison_can_be_resumed_in_a_moved_storage(storage, tmp_path):
    one, two = folders(storage)
    result = rmdd.compare([one, two], progress=QUIET)
    moved = storage.rename(tmp_path / "elsewhere")
    folder = moved / result.folder.relative_to(storage)
    again = comparison_in(folder).execute(QUIET)
    assert again.folder == folder and [r["students"] for r in again.rows] == [r["students"] for r in result.rows]


def test_a_comparison_with_a_relative_storage_can_be_reopened(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config.load(folders(storage)[0] / "run.yaml", [f"runtime.storage={storage.name}"])
    folder = prepare_comparison([str(path) for path in folders(storage)], run, []).write_description()
    assert comparison_in(folder).folder == folder


@pytest.mark.ray
def test_ray_changes_no_number(ray_local, storage, compared):
    one, two = folders(storage)
    with_ray = ["runtime.ray=on", "runtime.workers=2"]
    result = rmdd.compare([one, two, "random", "random:4", "full"], None, with_ray, progress=QUIET)
    assert [r["students"] for r in result.rows] == [r["students"] for r in compared.rows]
    finished = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "finished" for line in finished) >= 6


def test_sets_are_read_from_a_uri_and_tables_written_to_it(two_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scratch"))
    shutil.copytree(two_runs, tmp_path / "bucket")
    one, _ = folders(two_runs)
    address = f"file://{tmp_path}/bucket/{one.name}"
    result = CliRunner().invoke(cli.app, ["compare", address, "random", "--json", "--quiet"])
    assert result.exit_code == 0, result.stderr
    result = json.loads(result.stdout)
    assert result["comparison"].startswith(f"file://{tmp_path}/bucket/comparisons/one-")
    assert result["rows"][0]["test_last"]["R@mean"] == table_of(one)["ptm_st"]["test_last"]["R@mean"]
    assert list((tmp_path / "bucket" / "comparisons").glob("one-*/table.md"))
    assert not verify(result["comparison"]).faults


def test_a_run_cannot_give_the_protocol_before_its_phases_are_planned(tmp_path, two_runs):
    run = {"extends": "emoji_ptm_st_auto_100", "data": {"root": str(tmp_path)}}
    run["runtime"] = {"storage": str(tmp_path), "ray": "off"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(config.ConfigError, match="the run has no planned phases yet"):
        prepare_comparison(["random"], tmp_path / "run.yaml", [])
