"""What the benchmarks share: options from a dataclass, a child process whose memory is sampled, and tables (Linux)."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rmdd.core.files import write_json

SAMPLE_SECONDS = 0.5
Numbers = dict[str, Any]


def main(
    text: str | None,
    case_class: type,
    measure: Callable[[Any, argparse.Namespace], Numbers],
    table: Callable[[Numbers], str],
    child: Callable[[Any, Numbers], Numbers] | None = None,
    **defaults: Any,
) -> None:
    """Run a benchmark from the command line: an option per field of `case_class` and per entry of `defaults`.

    `child(case, task)` does what `measured` asks of a process of its own.
    """
    if child is not None and sys.argv[1:2] == ["--task"]:
        task = json.loads(sys.argv[2])
        print(json.dumps(child(case_class(**task["case"]), task)))
        return
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sizes = {field.name: field.default for field in fields(case_class) if not isinstance(field.default, tuple)}
    for name, value in {**sizes, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=" ")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    asked = parser.parse_args()
    numbers = measure(case_class(**{name: getattr(asked, name) for name in sizes}), asked)
    if asked.out is not None:
        write_json(asked.out, numbers)
    print(table(numbers))


def known(names: str | Sequence[str], choices: Sequence[str], noun: str) -> list[str]:
    """Names of a comma-separated list, each of them one of `choices`."""
    listed = [name for name in names.split(",") if name] if isinstance(names, str) else list(names)
    if unknown := [name for name in listed if name not in choices]:
        raise ValueError(f"no {noun} '{unknown[0]}'; there are: {', '.join(choices)}")
    return listed


def measured(module: str, case: Any, task: Numbers, **environment: str) -> Numbers:
    """What the `child` of a benchmark returns, with the peak of its memory, its CPU seconds and its wall seconds.

    Memory is the proportional set size (each shared page counted once), summed over the process and all that it
    started, looked at twice a second.
    """
    words = [sys.executable, "-m", f"benchmarks.{module}", "--task", json.dumps({**task, "case": asdict(case)})]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    began, peak, cpu = time.perf_counter(), 0, dict[int, float]()
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment, "PYTHONPATH": path}
    )
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            printed, _ = child.communicate(timeout=SAMPLE_SECONDS)
            break
        peak = max(peak, pss_of_tree(child.pid))
        cpu |= {pid: max(_cpu_seconds(pid), cpu.get(pid, 0.0)) for pid in _tree(child.pid)}
    if child.returncode:
        raise RuntimeError(f"benchmark {module} failed with {task}; its message stands above")
    usage = {"peak_mib": round(peak / 2**20, 1), "cpu_seconds": round(sum(cpu.values()), 1)}
    return usage | {"wall": time.perf_counter() - began} | json.loads(printed.splitlines()[-1])


def pss_of_tree(root: int) -> int:
    """Bytes of memory that a process and all below it hold, shared pages counted once."""
    return sum(_proportional(pid) for pid in _tree(root))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from _tree(int(child))


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


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
