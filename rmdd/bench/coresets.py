"""How long herding and k-center take over generated features on disk, and how much memory.

Features are float16 or float32 rows of unit length around seeded centres, written once. Each method runs in a process
of its own; the peak is over its PSS, mapped pages of the features counted.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmdd.bench.ingest import SAMPLE_SECONDS, pss_of_tree
from rmdd.core.files import write_json
from rmdd.core.seeding import generator
from rmdd.coresets import clusters, greedy
from rmdd.coresets.rows import DESCRIPTION, RowBlock, Rows, write_rows
from rmdd.coresets.shard import Best, here

METHODS = ("herding", "k_center", "medoids")
BLOCK = 65_536
CENTRES = 1000


@dataclass(frozen=True)
class Case:
    """`rows` features of `width` numbers."""

    rows: int = 1_000_000
    width: int = 384
    dtype: str = "float32"
    seed: int = 0
    threads: int = 1


def bench_coresets(
    case: Case, picks: Sequence[int], folder: Path, methods: Iterable[str] = METHODS[:2], out: Path | None = None
) -> dict[str, Any]:
    """Run each method once up to the last of `picks`; seconds at each of them, peak memory, and the objective."""
    methods = list(methods)
    if unknown := [m for m in methods if m not in METHODS]:
        raise ValueError(f"no method '{unknown[0]}' to measure; there are: {', '.join(METHODS)}")
    if not picks or not 0 < max(picks) < case.rows:
        raise ValueError(f"picks {list(picks)} out of {case.rows} rows; give numbers from 1 to {case.rows - 1}")
    root = generate(case, folder / f"features-{case.rows}-{case.width}-{case.dtype}-{case.seed}")
    found: dict[str, Any] = {"case": asdict(case), "picks": sorted(picks), "methods": {}}
    for method in methods:
        task = {"method": method, "case": asdict(case), "picks": sorted(picks), "root": str(root)}
        found["methods"][method] = _measured(task)
    if out is not None:
        write_json(out, found)
    return found


def generate(case: Case, root: Path) -> Path:
    """The features, drawn from the seed; what is there is used."""
    import torch

    if (root / DESCRIPTION).is_file():
        return root
    centres = torch.randn(CENTRES, case.width, generator=generator(case.seed, "bench centres"))

    def blocks() -> Iterator[RowBlock]:
        for start in range(0, case.rows, BLOCK):
            draw = generator(case.seed, "bench features", start)
            ids = np.arange(start, min(start + BLOCK, case.rows))
            own = centres[torch.randint(CENTRES, (len(ids),), generator=draw)]
            rows = own + torch.randn(len(ids), case.width, generator=draw)
            yield ids, torch.nn.functional.normalize(rows, dim=1).numpy()

    write_rows(root, blocks(), case.width, case.dtype, asdict(case))
    return root


def table(found: dict[str, Any]) -> str:
    """The numbers for people."""
    case, picks = found["case"], found["picks"]
    lines = [f"{case['rows']:,} x {case['width']} {case['dtype']}, {case['threads']} thread(s)"]
    lines.append(f"{'':10}" + "".join(f"{f'{k} picks, s':>15}" for k in picks) + f"{'peak MiB':>12}  objective")
    for name, n in found["methods"].items():
        seconds = "".join(f"{n['seconds'][str(k)]:>15.1f}" for k in picks)
        lines.append(f"{name:10}{seconds}{n['peak_mib']:>12.0f}  {n['objective']:.4g}")
    return "\n".join(lines)


def _measured(task: dict[str, Any]) -> dict[str, Any]:
    words = [sys.executable, "-m", "rmdd.bench.coresets", json.dumps(task)]
    threads = str(task["case"]["threads"])
    limits = {f"{library}_NUM_THREADS": threads for library in ("OMP", "OPENBLAS", "MKL")}
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **limits})
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_SECONDS):
            peak = max(peak, pss_of_tree(child.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    printed, _ = child.communicate()
    ended.set()
    sampler.join()
    if child.returncode:
        raise RuntimeError(f"the method {task['method']} failed; its message stands above")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found | {"peak_mib": round(max(peak / 2**20, found.pop("high_water_mib")), 1)}


def _run(task: dict[str, Any]) -> dict[str, Any]:
    """One method, in the process that is measured; seconds count from the opening of the features."""
    import resource

    import torch

    case, picks = Case(**task["case"]), task["picks"]
    torch.set_num_threads(case.threads)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    ranks = here(Rows.open(Path(task["root"])))
    mu = greedy.mean(ranks, greedy.checked(ranks).largest)
    seconds["mean"] = round(time.perf_counter() - began, 2)
    chosen: list[int] = []
    last = 0.0
    if task["method"] == "medoids":
        for k in picks:
            began = time.perf_counter()
            chosen = clusters.medoids(here(ranks.parts[0].rows), k, case.seed)
            seconds[str(k)] = round(time.perf_counter() - began, 2)
    else:
        order = _order(task["method"], ranks, mu, case.seed)
        for best in order:
            if len(chosen) == picks[-1]:
                last = best.value
                break
            chosen.append(best.id)
            if len(chosen) in picks:
                seconds[str(len(chosen))] = round(time.perf_counter() - began, 2)
    error = float(np.linalg.norm(mu - greedy.rows_of(ranks, chosen).astype(np.float64).mean(axis=0)))
    return {
        "seconds": seconds,
        "objective": last**0.5 if task["method"] == "k_center" else error,
        "high_water_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _order(method: str, ranks: Any, mu: np.ndarray, seed: int) -> Iterator[Best]:
    if method == "herding":
        return greedy.herding(ranks, mu)
    return greedy.k_center(ranks, greedy.start_of(ranks, "random", seed, mu))


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.argv[1]))))
