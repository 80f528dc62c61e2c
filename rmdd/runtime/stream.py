"""Ray Data as the stream of an ingest and of an embedding: small items fan out, their results come as they are done.

What is large goes by path from storage to storage; blocks hold numbers and texts. Workers that die are replaced and
their item is done again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rmdd.jobs import Stream, Values

BLOCK_BYTES = 16 * 2**20


def over_tasks(cpus: float = 1.0, restarts: int = 3) -> Stream:
    """A stream over tasks that hold `cpus` CPUs each; an item whose worker dies is tried `restarts` times more."""

    def stream(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        yield from _run(items, lambda d: d.map(lambda item: make()(item), num_cpus=cpus, max_retries=restarts))

    return stream


def over_actors(actors: int, cpus: float = 1.0, gpus: float = 0.0, restarts: int = 3) -> Stream:
    """A stream over at most `actors` actors, each with `cpus` CPUs and a share of a GPU; each calls `make` once."""

    def stream(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        from ray.data import ActorPoolStrategy

        pool = ActorPoolStrategy(size=min(actors, len(items)))
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": restarts, "max_task_retries": restarts}
        yield from _run(items, lambda d: d.map(_Worker, fn_constructor_args=(make,), compute=pool, **options))

    return stream


class _Worker:
    def __init__(self, make: Callable[[], Callable[[Values], Values]]):
        self.work = make()

    def __call__(self, item: Values) -> Values:
        return self.work(item)


def _run(items: Sequence[Values], over: Callable[[Any], Any]) -> Iterator[Values]:
    import ray.data
    from ray.exceptions import RayTaskError, WorkerCrashedError

    if not items:
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised here, with their cause
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = False
    blocks = ray.data.from_items(list(items), override_num_blocks=len(items))
    try:
        for batch in over(blocks).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()
    except RayTaskError as error:
        raise _own(error) from None
    except WorkerCrashedError as error:
        raise RuntimeError(
            f"workers keep dying ({error}); what was finished is kept; look for lack of memory, then start again"
        ) from error


def _own(error: BaseException) -> BaseException:
    """The worker's own error, without what Ray wraps around it."""
    while inner := getattr(error, "cause", None) or error.__cause__:
        error = inner
    return error
