"""Fixtures for tests of several packages; sets Ray's environment variables before Ray is imported."""

import contextlib
import os
import uuid
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("shared", deadline=None)  # no time limit, because busy machines are slow
settings.load_profile("shared")
os.environ.update(
    {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
)


def pytest_configure(config):
    """Check tensor types in pytest-xdist workers too; jaxtyping reads the command line, which workers do not have."""
    if hasattr(config, "workerinput"):
        *packages, checker = config.option.jaxtyping_packages.split(",")
        install_import_hook(packages, checker)


def pytest_collection_modifyitems(config, items):
    """With pytest-xdist, run test files that start Ray first, because they take longest."""
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("ray")}
        items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def no_ink():
    """Fixture of all tests: skip rendering figures (half the time of a tiny run), unless a test uses `ink`."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda figure, renderer: None)
        yield patch


@pytest.fixture(scope="session", autouse=True)
def unchecked_operations():
    """Fixture of all tests: skip type checks of `__torch_function__`, which torch calls hundreds of times per step."""
    from rmdd.models.group_norm import TwiceDifferentiable

    TwiceDifferentiable.__torch_function__.__no_type_check__ = True


@pytest.fixture(scope="session", autouse=True)
def no_rival():
    """Fixture of all tests: shorten the wait of locks in URI storages for rival processes, which tests do not have."""
    from rmdd.core import locks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "SETTLE", 0.01)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting():
    """Fixture of all tests: skip slow calls that change no results (fsync, and seeding devices that do not exist)."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        if not torch.accelerator.is_available():
            for device in (torch.cuda, torch.xpu, torch.mtia):
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(scope="session")
def painted(no_ink):
    """Fixture: code inside `with painted():` really renders figures; outside of it, tests skip rendering."""
    from matplotlib.figure import Figure

    empty = Figure.draw

    @contextlib.contextmanager
    def painted():
        no_ink.undo()
        try:
            yield
        finally:
            no_ink.setattr(Figure, "draw", empty)

    return painted


@pytest.fixture(scope="module")
def ink(painted):
    """Fixture: really render figures in every test of the file; by default, tests skip rendering."""
    with painted():
        yield


@pytest.fixture(scope="session")
def ray_local():
    """Fixture: one local Ray cluster for all tests of this process; without Ray, tests that need it are skipped."""
    ray = pytest.importorskip("ray")
    from ray_head import patiently

    patiently(
        lambda: ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Fixture: the expert store of `toy.run_of`, with random walks instead of trained experts."""
    import toy

    return toy.store_of(tmp_path_factory.mktemp("store"), toy.encoder().trained())


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """Fixture: `make(run)` prepares a distillation method on the toy problem in float64; see `toy.made`."""
    import toy

    stores = {}

    def make(run, phase=0):
        if run.model not in stores:
            stores[run.model] = toy.store_of(tmp_path_factory.mktemp("store"), toy.encoder(run.model).trained())
        return toy.made(run, stores[run.model], phase)

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """Fixture: the folder with samples of public annotations and images; without it, tests that need it are skipped."""
    folder = Path(os.environ.get("RMDD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "reference" / "real_annotations").is_dir():
        pytest.skip("the folder `shared` is missing next to the repository; set RMDD_SHARED")
    return folder


@pytest.fixture(scope="session")
def s3():
    """Fixture: an S3 bucket on the loopback address; environment variables hold its address and credentials."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        from pyarrow.fs import FileSystem

        FileSystem.from_uri("s3://bucket/?allow_bucket_creation=true")[0].create_dir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def uri(request, tmp_path):
    return f"file://{tmp_path}/there" if request.param == "file" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
