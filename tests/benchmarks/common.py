"""Shared code of the benchmarks (Linux only): command-line options from a dataclass, measured processes, tables."""

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
    """Run a benchmark from the command line; the fields of `case_class` and the entries of `defaults` are options.

    `child(case, task)` is the function that `measured` runs in a separate process.
    """
    if child is not None and sys.argv[1:2] == ["--task"]:
        task = json.loads(sys.argv[2])
        print(json.dumps(child(case_class(**task["case"]), task)))
        return
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sizes = {field.name: field.default for field in fields(case_class) if not isinstance(field.default, tuple)}
    for name, value in {**sizes, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=" ")
    parser.add_argument("--out", type=Path, help="path of a JSON file to which the measured numbers are also written")
    arguments = parser.parse_args()
    numbers = measure(case_class(**{name: getattr(arguments, name) for name in sizes}), arguments)
    if arguments.out is not None:
        write_json(arguments.out, numbers)
    print(table(numbers))


def check_names(names: str | Sequence[str], choices: Sequence[str], noun: str) -> list[str]:
    """Split comma-separated `names` into a list. Raises `ValueError` for a name that is not in `choices`."""
    listed = [name for name in names.split(",") if name] if isinstance(names, str) else list(names)
    if unknown := [name for name in listed if name not in choices]:
        raise ValueError(f"unknown {noun} '{unknown[0]}'; available: {', '.join(choices)}")
    return listed


def measured(module: str, case: Any, task: Numbers, **environment: str) -> Numbers:
    """Run the `child` function of a benchmark in a new process; return its result, peak memory, CPU and wall seconds.

    Memory is the proportional set size (each shared page counts once), summed over the process and its descendants and
    sampled twice per second.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--task", json.dumps({**task, "case": asdict(case)})]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    began, peak, cpu = time.perf_counter(), 0, dict[int, float]()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment, "PYTHONPATH": path}
    )
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            printed, _ = child.communicate(timeout=SAMPLE_SECONDS)
            break
        peak = max(peak, pss_of_tree(child.pid))
        cpu |= {pid: max(_cpu_seconds(pid), cpu.get(pid, 0.0)) for pid in _tree(child.pid)}
    if child.returncode:
        raise RuntimeError(f"benchmark {module} failed with {task}; see its message above")
    usage = {"peak_mib": round(peak / 2**20, 1), "cpu_seconds": round(sum(cpu.values()), 1)}
    return usage | {"wall": time.perf_counter() - began} | json.loads(printed.splitlines()[-1])


def pss_of_tree(root: int) -> int:
    """Return the memory in bytes of a process and its descendants; a page shared by several of them counts once."""
    return sum(_proportional(pid) for pid in _tree(root))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from _tree(int(child))


def _proportional(pid: int) -> int:
    """Return the proportional set size of a process in bytes, or 0 if the process has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of all threads of a process so far, or 0 if the process has ended."""
    with contextlib.suppress(OSError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Format a table as text; each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
