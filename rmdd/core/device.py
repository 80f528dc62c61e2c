"""Which device the workers of a run compute on."""

import torch

from rmdd import config


def device_of(runtime: config.Runtime) -> torch.device:
    """`cuda` where a worker has a share of a GPU, else `cpu`."""
    return torch.device("cuda" if runtime.gpus_per_worker > 0 else "cpu")


def local_device(runtime: config.Runtime) -> torch.device:
    """`device_of`, or the CPU in a process that sees no GPU, such as a driver whose workers have them."""
    return device_of(runtime) if torch.cuda.is_available() else torch.device("cpu")
