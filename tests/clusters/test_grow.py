"""Test autoscaling as in `clusters/`: a Ray head node without CPUs, and nodes that the autoscaler adds on demand."""

import json
import sys
from collections.abc import Iterator

import pytest
from ray_head import Head, started

pytestmark = pytest.mark.ray
GROWS = """
cluster_name: grows
max_workers: 2
idle_timeout_minutes: 5
auth: {{}}
file_mounts: {{}}
cluster_synced_files: []
setup_commands: []
worker_setup_commands: []
worker_start_ray_commands: []
provider:
  type: fake_multinode
  gcs_address: "{gcs}"
  use_node_id_as_ip: true  # all fake nodes share one address
  disable_node_updaters: true
  disable_launch_config_check: true
head_node_type: ray.head.default
available_node_types:
  ray.head.default: {{resources: {{}}, node_config: {{}}, min_workers: 0, max_workers: 0}}
  gpu: {{resources: {{CPU: 2, GPU: 1}}, node_config: {{}}, min_workers: 0, max_workers: 2}}
"""
RUN = """
import json, time
from pathlib import Path
import ray
from rmdd.config import Runtime
from rmdd.execution.ray.actors import ActorExecutor
from rmdd.execution.ray.cluster import connected

def meet(folder, hooks):  # wait until two nodes have written a file
    (folder / ray.get_runtime_context().get_node_id()).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.1)

rule, folder = Runtime(gpus_per_worker=1, workers=2), Path("FOLDER")
(folder / "met").mkdir()
with connected(rule) as resources:
    executor = ActorExecutor(rule, resources, folder / "events.jsonl")
    executor.map(meet, [folder / "met"] * 3, list("abc"), lambda *report: None)
    print("RESOURCES", json.dumps([resources.gpus, resources.grows]))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started(GROWS, **{"num-cpus": 0}) as head:
        yield head


def test_a_run_waits_for_the_first_node_and_starts_more_for_waiting_workers(head: Head) -> None:
    code = RUN.replace("FOLDER", str(head.folder))
    output = head.do(sys.executable, "-c", code, RAY_ADDRESS=f"127.0.0.1:{head.gcs}")
    assert "waiting up to 15 minutes for a node with {'GPU': 1" in output
    (line,) = [line for line in output.splitlines() if line.startswith("RESOURCES")]
    gpus, grows = json.loads(line.removeprefix("RESOURCES"))
    assert gpus >= 1 and grows
    assert len(list((head.folder / "met").iterdir())) == 2
