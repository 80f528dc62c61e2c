"""Time and memory of the retrieval metric on as many images and texts as COCO test, in a separate process."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from benchmarks import common

from rmdd.bench.step import resident
from rmdd.evaluate.retrieval import ranks


@dataclass(frozen=True)
class Case:
    """Size of the gallery of random vectors. The first images have six texts, the others have five, as in COCO."""

    images: int = 5000
    texts: int = 25_010
    width: int = 512
    chunk: int = 256
    threads: int = 2


def bench_metric(case: Case, repeats: int = 3) -> common.Numbers:
    """Return the smallest wall and CPU seconds of `repeats` rankings in both directions, and their memory.

    Memory is the peak of the process in bytes, and the bytes that the ranking adds to the memory used before.
    """
    if repeats < 1 or case.texts < case.images:
        raise ValueError(f"give repeats of at least 1 and at least as many texts as images; found {repeats}, {case}")
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return {"case": asdict(case), **common.measured("metric", case, {"repeats": repeats}, **environment)}


def table(results: common.Numbers) -> str:
    """Format the times and the memory of the result as one line."""
    case = results["case"]
    return (
        f"{case['images']:,} x {case['texts']:,} of width {case['width']} on {case['threads']} threads: "
        f"{results['seconds']:.2f} s ({results['cpu_seconds']:.2f} s of CPU), "
        f"peak {results['peak_bytes'] / 2**20:.0f} MiB "
        f"({results['added_bytes'] / 2**20:.0f} MiB more than before)"
    )


def _measure(case: Case, task: common.Numbers) -> common.Numbers:
    torch.set_num_threads(case.threads)
    random = torch.Generator().manual_seed(0)
    image_of = torch.arange(case.texts) % case.images
    images = torch.randn(case.images, case.width, generator=random)
    texts = torch.randn(case.texts, case.width, generator=random)
    Path("/proc/self/clear_refs").write_text("5")
    before, timings = resident("VmRSS"), []
    for _ in range(task["repeats"]):
        wall, cpu = time.perf_counter(), time.process_time()
        ranks(images, texts, image_of, case.chunk)
        timings.append((time.perf_counter() - wall, time.process_time() - cpu))
    peak = resident("VmHWM")
    seconds, cpu_seconds = min(timings)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "added_bytes": peak - before}


if __name__ == "__main__":
    common.main(
        __doc__, Case, lambda case, arguments: bench_metric(case, arguments.repeats), table, _measure, repeats=3
    )
