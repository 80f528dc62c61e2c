"""Join or start a Ray cluster, and count its CPUs, GPUs and the workers that fit on it."""

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from rmdd import config

# Environment variables to set before ray is imported. Workers get normal priority. No worker is started in advance,
# as it would lack our runtime_env. Telemetry, uploads of the working folder and output of Ray Data are off.
ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Ray Train checks workers twice a second and stays in the working folder. It starts no actor that watches for the
    # loss of spot nodes, because experts resume from a checkpoint of their last epoch.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # For Ray Tune: leave Ctrl-C to rmdd, and write no log files, because the search writes its own.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}

START_ATTEMPTS = 4
"""Number of times that the start of a local cluster is tried."""

GROW_SECONDS = 900.0
"""Seconds to wait until an autoscaling cluster has its first node with room for a worker."""

PROBE_SECONDS = 60.0
"""Seconds within which every node must show that it sees the storage folder."""

_ASK = ", or set runtime.workers, so that an autoscaling cluster adds such nodes itself"


@dataclass(frozen=True)
class Resources:
    """The CPUs and GPUs of a cluster."""

    each: tuple[tuple[float, float], ...]
    """Number of CPUs and number of GPUs of every node."""
    grows: bool = False
    """Whether the cluster is autoscaling, and so adds nodes while fewer than `runtime.workers` workers fit on it."""

    @property
    def nodes(self) -> int:
        return len(self.each)

    @property
    def gpus(self) -> float:
        return sum((gpus for _, gpus in self.each), 0.0)

    @property
    def widest(self) -> float:
        """Largest number of CPUs that one node has; infinite if the cluster is autoscaling."""
        return math.inf if self.grows else max((cpus for cpus, _ in self.each), default=0.0)

    def room(self, runtime: config.Runtime) -> float:
        """Return how many workers fit on the cluster. A worker cannot get CPUs of two nodes, or shares of two GPUs."""
        return sum((_room(cpus, gpus, *runtime.share) for cpus, gpus in self.each), 0.0)

    def workers(self, runtime: config.Runtime, items: int) -> int:
        """Return how many workers to start for `items` items: as many as fit on the cluster, but at least one."""
        wanted = min(items, runtime.workers or items)
        return max(1, wanted if self.grows else int(min(wanted, self.room(runtime))))


def _room(cpus: float, gpus: float, cpu_share: float, gpu_share: float) -> float:
    """Return how many workers with `cpu_share` CPUs and `gpu_share` GPUs each fit on a node."""
    by_cpus = (cpus / cpu_share + 1e-9) // 1 if cpu_share else math.inf
    if gpu_share >= 1:
        return min(by_cpus, gpus // gpu_share)
    return min(by_cpus, gpus // 1 * ((1 / gpu_share + 1e-9) // 1)) if gpu_share else by_cpus


def resources_now(grows: bool = False, without: Collection[str] = ()) -> Resources:
    """Return the CPUs and GPUs of all nodes that are alive now, except the nodes with an id in `without`."""
    import ray

    have = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]
    return Resources(tuple((resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in have), grows)


@contextlib.contextmanager
def connected(runtime: config.Runtime, say: Callable[[str], None] = lambda text: None) -> Iterator[Resources]:
    """Join the cluster at `runtime.address` or RAY_ADDRESS, or start a local cluster and stop it after the block.

    If this process has already joined a cluster, that cluster is used and keeps running. If `runtime.workers` is set,
    a newly joined cluster is assumed to be autoscaling, so this function waits until the cluster has a node. Raises
    `ValueError` if no node has room for a worker or if some nodes do not see the storage, and `RuntimeError` if Ray
    fails in the block. `say` gets a line before this process joins or starts a cluster, which takes seconds.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = runtime.address or os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex)
    import ray
    from ray.exceptions import RayError

    ours = not ray.is_initialized()
    if ours:
        cores = runtime.num_cpus or len(os.sched_getaffinity(0))
        say(f"joining the Ray cluster at {address} ..." if address else f"starting Ray on {cores} core(s) ...")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if ours and address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    elif ours:
        _start(runtime)
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # restore the handler of SIGTERM, which ray.init replaced
    try:
        grows = ours and bool(address) and runtime.workers is not None
        if grows:
            _await_room(runtime)
        resources = resources_now(grows)
        joined = bool(address) or not ours
        if runtime.gpus_per_worker > resources.gpus:
            raise ValueError(
                f"runtime.gpus_per_worker is {runtime.gpus_per_worker}, but the number of GPUs in the cluster is "
                f"{resources.gpus:g}; set it to 0 for CPUs, or add GPU nodes{_ASK if joined else ''}"
            )
        if joined and resources.room(runtime) < 1:
            raise ValueError(f"no node has room for a worker ({_need(runtime)}); add nodes with room{_ASK}")
        folder = runtime.storage.removeprefix("file://")
        if resources.nodes > 1 and "://" not in folder:
            require_shared(Path(folder).absolute())
        yield resources
    except RayError as error:
        raise RuntimeError(
            f"Ray failed ({type(error).__name__}: {' '.join(str(error).split())[:300]}); finished work is kept, so the "
            "same command continues it"
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _start(runtime: config.Runtime) -> None:
    """Start a local cluster; try again if the start exceeds Ray's limit of 30 seconds, as on a busy machine."""
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=runtime.num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=runtime.object_store_mb * 2**20,
            )
            return
        except Exception as error:  # Ray has no error class for a failed start
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1 or "timed out" not in str(error):
                raise RuntimeError(f"a local Ray cluster could not be started: {error}") from error


def _need(runtime: config.Runtime) -> dict[str, float]:
    return {name: share for name, share in zip(("CPU", "GPU"), runtime.share, strict=True) if share}


def _await_room(runtime: config.Runtime) -> None:
    """Wait until a node has room for one worker. A placement group without tasks makes the cluster add such a node.

    Raises `ValueError` if no node has room after `GROW_SECONDS`.
    """
    import ray

    if resources_now().room(runtime) >= 1:
        return
    need, minutes = _need(runtime), GROW_SECONDS / 60
    print(f"waiting up to {minutes:.0f} minutes for a node with {need}", file=sys.stderr)
    group = ray.util.placement_group([need])
    try:
        if not group.wait(GROW_SECONDS):
            raise ValueError(
                f"no node with room for a worker ({need}) was added within {minutes:g} minutes; lower "
                "runtime.gpus_per_worker, cpus_per_worker or threads, or find out why the cluster adds no such node"
            )
    finally:
        ray.util.remove_placement_group(group)


def require_shared(storage: Path) -> None:
    """Raise `ValueError` with the names of all nodes that do not see the folder `storage` of this process.

    This process writes a token into the folder; every node reads it and writes a file that this process must see.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = uuid.uuid4().hex
    folder = storage / f".probe-{token}"
    folder.mkdir(parents=True)
    try:
        (folder / "token").write_text(token)
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        answer = ray.remote(num_cpus=0, max_retries=0)(_write_answer)
        answers = {
            node: answer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                str(folder), token, node
            )
            for node in nodes
        }
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=PROBE_SECONDS)
        blind = [node for node in nodes if not (folder / node).is_file()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if blind:
        named = ", ".join(f"{nodes[n].get('NodeName') or nodes[n]['NodeManagerAddress']} ({n[:8]})" for n in blind)
        raise ValueError(
            f"the cluster has {len(nodes)} nodes, and {len(blind)} of them do not see the folder runtime.storage "
            f"{storage} of this node: {named}; mount one shared folder at that path on every node, or set "
            "runtime.storage to a URI (s3://, gs://, abfs://)"
        )


def _write_answer(folder: str, token: str, node: str) -> None:
    """If this node can read the token of `require_shared`, write a file named after `node` beside the token."""
    if (Path(folder) / "token").read_text() == token:
        (Path(folder) / node).touch()
