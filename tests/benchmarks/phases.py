"""Time of parallel phases and of the same phases run sequentially, one thread each, measured alternately.

The benchmark prints three ratios of parallel to sequential wall time. The ratio `work` covers the time from the start
of the first phase to the end of the last. `workers` also covers the start of the workers, and `ray` covers the start of
Ray as well. Sequential runs start neither workers nor Ray.
"""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks import common

from rmdd import config
from rmdd.core.progress import Progress
from rmdd.core.seeding import generator
from rmdd.distill import similarity
from rmdd.distill.sets import save_set
from rmdd.distill.synthetic import Synthetic
from rmdd.execution.backend import open_backend
from rmdd.execution.executor import Executor
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.tasks import Hooks
from rmdd.experts.store import Writer
from rmdd.experts.train import begin_store, expert_model
from rmdd.models.text import text_width
from rmdd.runs.items import TaskItem
from rmdd.runs.paths import RunPaths
from rmdd.runs.tasks import DistillPhase

PARTS = ("work", "workers", "ray")


@dataclass(frozen=True)
class Case:
    """Size of one distillation phase; an iteration should take much longer than the overhead of workers."""

    iterations: int = 60
    pairs: int = 48
    batch: int = 16
    steps: int = 6
    image_size: int = 32
    widths: tuple[int, ...] = (32, 32, 32)


def bench_phases(case: Case, counts: Sequence[int], repeats: int) -> common.Numbers:
    """Run each number of phases in `counts` in parallel and sequentially, `repeats` times; return seconds and ratios.

    Raises `ValueError` if a number of phases or `repeats` is below 1.
    """
    if repeats < 1 or min(counts, default=0) < 1:
        raise ValueError(f"nothing to measure: phases {list(counts)}, repeats {repeats}; each must be at least 1")
    rows = []
    with TemporaryDirectory() as temporary:
        for count in counts:
            run = _run_of(case, count, Path(temporary))
            for repeat in range(repeats):
                folder = Path(temporary) / f"{count}-{repeat}"
                before = os.getloadavg()[0]
                in_turn = _measure(SequentialExecutor(1), _items(run, folder / "in-turn"))
                began = time.perf_counter()
                with open_backend(run.runtime, folder / "events.jsonl", Progress(quiet=True)) as backend:
                    started = time.perf_counter() - began
                    side = _measure(backend.executor, _items(run, folder / "side-by-side"))
                side["ray"] = side["workers"] + started
                rows.append({"phases": count, "load": before, "in_turn": in_turn, "side_by_side": side})
    return {"case": asdict(case), "cpus": os.cpu_count(), "rows": rows, "ratios": ratios(rows)}


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each number of phases the median over repeats of (parallel seconds / sequential seconds)."""
    results = []
    for count in dict.fromkeys(row["phases"] for row in rows):
        repeats = [row for row in rows if row["phases"] == count]
        parts = {p: statistics.median(r["side_by_side"][p] / r["in_turn"][p] for r in repeats) for p in PARTS}
        results.append({"phases": count, **parts})
    return results


def table(results: Mapping[str, Any]) -> str:
    lines = [f"{'phases':>6} {'load':>6}  in turn, side by side: {', '.join(PARTS)} (seconds; ratio)"]
    for row in results["rows"]:
        sequential, parallel = row["in_turn"], row["side_by_side"]
        parts = (f"{sequential[p]:.1f} {parallel[p]:.1f} ({parallel[p] / sequential[p]:.2f})" for p in PARTS)
        lines.append(f"{row['phases']:>6} {row['load']:>6.1f}  {', '.join(parts)}")
    lines += [
        f"{r['phases']} parallel phases take {r['work']:.2f} of the sequential time; with the start of workers "
        f"{r['workers']:.2f}, also with the start of Ray {r['ray']:.2f} (medians)"
        for r in results["ratios"]
    ]
    return "\n".join(lines)


def _run_of(case: Case, phases: int, storage: Path) -> config.Run:
    each = {"pairs": case.pairs, "start": 0, "stop": 1, "endpoint": 1, "iterations": case.iterations}
    image = {"name": "convnet", "weights": "random", "widths": case.widths, "projection": "linear"}
    return config.load(
        {
            "name": "bench",
            "data": {"image_size": case.image_size},
            "model": {"image": image, "text": {"name": "hashing"}},
            "experts": {"num": 1, "epochs": 1},
            "distill": {"phases": [each] * phases, "batch": case.batch, "steps": case.steps, "similarity": {"rank": 4}},
            "runtime": {"storage": str(storage), "track": "none", "num_cpus": max(phases, os.cpu_count() or 1)},
        }
    )


def _items(run: config.Run, folder: Path) -> list[TaskItem]:
    """Write the initial sets of all phases. The expert trajectory is a random walk, as costly as a real one."""
    places = RunPaths(folder, folder, folder / "store", folder / "phases", folder, folder)
    width, size = text_width(run.model.text), run.stored_size
    store, random = begin_store(run, places.store, width, {}), generator(0, "bench phases")
    writer, theta = (
        Writer(store, 0),
        expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, width).trained(),
    )
    for _ in range(2):
        writer.add(theta, {})
        theta = {n: p.detach() + 0.02 * torch.randn(p.shape, generator=random) for n, p in theta.items()}
    writer.finish()
    rate = torch.tensor(float(run.distill.inner_lr))
    for number, plan in enumerate(run.distill.phases):
        start_set = Synthetic(
            images=torch.randn(plan.pairs, 3, size, size, generator=random),
            texts=torch.randn(plan.pairs, width, generator=random) / width**0.5,
            lr_image=rate.clone(),
            lr_text=rate,
            similarity=similarity.initial(run.distill.similarity, plan.pairs, random),
            alpha=run.distill.similarity.alpha,
        )
        save_set(start_set, places.start(number))
    return [TaskItem(run, places, "bench", number) for number in range(len(run.distill.phases))]


def _measure(executor: Executor, items: Sequence[TaskItem]) -> dict[str, float]:
    began = time.perf_counter()
    names = [f"phase {item.number}" for item in items]
    spans = executor.map(timed, items, names, lambda name, metrics: None)
    took = time.perf_counter() - began
    return {"work": max(end for _, end in spans) - min(begin for begin, _ in spans), "workers": took, "ray": took}


def timed(item: TaskItem, hooks: Hooks) -> tuple[float, float]:
    """Run a distillation phase; return the wall-clock times of its start and its end."""
    began = time.time()
    assert DistillPhase()(item, hooks), "a phase of the benchmark was interrupted"
    return began, time.time()


def _measure_case(case: Case, arguments: Any) -> common.Numbers:
    return bench_phases(case, [int(p) for p in arguments.phases.split(",")], arguments.repeats)


if __name__ == "__main__":
    common.main(__doc__, Case, _measure_case, table, phases="2,3", repeats=3)
