"""Distil the phase of the toy problem in a separate process that can kill itself."""

import os
import signal
from pathlib import Path

import toy

from rmdd.core.locks import hold_folder
from rmdd.core.storage import Mirror
from rmdd.experts.store import Store

ITERATIONS = 9


def go(uri: str, root: Path, kill: int = 0) -> None:
    """Distil phase 0 with the expert store at `uri`; the process kills itself after `kill` iterations (0: never)."""
    mirror, logged = Mirror(uri, root), []

    def on_step(metrics: dict) -> None:
        logged.append(metrics)
        if len(logged) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = root / "phases" / "phase-0"
    mirror.fetch(root / "store")
    with hold_folder(folder, wait=True):
        mirror.fetch(folder)
        print("goes on with", (folder / "state.safetensors").is_file(), flush=True)
        toy.distil(toy.run_of(iterations=ITERATIONS), Store.open(root / "store"), folder, on_step=on_step)
        mirror.flush()
