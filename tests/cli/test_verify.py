"""Test `rmdd verify`: it reports nothing for intact files, and names the file that is damaged."""

import json
import os
import shutil

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rmdd import config
from rmdd.cli import app as cli
from rmdd.core.files import write_json
from rmdd.core.layout import FILE, LAYOUT
from rmdd.data.ingest import ingest
from rmdd.experts.store import Store, Writer
from rmdd.searches.formats import verify


def flip(path, back=7):
    data = bytearray(path.read_bytes())
    data[-back] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def intact(tmp_path_factory, store):
    """Fixture: a storage with a dataset, an expert store and a finished phase; tests damage copies (fixture `root`)."""
    root = tmp_path_factory.mktemp("storage")
    scenes = config.Scenes(train=6, val=2, test=2, size=16)
    ingest(config.Data(scenes=scenes, image_size=16), root / "data" / "d")
    shutil.copytree(store.path, root / "experts" / "e")
    toy.distil(toy.run_of(iterations=4), store, root / "phases" / "p" / "phase-0")
    write_json(root / FILE, {"layout": LAYOUT})
    return root


@pytest.fixture
def root(intact, tmp_path):
    shutil.copytree(intact, tmp_path / "storage")
    return tmp_path / "storage"


def faults(folder):
    return [(os.path.basename(f.path), f.wrong) for f in verify(str(folder)).faults]


@pytest.mark.parametrize("part", ["", "data/d", "experts/e", "phases/p", "phases/p/phase-0"])
def test_intact_folders_have_no_faults(root, part):
    findings = verify(str(root / part))
    assert findings.faults == [] and findings.unfinished == []
    assert len(findings.checked) == (3 if part == "" else 1)


def test_a_fault_at_a_uri_is_reported_with_its_uri(root):
    flip(root / "experts" / "e" / "expert-000" / "epoch-0002.safetensors")
    (fault,) = verify(f"file://{root}/experts/e").faults
    assert fault.path == f"file://{root}/experts/e/expert-000/epoch-0002.safetensors"


def _truncate(root):
    shard = next((root / "data" / "d").glob("*.parquet"))
    os.truncate(shard, 100)
    return shard.name, "bytes, the manifest says"


def _flipped_shard(root):
    shard = next((root / "data" / "d").glob("*.parquet"))
    flip(shard, back=300)
    return shard.name, "a SHA-256 that differs from the manifest"


def _flipped_epoch(root):
    flip(root / "experts" / "e" / "expert-001" / "epoch-0001.safetensors")
    return "epoch-0001.safetensors", "another SHA-256 than expert.json says"


def _infinite(root):
    folder = root / "experts" / "e" / "expert-000"
    tensors = load_file(folder / "epoch-0001.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "epoch-0001.safetensors")
    record = json.loads((folder / "expert.json").read_text())
    del record["files"]  # without hashes, as in older stores, `verify` checks the values
    (folder / "expert.json").write_text(json.dumps(record))
    return "epoch-0001.safetensors", f"not finite (first: {name})"


def _missing_epoch(root):
    (root / "experts" / "e" / "expert-001" / "epoch-0003.safetensors").unlink()
    return "epoch-0003.safetensors", "is missing"


def _missing_expert(root):
    shutil.rmtree(root / "experts" / "e" / "expert-000")
    return "expert-000", "missing or not finished"


def _flipped_state(root):
    flip(root / "phases" / "p" / "phase-0" / "state.safetensors")
    return "state.safetensors", "does not match its SHA-256"


def _broken_log(root):
    log = root / "phases" / "p" / "phase-0" / "metrics.jsonl"
    log.write_text("{half\n" + log.read_text())
    return "metrics.jsonl", "line 1 is not JSON"


def _flipped_log(root):
    log = root / "phases" / "p" / "phase-0" / "metrics.jsonl"
    log.write_bytes(b"\xff" + log.read_bytes()[1:])
    return "metrics.jsonl", "line 1 is not JSON"


def _flipped_start(root):
    """Damage the file with the starting values of frozen parameters, which all experts of a store share."""
    folder = root / "experts" / "e"
    shutil.rmtree(folder)
    theta = {"a": torch.zeros(3), "b": torch.ones(2)}
    shapes = {name: tuple(t.shape) for name, t in theta.items()}
    store = Store.create(folder, shapes, shared={"a": theta["a"]}, epochs=0, keep=None, dtype="float32", facts={})
    writer = Writer(store, 0)
    writer.add(theta, {})
    writer.finish()
    assert verify(str(folder)).faults == []
    flip(folder / "theta-0.safetensors", back=3)
    return "theta-0.safetensors", "another SHA-256 than store.json says"


def _schema(root):
    path = root / "experts" / "e" / "store.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    return "store.json", "schema version 9"


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flipped_shard,
        _flipped_epoch,
        _infinite,
        _missing_epoch,
        _missing_expert,
        _flipped_state,
        _broken_log,
        _flipped_log,
        _flipped_start,
        _schema,
    ],
)
def test_the_damaged_file_is_named(root, damage):
    name, words = damage(root)
    ((file, wrong),) = faults(root)
    assert file == name and words in wrong


def test_a_log_may_hold_any_text_and_end_in_the_middle_of_a_line(root):
    with open(root / "phases" / "p" / "phase-0" / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"text": "one\u2028line"}\n{"half')
    assert faults(root) == []


def test_the_command_prints_the_damaged_file_and_exits_with_1(root):
    run = lambda *words: CliRunner().invoke(cli.app, ["verify", str(root), *words])  # noqa: E731
    assert run().exit_code == 0 and "3 checked, 0 broken" in run().stdout
    name, _ = _flipped_epoch(root)
    done = run()
    assert done.exit_code == 1 and f"{name}: has another SHA-256" in done.stdout and "train that expert" in done.stdout
    facts = json.loads(run("--json").stdout)
    assert [f["path"].endswith(name) for f in facts["faults"]] == [True]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="was not written by rmdd"):
        verify(str(tmp_path))
    with pytest.raises(ValueError, match=r"/absent does not exist; give a folder that rmdd wrote"):
        verify(str(tmp_path / "absent"))
