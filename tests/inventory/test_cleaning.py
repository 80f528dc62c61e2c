"""Tests of `rmdd clean`: what kept work needs stays, in drawn storages and in a real one, and the rest is removed."""

import json
import os
import random
import shutil
import subprocess

import pytest
import tiny
import works
from typer.testing import CliRunner

from rmdd import config
from rmdd.cli import app as cli
from rmdd.comparisons.resume import comparison_in
from rmdd.core.files import machine, read_json, write_json
from rmdd.core.locks import hold_folder
from rmdd.core.storage import run_folder
from rmdd.data.shards import Dataset
from rmdd.inventory.cleaning import plan_cleaning
from rmdd.inventory.contents import open_contents
from rmdd.inventory.work import works_in
from rmdd.runs.paths import dataset_folder, paths_of
from rmdd.searches import base_run_in, run_search
from rmdd.searches.formats import verify
from rmdd.searches.sweeps import Member, members_in, run_all, write_members

KINDS = ("data", "experts", "phases", "baselines")
FOREIGN = ("notes.txt", "mine/run.txt", "experts/README.md", "phases/kept-by-hand/x.bin", "cache/own.npy", "data/x.csv")


def clean(storage, *drop, yes=True, **options):
    with open_contents(str(storage)) as contents:
        cleaning = plan_cleaning(contents, drop, **options)
    if yes:
        cleaning.remove()
    return {removal.name for removal in cleaning.removals}


def command(*words):
    return CliRunner().invoke(cli.app, ["clean", *map(str, words)])


def touch(path, text="{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def hexes(draw):
    return f"{draw.getrandbits(64):016x}"


# -- drawn storages ----------------------------------------------------------------------------------------------------


def drawn_run(storage, draw, owners):
    """Write the folder of a run with drawn settings, and stubs of what it needs; note it as their owner."""
    run = works.run_of(
        storage,
        draw.choice(["a", "b"]),
        data={"scenes": {"train": draw.choice([12, 13])}},
        experts={"seed": draw.choice([0, 1])},
        distill={"lr_image": draw.choice([1.0, 2.0, 3.0])},
        evaluate={"epochs": draw.choice([1, 2])},
    )
    folder, data = run_folder(run), dataset_folder(run)
    paths = paths_of(run, Dataset(data, {"data_hash": data.name}))
    touch(folder / "run.yaml", config.dump(run))
    write_json(data / "manifest.json", {"data_hash": data.name})
    write_json(folder / "data.json", {"data_hash": data.name, "path": str(data)})
    needs = {"experts": paths.store, "phases": paths.phases, "baselines": paths.baseline}
    if draw.random() < 0.5:
        made_from = {kind: needs[kind].name for kind in ("experts", "phases")}
        write_json(folder / "set" / "set.json", {"provenance": made_from})
    for path in needs.values():
        touch(path / "x.json")
    for path in (data, *needs.values()):
        owners.setdefault(path.relative_to(storage).as_posix(), set()).add(folder.name)
    return run


def drawn_storage(storage, draw):
    """Write a storage of runs, sweeps, searches and comparisons; return who needs what, in it and among the runs."""
    owners, needed_by = {}, {}
    write_json(storage / "storage.json", {"layout": 2})
    runs = list({run.folder_name: run for run in (drawn_run(storage, draw, owners) for _ in range(6))}.values())
    for name in FOREIGN:
        touch(storage / name)
    for kind in KINDS:
        touch(storage / kind / hexes(draw) / ("manifest.json" if kind == "data" else "x.json"))
    if draw.random() < 0.5:
        chosen = draw.sample(runs, 2)
        sweep = write_members([Member({"n": n}, run) for n, run in enumerate(chosen)]).relative_to(storage).as_posix()
        for run in chosen:
            needed_by.setdefault(run.folder_name, set()).add(sweep)
    if draw.random() < 0.5:
        chosen = draw.choice(runs)
        folder = storage / "comparisons" / f"c-{hexes(draw)[:8]}"
        facts = {"verb": "compare", "words": [f"one={run_folder(chosen)}"], "run": chosen.model_dump(mode="json")}
        write_json(folder / "comparison.json", facts)
        shutil.copy(run_folder(chosen) / "data.json", storage)
        (folder / "protocol").mkdir()
        shutil.move(storage / "data.json", folder / "protocol" / "data.json")
        needed_by.setdefault(chosen.folder_name, set()).add(folder.relative_to(storage).as_posix())
    return owners, needed_by, runs


@pytest.mark.parametrize("seed", range(12))
def test_only_what_no_kept_work_needs_is_removed_from_a_drawn_storage(seed, tmp_path):
    draw, storage = random.Random(seed), tmp_path / "runs"
    owners, needed_by, runs = drawn_storage(storage, draw)
    work = [run.folder_name for run in runs] + sorted(set().union(*needed_by.values()))
    dropped = set(draw.sample(work, draw.randint(0, len(work))))
    before = {p.relative_to(storage).as_posix() for p in storage.rglob("*")}
    clashes = [run for run in dropped if needed_by.get(run, set()) - dropped]
    if clashes:
        with pytest.raises(ValueError, match=f"needs ({'|'.join(clashes)}); drop it too with --run"):
            clean(storage, *dropped)
        dropped = {name for name in dropped if name not in clashes}
    clean(storage, *dropped)
    after = {p.relative_to(storage).as_posix() for p in storage.rglob("*")}
    assert after <= before
    wanted = {name for name, users in owners.items() if users - dropped} | (set(work) - dropped)
    kept = {name for name in before if any(name == w or name.startswith(f"{w}/") for w in {*wanted, *FOREIGN})}
    assert kept <= after
    shared = {name for name in after if name.count("/") == 1 and name.split("/")[0] in KINDS}
    assert shared - {"experts/README.md", "phases/kept-by-hand", "data/x.csv"} == wanted & set(owners)
    assert not dropped & after


# -- a real storage ----------------------------------------------------------------------------------------------------


def contents_of(storage):
    """Return the time and size of every file except those that each start of a command writes again."""
    passing = ("run.yaml", "seconds.json", "events.jsonl", "data.json", ".lock", "search.json", "sweep.json")
    files = (p for p in storage.rglob("*") if p.is_file() and not p.name.endswith(passing))
    return {p.relative_to(storage).as_posix(): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def results_in(storage):
    """Return the files of trained experts, distilled sets and students, of datasets and the cache, with their times."""
    endings = (".safetensors", ".parquet", ".npy", "expert.json", "store.json", "subset.json", "picks.json")
    results = {name: stamp for name, stamp in contents_of(storage).items() if name.endswith(endings)}
    records = {name: stamp for name, stamp in contents_of(storage).items() if "/students/" in name}
    return {n: s for n, s in (results | records).items() if "/set/" not in n}


def resume_all(storage):
    """Resume every sweep, search and comparison in a storage."""
    for file in storage.glob("sweeps/*/sweep.json"):
        run_all(members_in(file.parent), tiny.QUIET)
    for file in storage.glob("searches/*/search.json"):
        run_search(base_run_in(file.parent), tiny.QUIET)
    for file in storage.glob("comparisons/*/comparison.json"):
        comparison_in(file.parent).execute(tiny.QUIET)


def orphans(storage, draw):
    """Copy results to names that nothing refers to, and add what killed processes leave."""
    for kind in ("experts", "phases", "baselines", "data"):
        source = draw.choice(sorted(p for p in (storage / kind).iterdir() if not p.name.startswith(".")))
        copy = shutil.copytree(source, storage / kind / hexes(draw))
    manifest = read_json(copy / "manifest.json")
    write_json(copy / "manifest.json", manifest | {"data_hash": "other"})  # else a coreset may be from this dataset
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in ("cache/.x.npy", "experts/.y"):
        touch(storage / f"{name}.{machine()}-{ended.pid}-0123ab.tmp")
    shutil.copy(next((storage / "cache").glob("train-*.npy")), storage / "cache" / f"val-{hexes(draw)}.npy")
    touch(storage / "begun-01234567.lock", "")


def test_after_cleaning_everything_is_intact_and_nothing_is_computed_again(storage):
    draw, before = random.Random(0), contents_of(storage)
    orphans(storage, draw)
    removed = clean(storage)
    starts = {name for name in before if "/path-starts/" in name}
    baselines = {f"{name}/" for name in removed if name.startswith("baselines/")}  # an orphan, and that of the training
    assert starts and len(baselines) == 2
    gone = starts | {name for name in before if any(map(name.startswith, baselines))}
    assert {n: s for n, s in before.items() if n not in gone} == contents_of(storage)
    folders = {"experts", "phases", "baselines", "data", "comparisons", "cache", "begun-01234567.lock"}
    assert {name.split("/")[0] for name in removed} == folders
    assert verify(str(storage)).faults == []
    before = results_in(storage)
    resume_all(storage)
    tiny.go(works.run_of(storage, "chained", distill=works.CHAINED), "distill")
    assert results_in(storage) == before
    begun = works.run_of(storage, "begun", distill={"lr_image": 2.0})
    (log,) = tiny.go(begun, "distill")[0].glob("metrics.jsonl")
    assert [line["iteration"] for line in map(json.loads, log.read_text().splitlines())] == [1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_dropped_work_takes_with_it_only_what_others_do_not_need(seed, storage):
    draw = random.Random(seed)
    with open_contents(str(storage)) as contents:
        needs = {work.folder: work.needs() for work in works_in(contents)}
    (search,) = storage.glob("searches/searched-*")
    trials = {name for name in needs if name.startswith("searched-")} - {base_run_in(search).folder_name}
    work = sorted(needs.keys() - trials)
    dropped = set(draw.sample(work, draw.randint(1, len(work))))
    for name in work:  # what a kept sweep, search or comparison needs cannot be dropped
        if name not in dropped:
            dropped -= {other for other in dropped if any(f"{n}/".startswith(f"{other}/") for n in needs[name])}
    orphans(storage, draw)
    gone = dropped | (trials if any(name.startswith("searches/") for name in dropped) else set())
    wanted = set().union(*(needs[name] for name in needs if name not in gone)) | (needs.keys() - gone)
    before = contents_of(storage)
    clean(storage, *dropped)
    after = contents_of(storage)
    starts = {name for name in before if "/path-starts/" in name}
    kept = {n: s for n, s in before.items() if n not in starts and any(f"{n}/".startswith(f"{w}/") for w in wanted)}
    assert kept.items() <= after.items() and after.items() <= before.items()
    assert not any((storage / name).exists() for name in gone)
    left = {f"{kind}/{p.name}" for kind in KINDS if (storage / kind).is_dir() for p in (storage / kind).iterdir()}
    assert {name for name in left if not name.endswith("/.locks") and not name.startswith("baselines/")} <= wanted
    assert verify(str(storage)).faults == []
    before = results_in(storage)
    resume_all(storage)
    assert {n: s for n, s in results_in(storage).items() if not n.startswith("cache/")} == {
        n: s for n, s in before.items() if not n.startswith("cache/")
    }


def test_a_dry_run_changes_nothing_and_says_what_yes_would_remove(storage):
    orphans(storage, random.Random(1))
    before = contents_of(storage)
    done = command(storage)
    assert done.exit_code == 0 and "nothing was removed yet: give --yes" in done.stdout
    assert contents_of(storage) == before
    facts = json.loads(command(storage, "--yes", "--json").stdout)
    assert facts["removed"] is True and facts["bytes"] == sum(r["bytes"] for r in facts["removals"]) > 0
    assert all(f"would remove {r['name']} (" in done.stdout for r in facts["removals"] if r["bytes"])
    assert not any((storage / removal["name"]).exists() for removal in facts["removals"])


def test_options_keep_experts_and_what_changed_lately(storage):
    folder = next((storage / "experts").glob("[0-9a-f]*"))
    shutil.copytree(folder, storage / "experts" / ("0" * 16))
    shutil.copytree(folder, storage / "phases" / ("0" * 16))
    for file in (storage / "phases" / ("0" * 16)).rglob("*"):
        os.utime(file, (0, 0))
    zeros = {name for name in clean(storage, yes=False) if name.endswith("/" + "0" * 16)}
    assert zeros == {f"experts/{'0' * 16}", f"phases/{'0' * 16}"}
    done = command(storage, "--older-than", "30d", "--keep-experts")
    assert f"phases/{'0' * 16}" in done.stdout and "experts" not in done.stdout and "path-starts" not in done.stdout
    assert command(storage, "--older-than", "soon").exit_code == 2


def test_nothing_is_removed_while_a_process_works_in_the_storage(storage):
    orphans(storage, random.Random(2))
    before = contents_of(storage)
    (folder,) = storage.glob("trained-*")
    with hold_folder(folder, wait=False):
        done = command(storage, "--yes")
    assert done.exit_code == 1 and f"nothing was removed: a process works in {folder.name}" in done.stderr
    assert contents_of(storage) == before


def test_everything_is_put_back_if_something_cannot_be_moved(storage, monkeypatch):
    orphans(storage, random.Random(3))
    before, real = contents_of(storage), os.replace

    def replace(source, target):
        if str(target).endswith(".old") and "phases" in str(source):
            raise PermissionError(13, "no", str(source))
        real(source, target)

    monkeypatch.setattr("rmdd.inventory.cleaning.os.replace", replace)
    with pytest.raises(PermissionError):
        clean(storage)
    assert contents_of(storage) == before


def test_everything_is_put_back_if_a_run_starts_meanwhile(storage):
    orphans(storage, random.Random(3))
    with open_contents(str(storage)) as contents:
        cleaning = plan_cleaning(contents)
    tiny.go(works.run_of(storage, "new", data={"scenes": {"train": 11}}), "ingest")
    before = contents_of(storage)
    with pytest.raises(RuntimeError, match="another process began to work in the storage"):
        cleaning.remove()
    assert contents_of(storage) == before


def test_work_of_another_version_is_kept_with_everything_that_it_may_need(storage):
    orphans(storage, random.Random(4))
    (folder,) = storage.glob("begun-*/")
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text() + "gone: 1\n")
    assert not [name for name in clean(storage, yes=False) if not name.endswith((".tmp", ".lock", "-train"))]
    words = command(storage).stdout
    assert f"cannot tell what {folder.name} need" in words and "gone: unknown key" in words
    assert {name.split("/")[0] for name in clean(storage, folder.name)} >= {"experts", "phases", "data", folder.name}


@pytest.mark.parametrize(
    "file", ["sweeps/*/sweep.json", "searches/*/search.json", "comparisons/swept-[0-9a-f]*/comparison.json"]
)
def test_no_run_is_dropped_that_work_of_another_version_may_need(file, storage):
    (file,) = storage.glob(file)
    file.write_text("{}")
    run, owner = works.run_of(storage, "trained", experts={"seed": 1}).folder_name, file.parent.relative_to(storage)
    with pytest.raises(ValueError, match=f"cannot tell whether {owner} needs {run}; drop it too with --run {owner}"):
        clean(storage, run)
    assert {run, str(owner)} <= clean(storage, run, str(owner), yes=False)


def test_work_that_changed_lately_is_not_dropped(storage):
    run = works.run_of(storage, "trained", experts={"seed": 1}).folder_name
    store = {name for name in clean(storage, run, yes=False) if name.startswith("experts/")}
    assert store and clean(storage, "trained-*", older_than=30 * 86400.0) == set()
    for file in storage.glob(f"{run}/**/*"):
        os.utime(file, (0, 0))
    assert clean(storage, "trained-*", older_than=30 * 86400.0) == {run}


def test_the_base_run_of_a_dropped_search_stays(storage):
    (search,) = (p.relative_to(storage).as_posix() for p in storage.glob("searches/searched-*"))
    base = base_run_in(storage / search).folder_name
    touch(storage / base / "run.yaml", config.dump(base_run_in(storage / search)))
    removed = clean(storage, search)
    assert search in removed and base not in removed and any(name.startswith("searched-") for name in removed)


def test_the_dataset_of_a_run_stays_after_the_storage_was_moved(storage, tmp_path, monkeypatch):
    data = next(storage.glob("data/*/manifest.json")).parent
    monkeypatch.chdir(tmp_path)
    for name, root in {"absolute": data, "relative": data.relative_to(tmp_path)}.items():
        tiny.go(works.run_of(storage, name, data={"source": "dataset", "root": str(root)}), "ingest")
    monkeypatch.chdir("/")
    with open_contents(str(storage.rename(tmp_path / "moved"))) as contents:
        needs = {work.folder.rpartition("-")[0]: work.needs() for work in works_in(contents)}
    assert f"data/{data.name}" in needs["absolute"] & needs["relative"]


# -- links -------------------------------------------------------------------------------------------------------------


def test_nothing_is_removed_through_a_link(storage, tmp_path):
    other = tmp_path / "other"
    write_json(other / "storage.json", {"layout": 2})
    (other / "experts").symlink_to(storage / "experts")
    (other / "baselines").mkdir()
    folder = next((storage / "baselines").glob("[0-9a-f]*"))
    (other / "baselines" / folder.name).symlink_to(folder)
    (other / "linked").symlink_to(next(storage.glob("trained-*")))
    before = contents_of(storage)
    assert clean(other) == set() and contents_of(storage) == before
    with pytest.raises(ValueError, match="linked is a link"):
        clean(other, "linked")


def test_a_link_inside_the_storage_is_no_work(storage):
    (folder,) = storage.glob("trained-*")
    (storage / "latest").symlink_to(folder.name)
    (storage / "again.yaml").symlink_to(f"{folder.name}/run.yaml")
    with open_contents(str(storage)) as contents:
        assert "latest" not in {work.folder for work in works_in(contents)}
    orphans(storage, random.Random(5))
    assert clean(storage) and (storage / "latest").is_symlink()


def test_a_run_whose_phases_have_other_names_in_this_version_keeps_everything(storage):
    run = works.run_of(storage, "begun", distill={"lr_image": 2.0})
    data = read_json(run_folder(run) / "data.json")
    phases = paths_of(run, Dataset(storage / "data" / "x", {"data_hash": data["data_hash"]})).phases
    phases.rename(phases.with_name("0" * 16))  # as if the hash covered more
    assert f"phases/{'0' * 16}" not in clean(storage)
    assert "that this version of rmdd does not find" in command(storage).stdout


def test_a_set_that_a_comparison_reads_is_not_dropped(storage):
    raw = read_json(next(storage.glob("comparisons/*/comparison.json")))
    name = next(word for word in raw["words"] if "=" in word).rpartition("/")[2]
    done = command(storage, "--run", name, "--yes")
    assert done.exit_code == 1 and f"needs {name}; drop it too" in done.stderr and (storage / name).is_dir()
    assert "did you mean" in command(storage, "--run", f"{name}0").stderr


def test_work_is_named_by_its_folder_or_its_path(storage, monkeypatch):
    run = works.run_of(storage, "trained", experts={"seed": 1}).folder_name
    monkeypatch.chdir(storage.parent)
    by_name = clean(storage, run, yes=False)
    assert run in by_name
    for path in (storage / run, f"{storage.name}/{run}", f"{storage.name}/trained-*", f"{storage.name}/{run}/"):
        assert clean(storage, str(path), yes=False) == by_name
    with pytest.raises(ValueError, match="no run, sweep, search, comparison, coreset, model, training has this folder"):
        clean(storage, "absent")


def test_the_folder_of_a_training_stays_until_its_model_is_finished(storage):
    (training,) = storage.glob("comparisons/*-train")
    name = training.relative_to(storage).as_posix()
    assert name in clean(storage, yes=False)
    assert name not in clean(storage, yes=False, older_than=86400.0)
    shutil.rmtree(storage / "models" / training.name.removesuffix("-train"))
    assert name not in clean(storage, yes=False)


def test_a_storage_at_a_uri_is_refused(storage):
    assert command(f"file://{storage}").exit_code == 2
