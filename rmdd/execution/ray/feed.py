"""Read the training images of an expert by Ray Data: tasks decode parts of an epoch, steps come back in order."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

WAITING_STEPS = 2
"""Number of steps that are fetched in advance."""
BLOCK_BYTES = 2**20
"""Largest size of a block; it is smaller than the images of a step, so that every step is a separate block."""


def ray_stream(
    look: Callable[[Any], Iterator[np.ndarray]], parts: Sequence[Any], width: int, cpus: int
) -> Iterator[np.ndarray]:
    """Yield the images of each step, decoded by `width` tasks with `cpus` CPUs each (a `rmdd.experts.feed.Stream`).

    A task returns its steps one by one, so memory holds only its window and a few steps. Set `cpus` to 0 if the workers
    hold all CPUs; otherwise the tasks would wait for ever.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.use_datasource_v2 = False
    context.execution_no_progress_timeout_s = -1  # an expert may be busy for any length of time
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    parts = [ray.put(part) for part in parts]
    numbers = ray.data.from_arrow([pa.table({"part": [number]}) for number in range(len(parts))])
    steps = numbers.map_batches(
        functools.partial(_look, look, parts),
        batch_size=None,
        num_cpus=cpus,
        compute=ray.data.TaskPoolStrategy(size=width),
    )
    for batch in steps.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=WAITING_STEPS):
        yield from batch["pictures"]


def _look(look: Callable[[Any], Iterator[np.ndarray]], parts: Sequence[Any], numbers: dict[str, np.ndarray]) -> Any:
    for number in numbers["part"]:
        for pictures in look(ray.get(parts[number])):
            yield {"pictures": pictures[None]}
