"""Fixtures that several rooms share. The environment of Ray is set before anything imports it."""

import os
import uuid
from pathlib import Path

import pytest

os.environ.update(
    {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "300",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
)


@pytest.fixture(scope="session")
def ray_local():
    """One local cluster for the whole run."""
    ray = pytest.importorskip("ray")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The experts of `toy.run_of`: random walks in the place of trained ones."""
    import toy

    return toy.store_of(tmp_path_factory.mktemp("store"), toy.encoder().trained())


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """`make(run)`: the run of a method on the toy problem in float64, see `toy.made`."""
    import toy

    stores = {}

    def make(run, phase=0):
        if run.model not in stores:
            stores[run.model] = toy.store_of(tmp_path_factory.mktemp("store"), toy.encoder(run.model).trained())
        return toy.made(run, stores[run.model], phase)

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real annotation slices and pictures; tests that need it are skipped without it."""
    folder = Path(os.environ.get("RMDD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "reference" / "real_annotations").is_dir():
        pytest.skip("no folder `shared` beside the repository; set RMDD_SHARED")
    return folder
