"""The tiny run that many tests use: drawn scenes, a network with one block, and a few iterations."""

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rmdd import config
from rmdd.core.progress import Progress
from rmdd.pipeline import open_pipeline

QUIET = Progress(quiet=True)
RUN: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "scenes", "image_size": 16, "scenes": {"train": 12, "val": 5, "test": 5, "size": 16}},
    "model": {
        "image": {"name": "convnet", "weights": "random", "widths": [4], "groups": 2, "projection": "linear"},
        "text": {"name": "hashing", "width": 16, "projection": "linear"},
        "width": 8,
    },
    "experts": {"num": 1, "epochs": 2, "batch": 16, "augment": {"crop": False, "flip": 0, "randaugment_ops": 0}},
    "distill": {
        "budget": 9,
        "phases": [{"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 3}],
        "batch": 3,
        "steps": 2,
        "lr_image": 1.0,
        "lr_text": 1.0,
        "lr_similarity": 0.1,
        "lr_lr": 1e-5,
    },
    "evaluate": {
        "epochs": 2,
        "students": 2,
        "reference": False,
        "baseline_lrs": [0.1],
        "baseline_losses": ["infonce"],
        "baseline_draws": 2,
    },
}


def changed(raw: Mapping[str, Any] = RUN, **changes: Any) -> dict[str, Any]:
    """Return a copy of the run file in which `changes` are merged into the sections, recursively."""
    copied = copy.deepcopy(dict(raw))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(copied.get(key), Mapping)
        copied[key] = changed(copied[key], **value) if nested else copy.deepcopy(value)
    return copied


def stored(storage: Path | str, raw: Mapping[str, Any] = RUN, **sections: Any) -> dict[str, Any]:
    """Return a copy of the run file `raw` that stores in `storage`, without Ray; `sections` replace whole sections."""
    runtime = {"storage": str(storage), "ray": "off", "track": "none"}
    return copy.deepcopy({**raw, "runtime": runtime, **sections})


def go(run: config.Run, step: str = "all") -> Any:
    """Execute a run, or only its pipeline step `step`."""
    with open_pipeline(run, QUIET) as pipeline:
        return getattr(pipeline, step)()


def go_until_killed(run: config.Run, monkeypatch: pytest.MonkeyPatch, task: type, call: int, step: str = "all") -> None:
    """Execute a run until the class `task` is called for the `call`-th time; this call ends the run as Ctrl-C does."""
    original, count = task.__call__, itertools.count(1)

    def dying(self: Any, item: Any, hooks: Any) -> Any:
        if next(count) == call:
            raise KeyboardInterrupt
        return original(self, item, hooks)

    with monkeypatch.context() as patched:
        patched.setattr(task, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            go(run, step)
