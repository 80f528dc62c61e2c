"""Ray Data as the reader of the pictures that an expert is fed: parts of an epoch fan out, steps come back in order."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

WAITING_STEPS = 2
BLOCK_BYTES = 2**20
"""Below one step's pictures, so that every step is a block of its own."""


def ray_stream(
    look: Callable[[Any], Iterator[np.ndarray]], parts: Sequence[Any], width: int, cpus: int
) -> Iterator[np.ndarray]:
    """`rmdd.experts.feed.Stream`: `width` tasks of `cpus` CPUs each look at a part at a time.

    A task gives its steps one by one, so that what is held is its window and a few steps. Give `cpus` 0 where the
    workers themselves hold all CPUs, else the tasks would wait for ever.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.use_datasource_v2 = False
    context.execution_no_progress_timeout_s = -1  # the expert may be busy for as long as it needs
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
