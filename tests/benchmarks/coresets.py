"""Time and memory of herding, k-center and medoids on generated features on disk.

Features are float16 or float32 rows of unit length around random centres, generated once. Each method runs in a
separate process. Peak memory is this process's highest proportional set size, including mapped pages of features.
"""

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import common

from rmdd.core.seeding import generator
from rmdd.coresets import clusters, greedy
from rmdd.coresets.rows import DESCRIPTION, RowBlock, Rows, write_rows
from rmdd.coresets.shard import Best, split_rows

METHODS = ("herding", "k_center", "medoids")
BLOCK = 65_536
CENTRES = 1000


@dataclass(frozen=True)
class Case:
    """Size of the selection problem: `rows` feature rows of `width` numbers each."""

    rows: int = 1_000_000
    width: int = 384
    dtype: str = "float32"
    seed: int = 0
    threads: int = 1


def bench_coresets(
    case: Case, picks: Sequence[int], folder: Path, methods: str | Sequence[str] = METHODS[:2]
) -> common.Numbers:
    """Let each method pick max(`picks`) rows; measure memory, objective and the seconds until each number of picks."""
    methods, picks = common.check_names(methods, METHODS, "method"), sorted(picks)
    if not picks or not 0 < max(picks) < case.rows:
        raise ValueError(f"picks {picks} are impossible for {case.rows} rows; give picks from 1 to {case.rows - 1}")
    root = generate(case, folder / f"features-{case.rows}-{case.width}-{case.dtype}-{case.seed}")
    threads = {f"{library}_NUM_THREADS": str(case.threads) for library in ("OMP", "OPENBLAS", "MKL")}
    results: common.Numbers = {"case": asdict(case), "picks": picks, "methods": {}}
    for method in methods:
        task = {"method": method, "picks": picks, "root": str(root)}
        numbers = common.measured("coresets", case, task, **threads)
        numbers["peak_mib"] = round(max(numbers["peak_mib"], numbers.pop("high_water_mib")), 1)
        results["methods"][method] = numbers
    return results


def generate(case: Case, root: Path) -> Path:
    """Generate the features from the seed, unless the folder `root` has them already."""
    if (root / DESCRIPTION).is_file():
        return root
    centres = torch.randn(CENTRES, case.width, generator=generator(case.seed, "bench centres"))

    def blocks() -> Iterator[RowBlock]:
        for start in range(0, case.rows, BLOCK):
            draw = generator(case.seed, "bench features", start)
            ids = np.arange(start, min(start + BLOCK, case.rows))
            row_centres = centres[torch.randint(CENTRES, (len(ids),), generator=draw)]
            rows = row_centres + torch.randn(len(ids), case.width, generator=draw)
            yield ids, torch.nn.functional.normalize(rows, dim=1).numpy()

    write_rows(root, blocks(), case.width, case.dtype, asdict(case))
    return root


def table(results: common.Numbers) -> str:
    """Format the seconds, peak memory and objective of each method as a text table."""
    case, picks = results["case"], results["picks"]
    lines = [f"{case['rows']:,} x {case['width']} {case['dtype']}, {case['threads']} thread(s)"]
    lines.append(f"{'':10}" + "".join(f"{f'{k} picks, s':>15}" for k in picks) + f"{'peak MiB':>12}  objective")
    for name, n in results["methods"].items():
        seconds = "".join(f"{n['seconds'][str(k)]:>15.1f}" for k in picks)
        lines.append(f"{name:10}{seconds}{n['peak_mib']:>12.0f}  {n['objective']:.4g}")
    return "\n".join(lines)


def _run(case: Case, task: common.Numbers) -> common.Numbers:
    """Run one selection method in the measured process; the seconds include opening the features."""
    picks = task["picks"]
    torch.set_num_threads(case.threads)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    ranks = split_rows(Rows.open(Path(task["root"])))
    mu = greedy.mean(ranks, greedy.checked(ranks).largest)
    seconds["mean"] = round(time.perf_counter() - began, 2)
    chosen: list[int] = []
    last = 0.0
    if task["method"] == "medoids":
        for k in picks:
            began = time.perf_counter()
            chosen = clusters.medoids(split_rows(ranks.parts[0].rows), k, case.seed)
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


def _measure(case: Case, arguments: Any) -> common.Numbers:
    with tempfile.TemporaryDirectory() as temporary:
        picks = [int(k) for k in arguments.picks.split(",")]
        return bench_coresets(case, picks, Path(arguments.folder or temporary), arguments.methods)


if __name__ == "__main__":
    options = {"picks": "100,500", "methods": "herding,k_center", "folder": ""}
    common.main(__doc__, Case, _measure, table, _run, **options)
