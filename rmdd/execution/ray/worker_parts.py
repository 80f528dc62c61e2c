"""Data split into parts on Ray actors: each actor keeps one part, and a method is called on all parts at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rmdd.core.threads import thread_variables
from rmdd.execution.parts import PartLost, WorkerParts


class PartActor:
    """Ray actor that keeps one part of the data, created by `make(rank, size)`."""

    def __init__(self, make: Callable[[int, int], Any], rank: int, size: int, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.part = make(rank, size)

    def call(self, method: str, arguments: Sequence[Any]) -> Any:
        return getattr(self.part, method)(*arguments)


class ActorParts(WorkerParts):
    """`WorkerParts` whose workers are Ray actors. An error in a worker is raised here with the same class."""

    def __init__(self, actors: Sequence[Any]):
        self.actors = list(actors)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        sent = ray.put(arguments)
        try:
            return ray.get([actor.call.remote(method, sent) for actor in self.actors])
        except RayActorError as error:
            raise PartLost(f"a worker died ({' '.join(str(error).split())[:200]})") from error
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None


@contextlib.contextmanager
def parts_on_actors(
    make: Callable[[int, int], Any], size: int, cpus: float, threads: int, gpus: float = 0.0
) -> Iterator[ActorParts]:
    """Start `size` actors with `cpus` CPUs and `gpus` GPUs each, spread over the nodes; kill them after the block."""
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "scheduling_strategy": "SPREAD",
        "runtime_env": thread_variables(threads),
    }
    actor_class = ray.remote(PartActor).options(**options)
    actors = [actor_class.remote(make, rank, size, threads) for rank in range(size)]
    try:
        yield ActorParts(actors)
    finally:
        for actor in actors:
            ray.kill(actor)
