"""More than one node needs a storage that all of them see."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rmdd.config import Runtime
from rmdd.execution.ray import cluster
from rmdd.execution.ray.cluster import require_shared

CODE = """
import os, sys
from pathlib import Path
from ray.cluster_utils import Cluster
import ray
from rmdd.config import Runtime
from rmdd.execution.ray.cluster import ENVIRONMENT, connected

os.environ.update(ENVIRONMENT)
here, elsewhere, shared = map(Path, sys.argv[1:])
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
os.chdir(here)
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
os.chdir(elsewhere)
other = cluster.add_node(**node)
os.chdir(here)
cluster.wait_for_nodes()
try:
    with connected(Runtime(storage=str(shared), address=cluster.address)) as found:
        print("nodes", found.nodes)
    # a path that means another folder on the other node, as a local disk does
    try:
        with connected(Runtime(storage="/proc/self/cwd/runs", address=cluster.address)):
            print("begun")
    except ValueError as error:
        print("refused", error)
    print("other", other.node_id)
finally:
    cluster.shutdown()
"""


def run(code, *folders):
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ray
def test_nodes_that_do_not_see_the_storage_are_named_before_anything_starts(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    output = run(CODE, here, elsewhere, tmp_path / "shared")
    assert "nodes 2\n" in output and "begun" not in output
    other = re.search(r"other (\w+)", output)
    assert other and re.search(
        rf"refused the cluster has 2 nodes, and 1 of them do not see runtime.storage /proc/self/cwd/runs .*"
        rf"\({other[1][:8]}\); mount one shared folder",
        output,
    )
    assert list((tmp_path / "shared").iterdir()) == [] and list((here / "runs").iterdir()) == []


LATE = """
import json, os, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster
import ray
from rmdd.config import Runtime
from rmdd.execution.ray.actors import SideBySide
from rmdd.execution.ray.cluster import ENVIRONMENT, connected

os.environ.update(ENVIRONMENT)
here, elsewhere = map(Path, sys.argv[1:])
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
events = Path("/proc/self/cwd/runs/one/events.jsonl")  # another folder on the other node, as on a local disk
os.chdir(here)
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
rule = Runtime(storage="/proc/self/cwd/runs", address=cluster.address, max_restarts=0)

def until_it_is_lost(log, hooks):
    while '"lost"' not in (log.read_text() if log.exists() else ""):
        time.sleep(0.05)
    return ray.get_runtime_context().get_node_id()

try:
    with connected(rule) as found:
        first = ray.get_runtime_context().get_node_id()
        os.chdir(elsewhere)
        cluster.add_node(**node)
        os.chdir(here)
        cluster.wait_for_nodes()
        told, log = [], here / "runs/one/events.jsonl"
        executor = SideBySide(rule, found, events, told.append)
        done = executor.map(until_it_is_lost, [log] * 3, list("abc"), lambda *report: None)
        print("DONE", json.dumps([set(done) == {first}, executor.resources.nodes, told[0]]))
finally:
    cluster.shutdown()
"""


@pytest.mark.ray
def test_a_node_that_joins_later_and_does_not_see_the_storage_is_given_nothing(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    done = run(LATE, here, elsewhere)
    on_the_first, nodes, told = json.loads(re.search(r"DONE (.*)", done)[1])
    assert on_the_first and nodes == 1
    assert re.search(r"lost on node .* does not see /proc/self/cwd/runs/one; mount one shared folder", told)


@pytest.mark.ray
def test_one_node_sees_its_own_folder(ray_local, tmp_path):
    require_shared(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.ray
def test_a_folder_that_is_given_as_a_uri_is_asked_for_too(ray_local, monkeypatch):
    asked = []
    monkeypatch.setattr(cluster, "resources_now", lambda grows=False: cluster.Resources(((1.0, 0.0), (1.0, 0.0))))
    monkeypatch.setattr(cluster, "require_shared", asked.append)
    for storage in ("file:///shared/runs", "s3://bucket/runs"):
        with cluster.connected(Runtime(storage=storage)):
            pass
    assert asked == [Path("/shared/runs")]
