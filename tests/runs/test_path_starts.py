"""Whole runs with chained phases: the students from which paths start, and runs killed between and within phases."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import QUIET, RUN, changed, go, go_until_killed, stored

import rmdd
from rmdd import config
from rmdd.core.seeding import derive, generator
from rmdd.core.threads import torch_threads
from rmdd.distill.chain import read_path_start
from rmdd.distill.sets import load_set
from rmdd.execution.tasks import Hooks
from rmdd.experts.store import Store
from rmdd.models.dual import build
from rmdd.models.losses import wbce
from rmdd.pipeline import open_pipeline
from rmdd.runs.path_starts import TrainPathStart
from rmdd.runs.preflight import examine
from rmdd.runs.tasks import DistillPhase
from rmdd.searches.formats import verify

PHASE = {"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 6}
CHAIN = changed(
    RUN,
    experts={"num": 2},
    distill={"budget": 13, "phases": [PHASE, PHASE, PHASE], "path_start": "student", "path_lag": 4, "inner_lr": 0.01},
)


def results(storage: Path) -> dict[str, str]:
    """Return the hash of every file with numbers of a run, by its path in the storage."""
    files = [*storage.rglob("*.safetensors"), *storage.rglob("evaluation.json")]
    return {str(f.relative_to(storage)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    storage = tmp_path_factory.mktemp("whole")
    go(config.load(stored(storage, CHAIN)))
    return storage


def test_a_path_starts_at_a_student_of_the_earlier_sets_from_theta_0_of_its_expert(whole):
    run = config.load(stored(whole, CHAIN))
    (phases,), (store,) = whole.glob("phases/*"), whole.glob("experts/*[!k]")
    for expert in range(2):
        model = build(run.model, 16, 16, run.seed_of("experts"), "expert", expert)
        model.load_trained(Store.open(store).read(expert, 0))
        seed = derive(run.seed_of("distill"), "path start", 2)
        for p, iteration in enumerate((6, 4)):  # the sets of the earlier phases when phase 2 starts its first segment
            pairs = load_set(phases / f"phase-{p}" / f"set-{iteration:06d}.safetensors")
            moved = {n: torch.zeros_like(t) for n, t in model.named_parameters()}
            for epoch in range(2):
                drop = 1.0 if epoch == 0 else 0.1
                order = torch.randperm(4, generator=generator(seed, "student batches", expert, p, epoch))
                torch.manual_seed(derive(seed, "student dropout", expert, p, epoch))
                model.zero_grad()
                wbce(
                    model(pairs.images[order], pairs.texts[order]), pairs.similarity["matrix"][order][:, order]
                ).backward()
                with torch.no_grad():  # SGD with momentum and weight decay, by hand
                    for n, t in model.named_parameters():
                        lr = pairs.lr_image if n.startswith("image") else pairs.lr_text
                        gradient = t.grad + run.evaluate.weight_decay * t
                        moved[n] = gradient if epoch == 0 else run.evaluate.momentum * moved[n] + gradient
                        t -= drop * float(lr) * moved[n]
        file = phases / "phase-2" / "path-starts" / f"expert-{expert:03d}" / "6-4.safetensors"
        for name, t in read_path_start(file).items():
            torch.testing.assert_close(t, model.trained()[name], rtol=1e-5, atol=1e-6)


def test_each_segment_has_path_starts_of_its_own_and_all_files_verify(whole, tmp_path):
    for phase, names in ((1, {"4", "6"}), (2, {"6-4", "6-6"})):
        files = whole.glob(f"phases/*/phase-{phase}/path-starts/expert-001/*.safetensors")
        assert {f.stem for f in files} == names
    assert not any(whole.glob("phases/*/phase-0/path-starts"))
    assert verify(str(whole)).faults == []
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    (file,) = damaged.glob("phases/*/phase-2/path-starts/expert-001/6-4.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    (fault,) = verify(str(damaged)).faults
    assert fault.path.endswith("expert-001/6-4.safetensors")


@pytest.mark.parametrize("task", [DistillPhase, TrainPathStart])
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_run_killed_between_tasks_resumes_with_equal_bits(whole, tmp_path, monkeypatch, task, calls):
    run = config.load(stored(tmp_path, CHAIN))
    go_until_killed(run, monkeypatch, task, calls)
    go(run)
    assert results(tmp_path) == results(whole)


def test_a_sweep_distils_every_wave(whole, tmp_path):
    assert not rmdd.sweep(stored(tmp_path, CHAIN), {"distill.path_lag": [4]}, progress=QUIET).failed
    assert results(tmp_path) == results(whole)


def test_a_stopped_task_returns_false_and_a_second_call_writes_the_same_file(whole, tmp_path):
    run = config.load(stored(shutil.copytree(whole, tmp_path / "copy"), CHAIN))
    with open_pipeline(run) as pipeline, torch_threads(run.runtime.threads):
        item, task = replace(pipeline.item(), iterations=(4,)), TrainPathStart()
        bits = task.target(item).read_bytes()
        task.target(item).unlink()
        assert task(item, Hooks(should_stop=lambda: True)) is False and not task.target(item).is_file()
        assert task(item, Hooks()) and task.target(item).read_bytes() == bits


def test_only_machines_that_distil_fetch_path_starts_from_a_uri(whole, tmp_path, monkeypatch):
    for machine in ("first", "second", "third"):
        scratch = [f"runtime.scratch={tmp_path / machine}"]
        run = config.load(stored(f"file://{tmp_path}/bucket", CHAIN), scratch)
        if machine == "first":
            go_until_killed(run, monkeypatch, DistillPhase, 4, "distill")
        else:
            go(run, "distill")
    files = [results(folder) for folder in (whole, tmp_path / "bucket")]
    one, other = ({name: bits for name, bits in found.items() if name.startswith("phases")} for found in files)
    assert one == other
    assert list((tmp_path / "second").rglob("path-starts/*/*")) and not list((tmp_path / "third").rglob("path-starts"))


def test_a_single_phase_has_the_bits_of_a_run_without_a_chain(tmp_path):
    files = []
    for start in ("theta_0", "student"):
        run = config.load(stored(tmp_path / start, changed(RUN, distill={"path_start": start})))
        go(run, "distill")
        files.append({f: bits for f, bits in results(tmp_path / start).items() if f.startswith("phases")})
    assert files[0] and files[0] == files[1]
    assert "distill.path_start: student has no effect, because the run has a single phase" in examine(run)["remarks"]


def test_chained_phases_depend_on_how_students_are_trained(tmp_path):
    def folder(raw):
        with open_pipeline(config.load(stored(tmp_path, raw))) as pipeline:
            return pipeline.item().paths.phases.name

    epochs = {"evaluate": {"epochs": 3}}
    assert folder(CHAIN) != folder(changed(CHAIN, **epochs))
    independent = changed(CHAIN, distill={"path_start": "theta_0", "path_lag": None})
    assert folder(independent) == folder(changed(independent, **epochs))
