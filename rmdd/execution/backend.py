"""The backend that executes a run or a sweep: this process or a Ray cluster, as set in the section `runtime`."""

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
"""Largest number of workers that embed captions in parallel."""

MOST_PARTS = 64
"""Largest number of workers among which data is divided, one part for each (see `rmdd.execution.parts`)."""

PictureReader = Callable[..., Iterable[Any]]
"""The type of a function that reads training images; see `rmdd.experts.feed.Stream`."""


@dataclass(frozen=True)
class Backend:
    """The executor of a run's tasks, and functions for the run's other work. By default, all run in this process."""

    executor: Executor
    readers: Stream = sequential_stream
    """Stream (see `rmdd.execution.tasks`) that runs the ingest; each of its workers reads some of the raw dataset."""
    encoders: Stream = sequential_stream
    """Stream (see `rmdd.execution.tasks`) that embeds captions; each of its workers embeds some blocks of captions."""
    expert_pool: Callable[..., Mapper] | None = None
    """`expert_pool(store, size)` returns a `Mapper` that trains experts by Ray Train, each expert on `size` workers."""
    pictures: PictureReader | None = None
    """Function that reads uncached training images. If None, the process that trains an expert reads them itself."""
    run_trials: RunTrials = sequential_trials
    """Function that runs the trials of a search."""
    open_parts: OpenParts = local_parts
    """Function that divides data, such as training pairs or the draws of an iteration, among workers that it starts."""


@contextlib.contextmanager
def hold_folders(runtime: config.Runtime, *folders: Path) -> Iterator[None]:
    """Check that the storage is writable, lock `folders` during the block, and upload log files when the block ends.

    Raises `rmdd.core.locks.FolderInUse` if a different process works in one of the folders, and `ValueError` if a
    different version of rmdd wrote the storage with a different layout of folders.
    """
    storage = open_storage(runtime)
    require_layout(storage)  # this check must precede `begin`, which removes temporary files
    storage.begin()
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(hold_folder(folder, wait=False))
        stack.callback(storage.flush)
        yield


@contextlib.contextmanager
def open_backend(runtime: config.Runtime, events: Path, progress: Progress) -> Iterator[Backend]:
    """Open the backend that `runtime` describes. A Ray backend starts Ray, and stops Ray when the block ends.

    Appends a line to the file `events` for each start, death and end of a worker. After `runtime.time_limit` minutes,
    raises `KeyboardInterrupt` in the block.
    """
    with time_limit(runtime.time_limit, progress.say):
        if runtime.ray == "off":
            yield Backend(SequentialExecutor(runtime.threads))
            return
        from rmdd.execution.ray.cluster import connected

        with connected(runtime, progress.say) as resources:
            from rmdd.execution.ray.actors import ActorExecutor
            from rmdd.execution.ray.feed import ray_stream
            from rmdd.execution.ray.stream import over_actors, over_tasks

            cpus, gpus = (min(s, most) for s, most in zip(runtime.share, (resources.widest, math.inf), strict=True))
            with ActorExecutor(runtime, resources, events, progress.say) as executor:

                def after_rest(stream: Stream) -> Stream:
                    """Return a stream that stops the executor's idle actors, to free CPUs, and then runs `stream`."""

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
                if not is_uri(runtime.storage):  # image readers reserve 0 CPUs if training workers may hold all CPUs
                    pictures = functools.partial(ray_stream, cpus=1 if gpus and not cpus else 0)
                    backend = replace(backend, pictures=pictures)
                if not is_uri(runtime.storage) or (resources.nodes == 1 and not resources.grows):
                    over = over_actors(resources.workers(runtime, MOST_ENCODERS), cpus, gpus, restarts)
                    backend = replace(backend, encoders=after_rest(over), open_parts=open_parts)
                yield backend
