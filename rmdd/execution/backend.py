"""Who does the work of runs, and in which folders: made from `runtime`, for one run or for all of a sweep."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.core.locks import held
from rmdd.core.progress import Progress
from rmdd.core.storage import address_of, is_uri, open_storage, root_of
from rmdd.execution.tasks import (
    Climber,
    Executor,
    Inquiry,
    InTurn,
    Mapper,
    OpenRanks,
    Ranks,
    Stream,
    Values,
    in_turn,
    ranks_here,
    time_limit,
)
from rmdd.experts import feed

ENCODERS = 64
"""Encoders of captions side by side at most; `runtime.workers` and the cluster's size bound them too."""

RANKS = 64
"""Ranks that hold the rows of a coreset, or share the draws of a step, at most."""


@dataclass(frozen=True)
class Crew:
    """An executor, and who does what is no item of its own."""

    executor: Executor
    readers: Stream = in_turn
    """Do the parts of an ingest."""
    encoders: Stream = in_turn
    """Embed blocks of captions."""
    fleet: Callable[..., Mapper] | None = None
    """`fleet(store, size=n)`: one run of Ray Train over gangs of n that train the experts of a store."""
    stream: feed.Stream | None = None
    """Reads the pictures of experts that are not cached; None: who trains them."""
    climbers: Callable[[Inquiry, Callable[[Any], Climber], int | None], None] | None = None
    """Climb side by side, so many at most, in a run of Ray Tune."""
    ranks: OpenRanks = ranks_here
    """Hold the rows that a coreset is chosen from, or share the draws of a step."""


@contextlib.contextmanager
def working_in(runtime: config.Runtime, *folders: Path) -> Iterator[None]:
    """Hold `folders` of a storage that can be written; what has grown there is published at the end.

    Raises `rmdd.core.locks.Held` when another process works in one of them.
    """
    storage = open_storage(runtime)
    storage.begin()
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(held(folder, wait=False))
        stack.callback(storage.flush)
        yield


@contextlib.contextmanager
def open_crew(runtime: config.Runtime, events: Path, progress: Progress) -> Iterator[Crew]:
    """The crew that `runtime` describes; Ray is started and stopped here.

    `events` gets a line for whatever happens to a worker. Ends after `runtime.time_limit` as on Ctrl-C.
    """
    with time_limit(runtime.time_limit, progress.say):
        if runtime.ray == "off":
            yield Crew(InTurn(runtime.threads))
            return
        from rmdd.execution.ray.cluster import connected

        with connected(runtime) as resources:
            from rmdd.execution.ray.actors import SideBySide
            from rmdd.execution.ray.feed import ray_stream
            from rmdd.execution.ray.stream import over_actors, over_tasks

            cpus, gpus = (min(s, most) for s, most in zip(runtime.share, (resources.widest, math.inf), strict=True))
            with SideBySide(runtime, resources, events, progress.say) as executor:

                def alone(stream: Stream) -> Stream:
                    """Idle actors would keep the CPUs that its tasks wait for."""

                    def streamed(
                        make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]
                    ) -> Iterator[Values]:
                        executor.rest()
                        yield from stream(make, items)

                    return streamed

                def fleet(store: str, size: int) -> Mapper:
                    from rmdd.execution.ray.train import Fleet

                    executor.rest()
                    place = address_of(runtime, root_of(runtime) / "fleets")
                    return Fleet(runtime, executor.resources, events, f"experts-{store}", place, size, progress.say)

                def climbers(inquiry: Inquiry, open_climber: Callable[[Any], Climber], most: int | None) -> None:
                    from rmdd.execution.ray.tune import climb

                    executor.rest()
                    climb(inquiry, open_climber, runtime, executor.resources, most, progress.say)

                @contextlib.contextmanager
                def ranks(
                    make: Callable[[int, int], Any],
                    size: int | None = None,
                    most: int | None = None,
                    accelerated: bool = False,
                ) -> Iterator[Ranks]:
                    from rmdd.execution.ray.ranks import ranks_of_actors

                    executor.rest()
                    count = size or resources.workers(runtime, most or RANKS)
                    with ranks_of_actors(make, count, cpus, runtime.threads, gpus if accelerated else 0.0) as found:
                        yield found

                restarts, crew = runtime.max_restarts, Crew(executor, fleet=fleet, climbers=climbers)
                crew = replace(crew, readers=alone(over_tasks(min(runtime.reader_cpus, resources.widest), restarts)))
                if not is_uri(runtime.storage):  # workers that hold CPUs may hold them all
                    crew = replace(crew, stream=functools.partial(ray_stream, cpus=1 if gpus and not cpus else 0))
                if not is_uri(runtime.storage) or (resources.nodes == 1 and not resources.grows):
                    over = over_actors(resources.workers(runtime, ENCODERS), cpus, gpus, restarts)
                    crew = replace(crew, encoders=alone(over), ranks=ranks)
                yield crew
