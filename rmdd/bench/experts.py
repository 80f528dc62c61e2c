"""What many experts cost: one after another, by a pool of actors, by one run of Ray Train, by a run of it for each.

Every way trains the same tiny experts in a process and a storage of its own. Seconds are those of the experts' step;
what starting Ray takes stands beside them. Memory is the peak, looked at twice a second, of the proportional set size
(each shared page counted once) summed over the process and all that it started (Linux). CPU seconds are theirs from
start to end: where a machine is busy with other things, compare those.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.core.files import write_json

WAYS = ("in_turn", "pool", "train", "trainer_each")
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Case:
    """How many experts of which size; `trainer_each` trains `each` of them, the rest is extrapolated."""

    experts: int = 8
    workers: int = 2
    epochs: int = 10
    pairs: int = 200
    image_size: int = 32
    each: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.each <= self.experts:
            raise ValueError(f"each is {self.each} of {self.experts} experts; give at least 1 and at most all")


def run_of(case: Case, way: str, storage: Path) -> config.Run:
    """A run on drawn scenes whose experts are trained in that way."""
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


def bench_experts(case: Case, ways: tuple[str, ...] = WAYS, out: Path | None = None) -> dict[str, Any]:
    """Measure every way in turn; `found["ways"][name]` holds seconds, memory and the overhead of an expert.

    Raises `RuntimeError` when one of them fails.
    """
    if unknown := [w for w in ways if w not in WAYS]:
        raise ValueError(f"no way '{unknown[0]}'; there are: {', '.join(WAYS)}")
    rows = {way: _measure(case, way) for way in ways}
    alone = rows.get("in_turn")
    for way, row in rows.items():
        if alone is None or way == "in_turn":
            continue
        scale = case.experts / row["experts"]
        width = 1 if way == "trainer_each" else min(case.workers, case.experts)
        row["ratio"] = round(scale * row["seconds"] / alone["seconds"], 3)
        row["overhead_per_expert"] = round(row["seconds"] / row["experts"] - alone["seconds"] / case.experts / width, 2)
    found = {"case": asdict(case), "load_average": os.getloadavg()[0], "ways": rows}
    if out is not None:
        write_json(out, found)
    return found


def table(found: dict[str, Any]) -> str:
    heads = ["", "experts", "seconds", "against in turn", "overhead per expert", "start of Ray", "CPU seconds", "MiB"]
    lines = [heads]
    for way, row in found["ways"].items():
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
                f"{row['peak_bytes'] / 2**20:.0f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _measure(case: Case, way: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked = json.dumps({"case": asdict(case), "way": way, "storage": folder})
        command = [sys.executable, "-m", "rmdd.bench.experts", asked]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        peak, cpu = 0, dict[int, float]()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, errors = process.communicate(timeout=SAMPLE_SECONDS)
                break
            family = list(_family(process.pid))
            peak = max(peak, sum(_proportional(pid) for pid in family))
            cpu |= {pid: max(_cpu_seconds(pid), cpu.get(pid, 0.0)) for pid in family}
    if process.returncode:
        raise RuntimeError(f"experts could not be trained by {way}: {errors[-1000:]}")
    return json.loads(output.splitlines()[-1]) | {"peak_bytes": peak, "cpu_seconds": round(sum(cpu.values()), 1)}


def _family(pid: int) -> Iterator[int]:
    """A process and all that it started, and those again."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from _family(int(child))


def _proportional(pid: int) -> int:
    """Bytes; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def _cpu_seconds(pid: int) -> float:
    """Of all its threads so far; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _train_here(case: Case, way: str, storage: Path) -> dict[str, Any]:
    from rmdd.core.progress import Progress
    from rmdd.pipeline import open_pipeline

    run, quiet = run_of(case, way, storage), Progress(quiet=True)
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
    asked = json.loads(sys.argv[1])
    print(json.dumps(_train_here(Case(**asked["case"]), asked["way"], Path(asked["storage"]))))
