import contextlib

import pytest
import ray
from ray.exceptions import RayActorError

from rmdd.config import Runtime
from rmdd.core.progress import Progress
from rmdd.execution.backend import open_backend
from rmdd.execution.ray import cluster
from rmdd.execution.ray.cluster import Resources, connected


@pytest.mark.parametrize(
    ("cpus", "gpus", "rule", "items", "expected"),
    [
        (8, 0, {}, 20, 8),
        (8, 0, {}, 3, 3),
        (8, 0, {"threads": 3}, 20, 2),
        (2, 0, {"threads": 4}, 20, 1),
        (8, 2, {}, 20, 8),
        (8, 2, {"gpus_per_worker": 1}, 20, 2),
        (8, 2, {"gpus_per_worker": 0.25}, 20, 8),
        (8, 2, {"gpus_per_worker": 0.1}, 20, 20),
        (8, 2, {"gpus_per_worker": 0.4}, 20, 4),  # no worker has a share of two GPUs
        (8, 2, {"gpus_per_worker": 2}, 20, 1),
        (8, 0, {"workers": 5}, 20, 5),
        (8, 0, {"workers": 5}, 4, 4),
        (2, 0, {"workers": 5}, 20, 2),
        (2, 0, {"cpus_per_worker": 0.5}, 20, 4),
        (4, 2, {"gpus_per_worker": 0.25, "cpus_per_worker": 1}, 20, 4),
        (4, 2, {"gpus_per_worker": 0.25, "cpus_per_worker": 0}, 20, 8),
    ],
)
def test_how_many_workers_fit(cpus, gpus, rule, items, expected):
    assert Resources(((float(cpus), float(gpus)),)).workers(Runtime(**rule), items) == expected


def test_no_share_spans_two_nodes():
    found = Resources(((3.0, 0.0), (3.0, 1.0)))
    assert (found.nodes, found.gpus, found.widest) == (2, 1.0, 3.0)
    assert found.workers(Runtime(threads=2), 20) == 2
    assert found.workers(Runtime(gpus_per_worker=0.5, cpus_per_worker=1), 20) == 2
    assert found.workers(Runtime(gpus_per_worker=2), 20) == 1 and found.room(Runtime(gpus_per_worker=2)) == 0


@pytest.mark.parametrize(("items", "expected"), [(20, 5), (3, 3)])
def test_a_cluster_that_grows_is_asked_for_as_many_as_the_run_says(items, expected):
    rule = Runtime(workers=5, gpus_per_worker=1)
    assert Resources(((0.0, 0.0),), grows=True).workers(rule, items) == expected


@pytest.mark.ray
def test_gpus_that_are_not_there_are_an_error_and_a_joined_cluster_stays(ray_local):
    words = r"gpus_per_worker is 0.5, but the number of GPUs in the cluster is 0; set it to 0 for CPUs"
    with pytest.raises(ValueError, match=words), connected(Runtime(gpus_per_worker=0.5)):
        pass
    with connected(Runtime()) as found:
        assert found == Resources(((4.0, 0.0),))
    words = r"no node has room for a worker \({'CPU': 5.0}\).* set runtime.workers"
    with pytest.raises(ValueError, match=words), connected(Runtime(threads=5)):
        pass
    assert ray_local.is_initialized()


@pytest.mark.parametrize(
    ("rule", "cpus"), [({}, 0), ({"gpus_per_worker": 1}, 1), ({"gpus_per_worker": 1, "cpus_per_worker": 1}, 0)]
)
def test_readers_of_pictures_ask_for_no_cpu_that_workers_may_hold(rule, cpus, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "connected", lambda runtime: contextlib.nullcontext(Resources(((4.0, 1.0),))))
    with open_backend(Runtime(**rule), tmp_path / "events.jsonl", Progress(quiet=True)) as backend:
        assert backend.pictures.keywords == {"cpus": cpus}


@pytest.mark.ray
def test_an_error_of_rays_own_can_be_resumed_from(ray_local):
    actor = ray.remote(Resources).options(num_cpus=0).remote(())
    ray.kill(actor)
    words = r"Ray failed \(ActorDiedError: .*; finished work is kept"
    with pytest.raises(RuntimeError, match=words) as caught, connected(Runtime()):
        ray.get(actor.room.remote(Runtime()))
    assert isinstance(caught.value.__cause__, RayActorError)


@pytest.mark.ray
def test_a_growing_cluster_that_brings_no_node_is_an_error(ray_local, monkeypatch):
    monkeypatch.setattr(cluster, "GROW_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"no node with room for a worker \({'CPU': 5.0}\) was added within"):
        cluster._await_room(Runtime(threads=5, workers=2))
