"""Cost of training many experts: sequentially, with a pool of actors, with one Ray Train run, or with one per expert.

Each of these four ways trains the same tiny experts in a separate process and storage. Seconds are those of the
pipeline step that trains experts; the start of Ray is listed separately. Memory is the peak of the proportional set
size (each shared page counts once), summed over the process and its descendants and sampled twice per second (Linux
only). CPU seconds cover the entire process; compare them if the machine is busy.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import common

from rmdd import config
from rmdd.core.progress import Progress
from rmdd.pipeline import open_pipeline

WAYS = ("in_turn", "pool", "train", "trainer_each")


@dataclass(frozen=True)
class Case:
    """Number and size of the experts. `trainer_each` trains only some (field `each`); its cost is extrapolated."""

    experts: int = 8
    workers: int = 2
    epochs: int = 10
    pairs: int = 200
    image_size: int = 32
    each: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.each <= self.experts:
            raise ValueError(f"each is {self.each} of {self.experts} experts; give a number from 1 to {self.experts}")


def run_of(case: Case, way: str, storage: Path) -> config.Run:
    """Return the config of a run that trains experts on synthetic scenes in the way `way` (one of `WAYS`)."""
    return config.load(
        {
            "name": "bench",
            "data": {
                "source": "scenes",
                "image_size": case.image_size,
                "scenes": {"train": case.pairs, "val": 20, "test": 20, "size": case.image_size},
            },
            "model": {
                "image": {"name": "convnet", "weights": "random", "widths": [32, 32], "projection": "linear"},
                "text": {"name": "hashing", "width": 64},
                "width": 32,
            },
            "experts": {"num": case.experts, "epochs": case.epochs, "batch": 32, "augment": {"randaugment_ops": 0}},
            "distill": {"budget": 20, "batch": 10, "phases": [{"pairs": 10, "stop": 1, "endpoint": 1}]},
            "runtime": {
                "storage": str(storage),
                "ray": "off" if way == "in_turn" else "on",
                "fleet": "pool" if way in ("in_turn", "pool") else "train",
                "num_cpus": case.workers,
                "workers": case.workers,
            },
        }
    )


def bench_experts(case: Case, ways: str | Sequence[str] = WAYS) -> common.Numbers:
    """Measure all ways of training; `ways` in the result has the seconds, memory and overhead per expert.

    Raises `RuntimeError` if one of the ways fails.
    """
    rows = {way: _measure(case, way) for way in common.check_names(ways, WAYS, "way")}
    alone = rows.get("in_turn")
    for way, row in rows.items():
        if alone is None or way == "in_turn":
            continue
        scale = case.experts / row["experts"]
        width = 1 if way == "trainer_each" else min(case.workers, case.experts)
        row["ratio"] = round(scale * row["seconds"] / alone["seconds"], 3)
        row["overhead_per_expert"] = round(row["seconds"] / row["experts"] - alone["seconds"] / case.experts / width, 2)
    return {"case": asdict(case), "load_average": os.getloadavg()[0], "ways": rows}


def table(results: common.Numbers) -> str:
    heads = ["", "experts", "seconds", "against in turn", "overhead per expert", "start of Ray", "CPU seconds", "MiB"]
    lines = [heads]
    for way, row in results["ways"].items():
        ratio, overhead = (f"{row[k]:.2f}" if k in row else "-" for k in ("ratio", "overhead_per_expert"))
        lines.append(
            [
                way.replace("_", " "),
                str(row["experts"]),
                f"{row['seconds']:.1f}",
                ratio,
                overhead,
                f"{row['start']:.1f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['peak_mib']:.0f}",
            ]
        )
    return common.columns(lines)


def _measure(case: Case, way: str) -> common.Numbers:
    with tempfile.TemporaryDirectory() as folder:
        return common.measured("experts", case, {"way": way, "storage": folder})


def _train_here(case: Case, task: common.Numbers) -> common.Numbers:
    way = task["way"]
    run, quiet = run_of(case, way, Path(task["storage"])), Progress(quiet=True)
    before = time.perf_counter()
    with open_pipeline(run, quiet) as pipeline:
        start = time.perf_counter() - before
        for split in ("train", "val"):
            pipeline.prepared_split(split)
        if way != "trainer_each":
            pipeline.experts()
            return {"experts": case.experts, "start": round(start, 2), "seconds": pipeline.all_seconds()["experts"]}
        began = time.perf_counter()
        for num in range(1, case.each + 1):
            experts = run.experts.model_copy(update={"num": num})
            more = run.model_copy(update={"name": f"{run.name}-{num}", "experts": experts})
            with open_pipeline(more, quiet) as one:
                one.experts()
        seconds = round(time.perf_counter() - began, 2)
    return {"experts": case.each, "start": round(start, 2), "seconds": seconds}


if __name__ == "__main__":
    ways = ",".join(WAYS)
    common.main(__doc__, Case, lambda case, asked: bench_experts(case, asked.ways), table, _train_here, ways=ways)
