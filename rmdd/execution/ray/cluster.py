"""Joining or starting a Ray cluster, and what it has to offer."""

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from rmdd import config

# Set before ray is imported: workers at normal priority, and none in advance, for those would lack our runtime_env and
# never be used; no telemetry, no upload of the working folder, quiet Data.
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
    # Ray Train: look at workers twice a second, stay in the folder, and start no actor that waits for spot notices:
    # an expert saves every epoch and goes on from there.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray Tune: Ctrl-C is ours, and its logs would tell what our own files do.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}

START_ATTEMPTS = 4

GROW_SECONDS = 900.0
"""How long a cluster that grows may take to bring a first node with room for a worker."""

PROBE_SECONDS = 60.0
"""A node that has not answered by then does not see the storage."""

_ASK = ", or set runtime.workers, so that a cluster that grows is asked for them"


@dataclass(frozen=True)
class Resources:
    each: tuple[tuple[float, float], ...]
    """CPUs and GPUs of every node."""
    grows: bool = False
    """Whether nodes come for workers that wait, as wide as a worker needs; as many may wait as `runtime.workers` says.
    """

    @property
    def nodes(self) -> int:
        return len(self.each)

    @property
    def gpus(self) -> float:
        return sum((gpus for _, gpus in self.each), 0.0)

    @property
    def widest(self) -> float:
        """CPUs of the node that has most."""
        return math.inf if self.grows else max((cpus for cpus, _ in self.each), default=0.0)

    def room(self, runtime: config.Runtime) -> float:
        """How many workers have their share of CPUs and of a GPU; no share spans two nodes or two GPUs."""
        return sum((_room(cpus, gpus, *runtime.share) for cpus, gpus in self.each), 0.0)

    def workers(self, runtime: config.Runtime, items: int) -> int:
        """How many workers to have side by side: as many as fit, and one at least."""
        wanted = min(items, runtime.workers or items)
        return max(1, wanted if self.grows else int(min(wanted, self.room(runtime))))


def _room(cpus: float, gpus: float, cpu_share: float, gpu_share: float) -> float:
    """How many workers one node has room for."""
    by_cpus = (cpus / cpu_share + 1e-9) // 1 if cpu_share else math.inf
    if gpu_share >= 1:
        return min(by_cpus, gpus // gpu_share)
    return min(by_cpus, gpus // 1 * ((1 / gpu_share + 1e-9) // 1)) if gpu_share else by_cpus


def resources_now(grows: bool = False, without: Collection[str] = ()) -> Resources:
    """What the cluster has now, but for some nodes; nodes come and go."""
    import ray

    have = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]
    return Resources(tuple((resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in have), grows)


@contextlib.contextmanager
def connected(runtime: config.Runtime) -> Iterator[Resources]:
    """Join the cluster that `runtime.address` or RAY_ADDRESS names, or start a local one and stop it at the end.

    A cluster that this process had already joined is used and left alone. One that is joined here with
    `runtime.workers` set is taken to grow: its first node is waited for. Raises `ValueError` when no node has room for
    a worker, or some do not see the storage; `RuntimeError` when what is done inside meets an error of Ray's own.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = runtime.address or os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex)
    import ray
    from ray.exceptions import RayError

    ours = not ray.is_initialized()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if ours and address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    elif ours:
        _start(runtime)
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in place
    try:
        grows = ours and bool(address) and runtime.workers is not None
        if grows:
            _await_room(runtime)
        resources = resources_now(grows)
        joined = bool(address) or not ours
        if runtime.gpus_per_worker > resources.gpus:
            raise ValueError(
                f"runtime.gpus_per_worker asks for {runtime.gpus_per_worker} GPU(s) but the cluster has "
                f"{resources.gpus:g}; set it to 0 for CPUs, or add GPU nodes{_ASK if joined else ''}"
            )
        if joined and resources.room(runtime) < 1:
            raise ValueError(f"no node has room for a worker ({_need(runtime)}); add such nodes{_ASK}")
        folder = runtime.storage.removeprefix("file://")
        if resources.nodes > 1 and "://" not in folder:
            require_shared(Path(folder).absolute())
        yield resources
    except RayError as error:
        raise RuntimeError(
            f"Ray failed ({type(error).__name__}: {' '.join(str(error).split())[:300]}); what was finished is kept"
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _start(runtime: config.Runtime) -> None:
    """Start a local cluster, and again if it does not come up in Ray's half minute, as on a very busy machine."""
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
        except Exception as error:  # Ray has no class of its own for it
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1 or "timed out" not in str(error):
                raise RuntimeError(f"a local Ray could not be started: {error}") from error


def _need(runtime: config.Runtime) -> dict[str, float]:
    return {name: share for name, share in zip(("CPU", "GPU"), runtime.share, strict=True) if share}


def _await_room(runtime: config.Runtime) -> None:
    """Wait until a node has had room for one worker. What waits is a placement group, which runs nothing.

    Raises `ValueError` when none came.
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
                f"no node with room for a worker ({need}) came within {minutes:g} minutes; ask for less by "
                "runtime.gpus_per_worker, cpus_per_worker or threads, or see why the cluster brings no such node"
            )
    finally:
        ray.util.remove_placement_group(group)


def require_shared(storage: Path) -> None:
    """Raise `ValueError` that names the alive nodes on which `storage` is not the folder that this process sees.

    This process writes a token there; every node must read it, and answer with a file that this process must find.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = uuid.uuid4().hex
    folder = storage / f".probe-{token}"
    folder.mkdir(parents=True)
    try:
        (folder / "token").write_text(token)
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        answer = ray.remote(num_cpus=0, max_retries=0)(_answer)
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
            f"the cluster has {len(nodes)} nodes, and {len(blind)} of them do not see runtime.storage {storage} as "
            f"this one does: {named}; mount one shared folder at that path on every node, or give a URI (s3://, gs://, "
            "abfs://)"
        )


def _answer(folder: str, token: str, node: str) -> None:
    """Runs on `node`: leave its name beside the token, if that is there."""
    if (Path(folder) / "token").read_text() == token:
        (Path(folder) / node).touch()
