"""`rmdd doctor`: check this machine and the installation."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import typer

from rmdd.cli.command import Output, command
from rmdd.doctor import machine, packages
from rmdd.doctor.finding import Finding


@command(options=("json", "debug"))
def doctor(
    storage: Annotated[str, typer.Argument(metavar="[STORAGE]", help="Folder or URI of runtime.storage.")] = "runs",
    start_ray: Annotated[bool, typer.Option("--start-ray", help="Also test a local start of Ray, 10 seconds.")] = False,
    no_network: Annotated[bool, typer.Option("--no-network", help="Do not contact the hub (3 s at most).")] = False,
) -> Output:
    """Check Python, packages, GPUs, Ray, disks, limits, storage and hub; say how to cure problems."""
    checks: list[Iterable[Finding]] = [
        packages.check_python(),
        packages.check_packages(),
        packages.check_torch(),
        packages.check_ray(start_ray),
        packages.check_text_encoder(),
        machine.check_memory(),
        machine.check_disks(storage),
        machine.check_shared_memory(),
        machine.check_limits(),
        machine.check_threads(),
        machine.check_storage(storage),
        machine.check_hub(not no_network),
    ]
    findings = [finding for check in checks for finding in check]
    lines = [f"{f.state:8}{f.check}: {f.found}{f'; {f.cure}' if f.cure else ''}" for f in findings]
    counts = [sum(f.state == state for f in findings) for state in ("problem", "warning")]
    lines.append(f"{counts[0]} problems, {counts[1]} warnings")
    return Output([asdict(f) for f in findings], lines, typer.Exit(1) if counts[0] else None)
