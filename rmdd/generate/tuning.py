"""Training what a generative method fine-tunes: one task with checkpoints that goes on with the same bits.

A trainer draws everything that one step needs from the number of the step. Its parameters and the state of its
optimiser lie in one file, `state.safetensors`; what comes of it in `tuned.safetensors`, written last.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rmdd.core.files import append_jsonl, cut_jsonl
from rmdd.core.tensors import Damaged, flatten_groups, load_checked, save_checked, split_groups

_logger = logging.getLogger(__name__)

TUNED = "tuned.safetensors"
STATE = "state.safetensors"
LOG = "metrics.jsonl"
SKIPS = 20
"""Steps in a row that may be left out for numbers that are not finite."""


@runtime_checkable
class Trainer(Protocol):
    """What is trained: parameters by name in a fixed order, an optimiser over just these, and how a step goes."""

    total: int
    """Steps."""
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer

    def gradient(self, step: int) -> dict[str, float]:
        """Put the gradient of step `step` into the parameters; returns its losses by name, `loss` among them."""
        ...


def tune(
    trainer: Trainer,
    folder: Path,
    key: str,
    checkpoint_every: int,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train to the end or until told to stop, from the last checkpoint in `folder`. Returns whether it finished.

    A step whose loss or gradient is not finite changes nothing, and is told. Raises `RuntimeError` after `SKIPS` of
    them in a row.
    """
    if is_tuned(folder):
        return True
    state, log = folder / STATE, folder / LOG
    done = _restore(trainer, state, key) if state.is_file() else 0
    cut_jsonl(log, "step", done)
    lines: list[dict[str, Any]] = []
    skipped = 0
    while done < trainer.total:
        began = time.perf_counter()
        trainer.optimiser.zero_grad(set_to_none=True)
        losses = trainer.gradient(done)
        skip = not (all(map(math.isfinite, losses.values())) and _finite(trainer.parameters))
        done += 1
        if skip:
            skipped += 1
            _logger.warning("step %d of %s left out: its loss or gradient is not finite (%s)", done, folder, losses)
            if skipped == SKIPS:
                raise RuntimeError(
                    f"{SKIPS} steps in a row up to {done} gave numbers that are not finite; lower the rate or the "
                    "range of time steps, or set the precision to float32, in distill.options"
                )
        else:
            skipped = 0
            trainer.optimiser.step()
        logged = {n: v if math.isfinite(v) else None for n, v in losses.items()}
        metrics = {"step": done, **logged, "skipped": skip, "seconds": round(time.perf_counter() - began, 4)}
        lines.append(metrics)
        on_step(metrics)
        stopping = should_stop()
        if stopping or done % checkpoint_every == 0 or done == trainer.total:
            for line in lines:
                append_jsonl(log, line)
            lines.clear()
            _save(trainer, done, state, key)
        if stopping and done < trainer.total:
            return False
    save_checked(folder / TUNED, {n: p.data for n, p in trainer.parameters.items()}, "tuned", {"key": key})
    return True


def is_tuned(folder: Path) -> bool:
    return (folder / TUNED).is_file()


def read_tuned(folder: Path) -> dict[str, Tensor]:
    """What training gave, by name. Raises `ValueError` when the file is damaged."""
    try:
        return load_checked(folder / TUNED, "tuned")[0]
    except Damaged as error:
        raise ValueError(f"{folder / TUNED} is damaged ({error}); delete {folder} to train it again") from error


def use_tuned(module: nn.Module, tuned: Mapping[str, Tensor]) -> None:
    """Put tuned parameters into the module they came from, whatever its precision."""
    own = dict(module.named_parameters())
    for name, value in tuned.items():
        own[name].data.copy_(value)


def _finite(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether no gradient holds anything else."""
    norms = torch._foreach_norm([p.grad for p in parameters.values() if p.grad is not None])
    return bool(torch.stack(list(norms)).isfinite().all()) if norms else True


def _save(trainer: Trainer, done: int, path: Path, key: str) -> None:
    state = {
        f"{number}.{name}": value
        for number, entries in trainer.optimiser.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }
    groups = {"parameter": {n: p.data for n, p in trainer.parameters.items()}, "optimiser": state}
    save_checked(path, flatten_groups(groups), "state", {"step": done, "key": key})


def _restore(trainer: Trainer, path: Path, key: str) -> int:
    try:
        named, facts = load_checked(path, "state")
    except Damaged as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}); delete it to begin anew") from error
    if facts["key"] != key:
        raise ValueError(f"the checkpoint {path} belongs to another configuration; delete it")
    saved = split_groups(named)
    for name, value in saved["parameter"].items():
        trainer.parameters[name].data.copy_(value)
    state = {int(number): entries for number, entries in split_groups(saved.get("optimiser", {})).items()}
    groups = trainer.optimiser.state_dict()["param_groups"]
    trainer.optimiser.load_state_dict({"state": state, "param_groups": groups})
    return int(facts["step"])
