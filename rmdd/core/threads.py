"""How many threads the numerical libraries use."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads inside the block; None leaves their number as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """BLAS and OpenMP compute with one thread: the last bits of a sum over threads depend on how many there are."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def thread_variables(count: int) -> dict[str, dict[str, str]]:
    """The part of a Ray `runtime_env` that starts a worker with `count` threads."""
    return {"env_vars": {"OMP_NUM_THREADS": str(count)}}
