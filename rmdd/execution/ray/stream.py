"""Implements `rmdd.execution.tasks.Stream` with Ray Data, to ingest datasets and embed captions on many workers.

Items and results are numbers and texts; large data is passed as the path of a file. If a worker dies, a new worker
starts and runs the same item again.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rmdd.execution.tasks import Stream, Values, sequential_stream

BLOCK_BYTES = 16 * 2**20
"""Largest size of a block of results in Ray Data, in bytes."""
_ERRORS = {"ValueError": ValueError, "OSError": OSError}
"""Classes of errors that are raised in this process if a worker raises them; the item is not run again."""


def over_tasks(cpus: float = 1.0, restarts: int = 3) -> Stream:
    """Return a stream that runs each item in a Ray task (`cpus` CPUs); dead tasks restart at most `restarts` times."""

    def stream(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        if not items:
            return
        options = {"max_retries": restarts}
        yield from _run(
            items,
            lambda data: data.map(lambda row: _answer(make(), row), num_cpus=cpus, ray_remote_args_fn=lambda: options),
        )

    return stream


def over_actors(actors: int, cpus: float = 1.0, gpus: float = 0.0, restarts: int = 3) -> Stream:
    """Return a stream that runs the items on at most `actors` Ray actors with `cpus` CPUs and `gpus` GPUs each.

    A single item that needs no GPU runs in this process, because starting an actor takes longer.
    """

    def stream(make: Callable[[], Callable[[Values], Values]], items: Sequence[Values]) -> Iterator[Values]:
        if not items:
            return
        if len(items) == 1 and not gpus:
            yield from sequential_stream(make, items)
            return
        from ray.data import ActorPoolStrategy

        pool = ActorPoolStrategy(size=min(actors, len(items)))
        options = {"max_restarts": restarts, "max_task_retries": restarts}
        yield from _run(
            items,
            lambda data: data.map(
                _Worker,
                fn_constructor_args=(make,),
                compute=pool,
                num_cpus=cpus,
                num_gpus=gpus,
                ray_remote_args_fn=lambda: options,
            ),
        )

    return stream


class _Worker:
    def __init__(self, make: Callable[[], Callable[[Values], Values]]):
        self.work = make()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        return _answer(self.work, row)


def _answer(work: Callable[[Values], Values], row: dict[str, str]) -> dict[str, str]:
    """Run `work` on the item in `row`; return a row that holds the result or the error message as JSON."""
    try:
        return {"value": json.dumps({"result": work(json.loads(row["value"]))})}
    except tuple(_ERRORS.values()) as error:
        kind = "OSError" if isinstance(error, OSError) else "ValueError"
        return {"value": json.dumps({"error": kind, "message": str(error)})}


def _run(items: Sequence[Values], over: Callable[[Any], Any]) -> Iterator[Values]:
    import ray.data
    from ray.exceptions import RayActorError, WorkerCrashedError
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised below instead of logged
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = False
    context.execution_no_progress_timeout_s = -1  # an item may take as long as it needs
    rows = [{"value": json.dumps(item)} for item in items]
    with warnings.catch_warnings():  # this is deprecated, but Ray 2.60 has no other way to limit restarts
        warnings.simplefilter("ignore", RayDeprecationWarning)
        answers = over(ray.data.from_items(rows, override_num_blocks=len(rows)))
    try:
        for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for text in batch["value"].to_pylist():
                answer = json.loads(text)
                if "error" in answer:
                    raise _ERRORS[answer["error"]](answer["message"])
                yield answer["result"]
    except (RayActorError, WorkerCrashedError) as error:
        raise RuntimeError(
            f"workers keep dying ({' '.join(str(error).split())[:200]}); finished work is kept; check whether memory "
            "ran out, then run the command again, or raise runtime.max_restarts"
        ) from error
