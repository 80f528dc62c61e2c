"""The number of CPU threads that torch, BLAS and OpenMP use."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside the block; None keeps the current number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let BLAS and OpenMP use one thread inside the block: the last bits of a sum depend on the number of threads."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def thread_variables(count: int) -> dict[str, dict[str, str]]:
    """Return the part of a Ray `runtime_env` (environment variables) that makes a worker use `count` threads."""
    return {"env_vars": {"OMP_NUM_THREADS": str(count)}}
