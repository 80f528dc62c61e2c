"""The torch device on which the workers of a run compute."""

import torch

from rmdd import config


def device_of(runtime: config.Runtime) -> torch.device:
    """Return `cuda` if each worker gets a GPU or a share of one, otherwise `cpu`."""
    return torch.device("cuda" if runtime.gpus_per_worker > 0 else "cpu")


def local_device(runtime: config.Runtime) -> torch.device:
    """Return the device of the workers. If this process sees no GPU (its node may have none), return `cpu`."""
    return device_of(runtime) if torch.cuda.is_available() else torch.device("cpu")
