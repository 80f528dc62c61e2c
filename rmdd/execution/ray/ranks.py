"""Ranks as actors: each makes its part of something, keeps it in memory, and answers what is asked of all."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rmdd.execution.tasks import Lost, Ranks


class Holder:
    """One rank."""

    def __init__(self, make: Callable[[int, int], Any], rank: int, size: int, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.part = make(rank, size)

    def ask(self, what: str, given: Sequence[Any]) -> Any:
        return getattr(self.part, what)(*given)


class Actors(Ranks):
    """See `rmdd.execution.tasks.Ranks`. An error of a part is raised as it is."""

    def __init__(self, actors: Sequence[Any]):
        self.actors = list(actors)

    def ask(self, what: str, *given: Any) -> list[Any]:
        told = ray.put(given)
        try:
            return ray.get([actor.ask.remote(what, told) for actor in self.actors])
        except RayActorError as error:
            raise Lost(f"a rank died ({' '.join(str(error).split())[:200]})") from error
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None


@contextlib.contextmanager
def ranks_of_actors(
    make: Callable[[int, int], Any], size: int, cpus: float, threads: int, gpus: float = 0.0
) -> Iterator[Actors]:
    """So many actors of `cpus` CPUs and `gpus` GPUs each, spread over the nodes; they end with the block."""
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    }
    holder = ray.remote(Holder).options(**options)
    actors = [holder.remote(make, rank, size, threads) for rank in range(size)]
    try:
        yield Actors(actors)
    finally:
        for actor in actors:
            ray.kill(actor)
