"""Who does the work of runs: this process, or a Ray cluster; made from `runtime`, for one run or for all of a sweep."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.core.layout import require_layout
from rmdd.core.locks import hold_folder
from rmdd.core.progress import Progress
from rmdd.core.storage import address_of, is_uri, open_storage, root_of
from rmdd.execution.executor import Executor, Mapper
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.interrupts import time_limit
from rmdd.execution.parts import OpenParts, WorkerParts, local_parts
from rmdd.execution.tasks import Stream, Values, sequential_stream
from rmdd.execution.trials import RunTrials, TrialRunner, TrialSource, sequential_trials

MOST_ENCODERS = 64
"""Most workers that embed captions side by side; `runtime.workers` and the cluster's size bound them too."""

MOST_PARTS = 64
"""Most workers that hold parts of a coreset, or share the draws of a step."""

PictureReader = Callable[..., Iterable[Any]]
"""See `rmdd.experts.feed.Stream`."""


@dataclass(frozen=True)
class Backend:
    """The executor of a run's tasks, and who does its other work. By default all of it is done in this process."""

    executor: Executor
    readers: Stream = sequential_stream
    """Do the parts of an ingest."""
    encoders: Stream = sequential_stream
    """Embed blocks of captions."""
    expert_pool: Callable[..., Mapper] | None = None
    """`expert_pool(store, size=n)`: a run of Ray Train whose workers train experts of a store, n to an expert."""
    pictures: PictureReader | None = None
    """Reads the pictures of experts that are not cached; None: the process that trains reads them."""
    run_trials: RunTrials = sequential_trials
    """Makes the trials of a search."""
    open_parts: OpenParts = local_parts
    """Workers that hold the rows that a coreset is chosen from, or share the draws of a step."""


@contextlib.contextmanager
def hold_folders(runtime: config.Runtime, *folders: Path) -> Iterator[None]:
    """Hold `folders` of a storage that can be written; new files in them are published at the end.

    Raises `rmdd.core.locks.FolderInUse` if another process works in one of them, and `ValueError` if the storage has
    another layout.
    """
    storage = open_storage(runtime)
    require_layout(storage)  # first: nothing of an old storage is swept
    storage.begin()
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(hold_folder(folder, wait=False))
        stack.callback(storage.flush)
        yield


@contextlib.contextmanager
def open_backend(runtime: config.Runtime, events: Path, progress: Progress) -> Iterator[Backend]:
    """The backend that `runtime` describes; Ray is started and stopped here.

    `events` gets a line for each start, death and end of a worker. Ends after `runtime.time_limit` as on Ctrl-C.
    """
    with time_limit(runtime.time_limit, progress.say):
        if runtime.ray == "off":
            yield Backend(SequentialExecutor(runtime.threads))
            return
        from rmdd.execution.ray.cluster import connected

        with connected(runtime) as resources:
            from rmdd.execution.ray.actors import ActorExecutor
            from rmdd.execution.ray.feed import ray_stream
            from rmdd.execution.ray.stream import over_actors, over_tasks

            cpus, gpus = (min(s, most) for s, most in zip(runtime.share, (resources.widest, math.inf), strict=True))
            with ActorExecutor(runtime, resources, events, progress.say) as executor:

                def after_rest(stream: Stream) -> Stream:
                    """Idle actors would keep the CPUs that the stream's tasks wait for."""

                    def streamed(
                        make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]
                    ) -> Iterator[Values]:
                        executor.rest()
                        yield from stream(make, items)

                    return streamed

                def expert_pool(store: str, size: int) -> Mapper:
                    from rmdd.execution.ray.train import ExpertPool

                    executor.rest()
                    folder = address_of(runtime, root_of(runtime) / "fleets")
                    return ExpertPool(
                        runtime, executor.resources, events, f"experts-{store}", folder, size, progress.say
                    )

                def run_trials(
                    source: TrialSource, open_runner: Callable[[Any], TrialRunner], most: int | None
                ) -> None:
                    from rmdd.execution.ray import tune

                    executor.rest()
                    tune.run_trials(source, open_runner, runtime, executor.resources, most, progress.say)

                @contextlib.contextmanager
                def open_parts(
                    make: Callable[[int, int], Any],
                    size: int | None = None,
                    most: int | None = None,
                    accelerated: bool = False,
                ) -> Iterator[WorkerParts]:
                    from rmdd.execution.ray.worker_parts import parts_on_actors

                    executor.rest()
                    count = size or resources.workers(runtime, most or MOST_PARTS)
                    with parts_on_actors(make, count, cpus, runtime.threads, gpus if accelerated else 0.0) as parts:
                        yield parts

                restarts = runtime.max_restarts
                readers = after_rest(over_tasks(min(runtime.reader_cpus, resources.widest), restarts))
                backend = Backend(executor, readers, expert_pool=expert_pool, run_trials=run_trials)
                if not is_uri(runtime.storage):  # workers that hold CPUs may hold them all
                    pictures = functools.partial(ray_stream, cpus=1 if gpus and not cpus else 0)
                    backend = replace(backend, pictures=pictures)
                if not is_uri(runtime.storage) or (resources.nodes == 1 and not resources.grows):
                    over = over_actors(resources.workers(runtime, MOST_ENCODERS), cpus, gpus, restarts)
                    backend = replace(backend, encoders=after_rest(over), open_parts=open_parts)
                yield backend
