"""Test the check that all nodes of a cluster see the storage folder."""

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
import json, os, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster
import ray
from ray_head import patiently
from rmdd.config import Runtime
from rmdd.execution.ray.actors import ActorExecutor
from rmdd.execution.ray.cluster import ENVIRONMENT, connected

os.environ.update(ENVIRONMENT)
here, elsewhere, shared = map(Path, sys.argv[1:])
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
local = "/proc/self/cwd/runs"  # another folder on each node, like a local disk
events = Path(local, "one/events.jsonl")
os.chdir(here)
cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False}))
rule = Runtime(storage=local, address=cluster.address, max_restarts=0)

def until_it_is_lost(log, hooks):
    while '"lost"' not in (log.read_text() if log.exists() else ""):
        time.sleep(0.05)
    return ray.get_runtime_context().get_node_id()

try:
    with connected(rule) as resources:
        first = ray.get_runtime_context().get_node_id()
        os.chdir(elsewhere)
        other = patiently(lambda: cluster.add_node(**node))
        os.chdir(here)
        cluster.wait_for_nodes()
        messages, log = [], here / "runs/one/events.jsonl"
        executor = ActorExecutor(rule, resources, events, messages.append)
        done = executor.map(until_it_is_lost, [log] * 3, list("abc"), lambda *report: None)
        print("LATE", json.dumps([set(done) == {first}, executor.resources.nodes, messages[0]]))
    with connected(Runtime(storage=str(shared), address=cluster.address)) as resources:
        print("SHARED", json.dumps([resources.nodes, os.listdir(shared)]))
    before = os.listdir("runs")
    try:
        with connected(rule):
            refused = "begun"
    except ValueError as error:
        refused = str(error)
    print("REFUSED", json.dumps([refused, other.node_id, os.listdir("runs") == before]))
finally:
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Fixture: the output of `CODE` on a cluster with two nodes, of which one does not see the storage folder."""
    folders = [tmp_path_factory.mktemp(name) for name in ("here", "elsewhere", "shared")]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, folders)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {word: json.loads(line) for word, line in re.findall(r"^([A-Z]+) (.*)$", done.stdout, re.M)}


@pytest.mark.ray
def test_a_node_that_joins_later_and_does_not_see_the_storage_gets_no_work(printed):
    on_the_first, nodes, message = printed["LATE"]
    assert on_the_first and nodes == 1
    assert re.search(r"lost on node .* does not see /proc/self/cwd/runs/one; mount one shared folder", message)


@pytest.mark.ray
def test_nodes_that_do_not_see_the_storage_are_named_before_any_work_starts(printed):
    assert printed["SHARED"] == [2, []]
    refused, other, untouched = printed["REFUSED"]
    assert untouched and re.search(
        rf"the cluster has 2 nodes, and 1 of them do not see the folder runtime.storage /proc/self/cwd/runs .*"
        rf"\({other[:8]}\); mount one shared folder",
        refused,
    )


@pytest.mark.ray
def test_a_single_node_sees_the_folder_and_no_file_is_left(ray_local, tmp_path):
    require_shared(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.ray
def test_a_folder_given_as_a_file_uri_is_checked_too(ray_local, monkeypatch):
    checked = []
    monkeypatch.setattr(cluster, "resources_now", lambda grows=False: cluster.Resources(((1.0, 0.0), (1.0, 0.0))))
    monkeypatch.setattr(cluster, "require_shared", checked.append)
    for storage in ("file:///shared/runs", "s3://bucket/runs"):
        with cluster.connected(Runtime(storage=storage)):
            pass
    assert checked == [Path("/shared/runs")]
