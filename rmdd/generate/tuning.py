"""The training loop for fine-tuning in generative methods; after an interruption it resumes with bit-identical results.

All random numbers of a step depend only on the seed and the step number. A checkpoint holds the parameters and the
optimiser state in one file, `state.safetensors`; the result is `tuned.safetensors`, written last.
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
"""Training stops with an error after this many consecutive steps with a non-finite loss or gradient."""


@runtime_checkable
class Trainer(Protocol):
    """A model in training: named parameters in a fixed order, the optimiser that updates them, and their gradient."""

    total: int
    """Number of steps (updates of the parameters) in the entire training."""
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer

    def gradient(self, step: int) -> dict[str, float]:
        """Add the gradient of a step to `grad` of each parameter; return the losses by name; `loss` is the total."""
        ...


def tune(
    trainer: Trainer,
    folder: Path,
    key: str,
    checkpoint_every: int,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from the checkpoint in `folder`, to the end or until `should_stop()`; return whether the end was reached.

    A step with a non-finite loss or gradient is skipped with a warning. Raises `RuntimeError` after `SKIPS` consecutive
    skips.
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
            _logger.warning("step %d of %s skipped: its loss or gradient is not finite (%s)", done, folder, losses)
            if skipped == SKIPS:
                raise RuntimeError(
                    f"{SKIPS} consecutive steps up to {done} had non-finite numbers; lower the learning rate or the "
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
    """Read the fine-tuned parameters in `folder`, by name. Raises `ValueError` if the file is damaged."""
    try:
        return load_checked(folder / TUNED, "tuned")[0]
    except Damaged as error:
        raise ValueError(f"{folder / TUNED} is damaged ({error}); delete {folder} to train it again") from error


def use_tuned(module: nn.Module, tuned: Mapping[str, Tensor]) -> None:
    """Copy fine-tuned parameters into `module`, which may have a different dtype."""
    parameters = dict(module.named_parameters())
    for name, value in tuned.items():
        parameters[name].data.copy_(value)


def _finite(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Return whether the gradients of all parameters are finite."""
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
        raise ValueError(f"the checkpoint {path} is damaged ({error}); delete it to restart the training") from error
    if facts["key"] != key:
        raise ValueError(f"the checkpoint {path} belongs to another configuration; delete it to restart the training")
    saved = split_groups(named)
    for name, value in saved["parameter"].items():
        trainer.parameters[name].data.copy_(value)
    state = {int(number): entries for number, entries in split_groups(saved.get("optimiser", {})).items()}
    groups = trainer.optimiser.state_dict()["param_groups"]
    trainer.optimiser.load_state_dict({"state": state, "param_groups": groups})
    return int(facts["step"])
