"""Ray Data as the executor of an ingest: rows fan out to workers, results come back in order, back-pressured."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from rmdd.data.ingest import Executor

BLOCK_BYTES = 16 * 2**20
_TABLES_PER_RUN = 4096


def ray_executor(cpus: int | float = 2) -> Executor:
    """An executor for `rmdd.data.ingest.ingest` on a cluster with `cpus` CPUs; Ray must be initialised.

    The driver holds few blocks of results at a time; workers wait when it is slow.
    """

    def execute(function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.use_datasource_v2 = False
        context.target_max_block_size = BLOCK_BYTES
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        tables = iter(tables)
        while run := list(itertools.islice(tables, _TABLES_PER_RUN)):
            results = ray.data.from_arrow(run).map_batches(
                function, batch_size=None, batch_format="pyarrow", num_cpus=min(1.0, cpus / 2)
            )
            yield from results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)

    return execute
