import pytest

from rmdd.config import Runtime
from rmdd.runtime.cluster import Resources, connected


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
    assert Resources(float(cpus), float(gpus), 1).workers(Runtime(**rule), items) == expected


@pytest.mark.parametrize(("items", "expected"), [(20, 5), (3, 3)])
def test_a_cluster_that_grows_is_asked_for_as_many_as_the_run_says(items, expected):
    rule = Runtime(workers=5, gpus_per_worker=1)
    assert Resources(0.0, 0.0, 1, grows=True).workers(rule, items) == expected


@pytest.mark.ray
def test_gpus_that_are_not_there_are_an_error_and_a_joined_cluster_stays(ray_local):
    words = r"asks for 0.5 GPU\(s\) but the cluster has 0; set it to 0 for CPUs"
    with pytest.raises(ValueError, match=words), connected(Runtime(gpus_per_worker=0.5)):
        pass
    with connected(Runtime()) as found:
        assert (found.cpus, found.gpus, found.nodes) == (4, 0, 1)
    assert ray_local.is_initialized()
