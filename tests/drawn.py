"""Tiny runs of generative methods; functions that start such a run in a separate process and kill the process."""

import time
from pathlib import Path

import yaml
from processes import Rmdd
from tiny import changed, stored

from rmdd import config

TINY = changed(
    seed=5,
    data={"scenes": {"val": 6, "test": 6}},
    model={"image": {"widths": [8], "groups": 4}, "text": {"projection": "block"}},
    experts={"epochs": 1},
    evaluate={"students": 1, "epochs": 1, "batch": 4, "reference": "auto", "baseline_draws": 1},
)


def raw_run(storage, method, pairs, options, **distill):
    """Return the run file of a tiny run without Ray."""
    plan = {"method": method, "budget": pairs, "phases": [{"pairs": pairs, "iterations": 1}], "inner_lr": 0.1}
    return stored(storage, TINY, distill={**plan, **distill, "options": options})


def run_of(*args, **distill):
    return config.load(raw_run(*args, **distill))


def phase_of(storage, number=0):
    """Return the folder of phase `number` of the only run in a storage folder."""
    (result,) = Path(storage).glob(f"phases/*/phase-{number}")
    return result


def results(storage):
    """Return the contents of the result files, without timings; the storage folder must hold only one run."""
    storage = Path(storage)
    wanted = [
        p
        for pattern in ("tuned/*/tuned.safetensors", "phases/*/*/*.safetensors", "phases/*/*/pairs/*", "tiny-*/*.json")
        for p in storage.glob(pattern)
        if p.name not in ("seconds.json", "cost.json", "data.json")
    ]
    return {str(p.relative_to(storage)): p.read_bytes() for p in wanted}


def begin(folder, raw):
    """Start a run in a separate process that tests can kill."""
    file = Path(folder) / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    return Rmdd("run", file, "--quiet")


def kill_when(process, storage, pattern, seconds=500):
    """Kill the process (SIGKILL) once a file in the storage matches `pattern`."""
    deadline = time.monotonic() + seconds
    while not list(Path(storage).glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(0.005)
    process.kill()
