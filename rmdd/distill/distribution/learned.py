"""What an objective learns beside the set, a module and its optimiser, as tensors of a checkpoint."""

import torch
from torch import Tensor, nn


def tensors_of(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters as `model/NAME` and what the optimiser keeps of each as `optimiser/KEY/NAME`."""
    found: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            found[f"model/{name}"] = p.detach().clone()
            kept = {k: v for k, v in optimiser.state.get(p, {}).items() if isinstance(v, Tensor)}
            found |= {f"optimiser/{k}/{name}": v.detach().clone() for k, v in kept.items()}
    return found


def load_tensors(module: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `tensors_of`; what the optimiser kept of before is forgotten."""
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
