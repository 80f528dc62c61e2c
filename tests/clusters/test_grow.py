"""A head without CPUs whose workers come when they are asked for, as `clusters/` has it: Ray's autoscaler, here."""

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
  use_node_id_as_ip: true  # they share one address
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

def meet(folder, hooks):  # ends when two nodes have been here
    (folder / ray.get_runtime_context().get_node_id()).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.1)

rule, folder = Runtime(gpus_per_worker=1, workers=2), Path("FOLDER")
(folder / "met").mkdir()
with connected(rule) as found:
    executor = ActorExecutor(rule, found, folder / "events.jsonl")
    executor.map(meet, [folder / "met"] * 3, list("abc"), lambda *report: None)
    print("FOUND", json.dumps([found.gpus, found.grows]))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started(GROWS, **{"num-cpus": 0}) as head:
        yield head


def test_the_first_node_is_waited_for_and_more_come_for_workers_that_wait(head: Head) -> None:
    code = RUN.replace("FOLDER", str(head.folder))
    output = head.do(sys.executable, "-c", code, RAY_ADDRESS=f"127.0.0.1:{head.gcs}")
    assert "waiting up to 15 minutes for a node with {'GPU': 1" in output
    (line,) = [line for line in output.splitlines() if line.startswith("FOUND")]
    gpus, grows = json.loads(line.removeprefix("FOUND"))
    assert gpus >= 1 and grows
    assert len(list((head.folder / "met").iterdir())) == 2
