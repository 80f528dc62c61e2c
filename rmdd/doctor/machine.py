"""Checks of the machine: memory, disks, shared memory, limits, threads, the storage, and access to the hub."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rmdd import config
from rmdd.core.layout import check_layout
from rmdd.core.storage import is_uri, open_storage
from rmdd.doctor.finding import Finding, by_amount, ok

GIB = 2**30
HUB_SECONDS = 3.0
"""Seconds to wait for the hub."""
OPEN_FILES, PROCESSES = (8192, 1024), (4096, 512)
"""Limits that are enough, and limits below which runs fail."""


def check_memory() -> Iterator[Finding]:
    """Check the memory that is available, to this container if it has a limit."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if available is None:
        yield ok("memory", "unknown on this system")
        return
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (limit := file.read_text().strip()).isdigit():
            available = min(available, int(limit))
    cure = "close other programs or take a larger machine; fewer runtime.workers need less memory"
    yield by_amount("memory", available, 4 * GIB, GIB, f"{available / GIB:.1f} GiB available", cure)


def check_disks(storage: str) -> Iterator[Finding]:
    """Check the free space of the storage folder and of the folder for temporary files."""
    if not is_uri(storage):
        cure = "free some space, or set runtime.storage to a folder on a larger disk (`rmdd clean` lists what can go)"
        yield _free("disk of the storage", _existing(Path(storage)), 10 * GIB, GIB, cure)
    cure = "free some space, or set TMPDIR to a folder on a larger disk"
    yield _free("disk of temporary files", Path(tempfile.gettempdir()), 2 * GIB, GIB // 4, cure)


def check_shared_memory() -> Iterator[Finding]:
    """Check the size of /dev/shm, in which Ray keeps its object store."""
    cure = "start the container with --shm-size=2g, or set runtime.object_store_mb below the free size"
    if Path("/dev/shm").is_dir():
        yield _free("shared memory", Path("/dev/shm"), GIB, GIB // 16, cure)


def check_limits() -> Iterator[Finding]:
    """Check how many files and processes this user may open."""
    for name, kind, (enough, least), flag in (
        ("open files", resource.RLIMIT_NOFILE, OPEN_FILES, "n"),
        ("processes", resource.RLIMIT_NPROC, PROCESSES, "u"),
    ):
        soft, _ = resource.getrlimit(kind)
        unlimited = soft == resource.RLIM_INFINITY
        cure = f"raise the limit with `ulimit -{flag} {8 * enough}` before you start rmdd"
        amount = float("inf") if unlimited else soft
        yield by_amount(name, amount, enough, least, "no limit" if unlimited else f"at most {soft:,}", cure)


def check_threads() -> Iterator[Finding]:
    """Check the environment variables that set the number of threads."""
    cores = os.cpu_count() or 1
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value and not (value.isdigit() and 1 <= int(value) <= cores):
            found = f"{name}={value}, and this machine has {cores} cores"
            yield Finding("threads", "warning", found, f"unset {name}; runtime.threads sets the threads of a worker")
            return
    yield ok("threads", f"{cores} cores")


def check_storage(storage: str) -> Iterator[Finding]:
    """Check that the storage can be opened and written, and has the layout of this version."""
    try:
        opened = open_storage(config.load({"runtime": {"storage": storage}}).runtime)
        if not is_uri(storage):
            folder = _existing(opened.root)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except (OSError, config.ConfigError) as error:
        cure = "set runtime.storage to a writable folder, or set the credentials of its URI in the environment"
        yield Finding("storage", "problem", f"{storage} cannot be written: {error}", cure)
        return
    try:
        check_layout(opened)
    except ValueError as error:
        found, _, cure = str(error).partition("; ")
        yield Finding("storage", "problem", found, cure)
    else:
        yield ok("storage", f"{opened.address(opened.root)} can be written" if not is_uri(storage) else storage)


def check_hub(contact: bool = True) -> Iterator[Finding]:
    """Check that pretrained models can be downloaded: settings, cache folder, and one request if `contact` is true."""
    import urllib.error
    import urllib.request

    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    try:
        with tempfile.TemporaryFile(dir=_existing(cache)):
            pass
    except OSError as error:
        cure = "set HF_HOME to a folder that this user may write to"
        yield Finding("hub cache", "warning", f"{cache} cannot be written: {error}", cure)
    else:
        yield ok("hub cache", str(cache))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            cure = f"unset {name} to download models, or use models that are in the cache, or local folders"
            yield Finding("hub", "warning", f"{name} is set, so nothing is downloaded", cure)
            return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    proxies = ", ".join(f"{scheme} proxy" for scheme in urllib.request.getproxies() if scheme != "no")
    way = f"{address}{f' ({proxies})' if proxies else ''}"
    if not contact:
        yield ok("hub", f"{way} was not contacted")
        return
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
    except (OSError, ValueError) as error:
        if not isinstance(error, urllib.error.HTTPError):  # any answer means that the hub can be reached
            cure = "check network and proxies, set HF_ENDPOINT to a mirror, or use local folders and installed packages"
            yield Finding("hub", "warning", f"{way} does not answer within {HUB_SECONDS:.0f} s: {error}", cure)
            return
    yield ok("hub", f"{way} answers")


def _free(check: str, folder: Path, enough: int, least: int, cure: str) -> Finding:
    free = shutil.disk_usage(folder).free
    return by_amount(check, free, enough, least, f"{free / GIB:.1f} GiB free in {folder}", cure)


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.exists())
