"""Convert a trained module and its optimiser state to named tensors for a checkpoint, and back."""

import torch
from torch import Tensor, nn


def tensors_of(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return trainable parameters under `model/NAME` and their optimiser state under `optimiser/KEY/NAME`."""
    tensors: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            tensors[f"model/{name}"] = p.detach().clone()
            state = {k: v for k, v in optimiser.state.get(p, {}).items() if isinstance(v, Tensor)}
            tensors |= {f"optimiser/{k}/{name}": v.detach().clone() for k, v in state.items()}
    return tensors


def load_tensors(module: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the module and its optimiser from the result of `tensors_of`; the previous optimiser state is dropped."""
    optimiser.state.clear()
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[f"model/{name}"])
    for entry, value in tensors.items():
        kind, _, rest = entry.partition("/")
        if kind == "optimiser":
            key, _, name = rest.partition("/")
            p = named[name]
            optimiser.state[p][key] = value.clone() if key == "step" else value.to(p.device).clone()
