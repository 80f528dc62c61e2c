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
        (8, 2, {"gpus_per_worker": 0.4}, 20, 4),  # a worker cannot use the 0.2 left on each of two GPUs
        (8, 2, {"gpus_per_worker": 2}, 20, 1),
        (8, 0, {"workers": 5}, 20, 5),
        (8, 0, {"workers": 5}, 4, 4),
        (2, 0, {"workers": 5}, 20, 2),
        (2, 0, {"cpus_per_worker": 0.5}, 20, 4),
        (4, 2, {"gpus_per_worker": 0.25, "cpus_per_worker": 1}, 20, 4),
        (4, 2, {"gpus_per_worker": 0.25, "cpus_per_worker": 0}, 20, 8),
    ],
)
def test_the_number_of_workers_that_fit_on_a_node(cpus, gpus, rule, items, expected):
    assert Resources(((float(cpus), float(gpus)),)).workers(Runtime(**rule), items) == expected


def test_a_worker_does_not_get_cpus_or_gpus_of_two_nodes():
    resources = Resources(((3.0, 0.0), (3.0, 1.0)))
    assert (resources.nodes, resources.gpus, resources.widest) == (2, 1.0, 3.0)
    assert resources.workers(Runtime(threads=2), 20) == 2
    assert resources.workers(Runtime(gpus_per_worker=0.5, cpus_per_worker=1), 20) == 2
    assert resources.workers(Runtime(gpus_per_worker=2), 20) == 1 and resources.room(Runtime(gpus_per_worker=2)) == 0


@pytest.mark.parametrize(("items", "expected"), [(20, 5), (3, 3)])
def test_an_autoscaling_cluster_gets_requests_for_runtime_workers_workers(items, expected):
    rule = Runtime(workers=5, gpus_per_worker=1)
    assert Resources(((0.0, 0.0),), grows=True).workers(rule, items) == expected


@pytest.mark.ray
def test_missing_gpus_are_an_error_and_a_joined_cluster_keeps_running(ray_local):
    words = r"gpus_per_worker is 0.5, but the number of GPUs in the cluster is 0; set it to 0 for CPUs"
    with pytest.raises(ValueError, match=words), connected(Runtime(gpus_per_worker=0.5)):
        pass
    with connected(Runtime()) as resources:
        assert resources == Resources(((4.0, 0.0),))
    words = r"no node has room for a worker \({'CPU': 5.0}\).* set runtime.workers"
    with pytest.raises(ValueError, match=words), connected(Runtime(threads=5)):
        pass
    assert ray_local.is_initialized()


@pytest.mark.parametrize(
    ("rule", "cpus"), [({}, 0), ({"gpus_per_worker": 1}, 1), ({"gpus_per_worker": 1, "cpus_per_worker": 1}, 0)]
)
def test_image_readers_request_no_cpu_if_workers_may_hold_all_of_them(rule, cpus, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "connected", lambda runtime, say: contextlib.nullcontext(Resources(((4.0, 1.0),))))
    with open_backend(Runtime(**rule), tmp_path / "events.jsonl", Progress(quiet=True)) as backend:
        assert backend.pictures.keywords == {"cpus": cpus}


@pytest.mark.parametrize(
    ("rule", "line"),
    [({"num_cpus": 3}, "starting Ray on 3 core(s) ..."), ({"address": "a:1"}, "joining the Ray cluster at a:1 ...")],
)
def test_a_line_is_printed_before_the_wait_for_ray(rule, line, monkeypatch):
    said: list[str] = []

    def begin(*_, **__):
        raise RuntimeError(f"after {said}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", begin)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RuntimeError) as caught, connected(Runtime(**rule), said.append):
        pass
    assert f"after {[line]}" in str(caught.value)


@pytest.mark.ray
def test_an_error_of_ray_says_that_finished_work_is_kept(ray_local):
    actor = ray.remote(Resources).options(num_cpus=0).remote(())
    ray.kill(actor)
    words = r"Ray failed \(ActorDiedError: .*; finished work is kept"
    with pytest.raises(RuntimeError, match=words) as caught, connected(Runtime()):
        ray.get(actor.room.remote(Runtime()))
    assert isinstance(caught.value.__cause__, RayActorError)


@pytest.mark.ray
def test_an_autoscaling_cluster_that_adds_no_node_is_an_error(ray_local, monkeypatch):
    monkeypatch.setattr(cluster, "GROW_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"no node with room for a worker \({'CPU': 5.0}\) was added within"):
        cluster._await_room(Runtime(threads=5, workers=2))
