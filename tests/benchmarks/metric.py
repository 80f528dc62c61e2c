"""Time and memory of the retrieval metric on a gallery of a published size, in a process of its own."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from benchmarks import common

from rmdd.bench.step import resident
from rmdd.evaluate.retrieval import ranks


@dataclass(frozen=True)
class Case:
    """Random unit vectors; every image has five captions and the first ones a sixth, as COCO's test has ten."""

    images: int = 5000
    texts: int = 25_010
    width: int = 512
    chunk: int = 256
    threads: int = 2


def bench_metric(case: Case, repeats: int = 3) -> common.Numbers:
    """Wall and CPU seconds of one ranking in both directions, the least of `repeats`; peak bytes of the whole process,
    and above what it held before."""
    if repeats < 1 or case.texts < case.images:
        raise ValueError(f"give repeats of at least 1 and as many texts as images; got {repeats}, {case}")
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return {"case": asdict(case), **common.measured("metric", case, {"repeats": repeats}, **returning)}


def table(found: common.Numbers) -> str:
    """The result in one line."""
    case = found["case"]
    return (
        f"{case['images']:,} x {case['texts']:,} of width {case['width']} on {case['threads']} threads: "
        f"{found['seconds']:.2f} s ({found['cpu_seconds']:.2f} s of CPU), peak {found['peak_bytes'] / 2**20:.0f} MiB "
        f"({found['added_bytes'] / 2**20:.0f} MiB above what the process held)"
    )


def _measure(case: Case, task: common.Numbers) -> common.Numbers:
    torch.set_num_threads(case.threads)
    random = torch.Generator().manual_seed(0)
    image_of = torch.arange(case.texts) % case.images
    images = torch.randn(case.images, case.width, generator=random)
    texts = torch.randn(case.texts, case.width, generator=random)
    Path("/proc/self/clear_refs").write_text("5")
    before, taken = resident("VmRSS"), []
    for _ in range(task["repeats"]):
        wall, cpu = time.perf_counter(), time.process_time()
        ranks(images, texts, image_of, case.chunk)
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    peak = resident("VmHWM")
    seconds, cpu_seconds = min(taken)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "added_bytes": peak - before}


if __name__ == "__main__":
    common.main(__doc__, Case, lambda case, asked: bench_metric(case, asked.repeats), table, _measure, repeats=3)
