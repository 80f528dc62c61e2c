"""Who does the work of runs, and in which folders: made from `runtime`, for one run or for all of a sweep."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.experts.feed import Stream
from rmdd.jobs import Executor, InTurn, Mapper, time_limit
from rmdd.lease import held
from rmdd.progress import Progress
from rmdd.storage import address_of, is_uri, open_storage, root_of


@dataclass(frozen=True)
class Crew:
    """An executor, and who does what is no item of its own."""

    executor: Executor
    rows: Any = None
    """Reads the rows of an ingest; None: this process."""
    fleet: Callable[..., Mapper] | None = None
    """`fleet(store, size=n)`: one run of Ray Train over gangs of n that train the experts of a store."""
    stream: Stream | None = None
    """Reads the pictures of experts that are not cached; None: who trains them."""


@contextlib.contextmanager
def working_in(runtime: config.Runtime, *folders: Path) -> Iterator[None]:
    """Hold `folders` of a storage that can be written; what has grown there is published at the end.

    Raises `rmdd.lease.Held` when another process works in one of them.
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
        from rmdd.runtime.cluster import connected

        with connected(runtime) as resources:
            from rmdd.runtime.actors import SideBySide
            from rmdd.runtime.feed import ray_stream
            from rmdd.runtime.stream import ray_executor

            # workers on CPUs hold them all; other machines do not see the files of a mirror
            stream = functools.partial(ray_stream, cpus=1 if runtime.gpus_per_worker else 0)
            with SideBySide(runtime, resources, events, progress.say) as executor:

                def fleet(store: str, size: int) -> Mapper:
                    from rmdd.runtime.experts import Fleet

                    executor.rest()
                    place = address_of(runtime, root_of(runtime) / "fleets")
                    return Fleet(runtime, executor.resources, events, f"experts-{store}", place, size)

                yield Crew(executor, ray_executor(resources.cpus), fleet, None if is_uri(runtime.storage) else stream)
