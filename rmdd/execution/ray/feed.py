"""Read the training images of an expert by Ray Data: tasks decode them in parallel and yield them in training order."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

WAITING_STEPS = 2
"""Number of training steps whose images are fetched in advance."""
BLOCK_BYTES = 2**20
"""Largest size of a Ray Data block in bytes, so small that the images of each training step get their own block."""


def ray_stream(
    look: Callable[[Any], Iterator[np.ndarray]], parts: Sequence[Any], width: int, cpus: int
) -> Iterator[np.ndarray]:
    """Yield the images of each training step, decoded by `width` Ray tasks with `cpus` CPUs each.

    `look(part)` yields the images of each step in one part of the epoch. Set `cpus` to 0 if the training workers hold
    all CPUs; otherwise the Ray tasks would wait for ever. Implements `rmdd.experts.feed.Stream`.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.use_datasource_v2 = False
    context.execution_no_progress_timeout_s = -1  # no limit: an expert may use the images slowly
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
