"""Test the files for `ray up` with Ray's own check and stricter ones: typos, open ports, secrets, versions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import CLUSTERS, RAY, ROOT, leaves, problems

FILES = sorted(CLUSTERS.glob("*.yaml"))
ANY = None
AWS = {
    "InstanceType": ANY,
    "ImageId": ANY,
    "SecurityGroupIds": ANY,
    "SubnetIds": ANY,
    "KeyName": ANY,
    "IamInstanceProfile": {"Name": ANY, "Arn": ANY},
    "BlockDeviceMappings": [{"DeviceName": ANY, "Ebs": {"VolumeSize": ANY, "VolumeType": ANY}}],
    "InstanceMarketOptions": {"MarketType": ANY, "SpotOptions": {"MaxPrice": ANY}},
}
GCP = {
    "machineType": ANY,
    "networkInterfaces": [{"subnetwork": ANY}],  # `accessConfigs` would give the machine a public address
    "disks": [
        {"boot": ANY, "autoDelete": ANY, "type": ANY, "initializeParams": {"diskSizeGb": ANY, "sourceImage": ANY}}
    ],
    "guestAccelerators": [{"acceleratorType": ANY, "acceleratorCount": ANY}],
    "scheduling": {
        "onHostMaintenance": ANY,
        "automaticRestart": ANY,
        "provisioningModel": ANY,
        "instanceTerminationAction": ANY,
    },
}
AZURE = {
    "azure_arm_parameters": {
        **dict.fromkeys(("vmSize", "imagePublisher", "imageOffer", "imageSku", "imageVersion", "osDiskSize")),
        **dict.fromkeys(("priority", "evictionPolicy", "availability_zone")),
        "billingProfile": {"maxPrice": ANY},
    }
}
PROVIDER = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips"},
    "gcp": {"type", "project_id", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"},
    "azure": {"type", "location", "resource_group", "subnet_mask", "use_internal_ips", "cache_stopped_nodes"},
    "local": {"type", "head_ip", "worker_ips"},
}
NODE = {"aws": AWS, "gcp": GCP, "azure": AZURE, "local": {}}
NEEDED = {
    "aws": {"InstanceType", "ImageId", "SecurityGroupIds"},  # Ray's default security group opens port 22
    "gcp": {"machineType", "disks", "networkInterfaces"},
    "azure": {"azure_arm_parameters"},
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def unknown_keys(value: Any, schema: Any, path: str) -> list[str]:
    """Return a message for every key in `value` that is not in `schema` (the fields of a cloud provider)."""
    if isinstance(value, dict) and isinstance(schema, dict):
        messages = [f"{path}.{key}: no such field" for key in value if key not in schema]
        for key in value.keys() & schema.keys():
            messages += unknown_keys(value[key], schema[key], f"{path}.{key}")
        return messages
    if isinstance(value, list) and isinstance(schema, list):
        return [m for i, inner in enumerate(value) for m in unknown_keys(inner, schema[0], f"{path}.{i}")]
    return [] if schema is ANY or not isinstance(value, dict | list) else [f"{path}: has another shape"]


def mistakes(document: dict[str, Any]) -> list[str]:
    """Return a message for every mistake that Ray itself does not report in a file for `ray up`."""
    kind = document["provider"]["type"]
    messages = problems(document) + unknown_keys(document["provider"], dict.fromkeys(PROVIDER[kind]), "provider")
    for name, node in document.get("available_node_types", {}).items():
        messages += unknown_keys(node["node_config"], NODE[kind], name)
        messages += [f"{name}: {key} is missing" for key in NEEDED[kind] - node["node_config"].keys()]
        if name != document["head_node_type"] and node.get("min_workers", 0) != 0:
            messages.append(f"{name}: min_workers must be 0, because idle machines cost money")
    if kind in ("gcp", "azure") and not document["provider"].get("use_internal_ips"):
        messages.append("provider.use_internal_ips: machines would have public addresses with port 22 open")
    head, worker = document["head_start_ray_commands"][-1], document["worker_start_ray_commands"][-1]
    messages += [f"{c.split()[0]}: no token" for c in (head, worker) if "RAY_AUTH_MODE=token ray start" not in c]
    messages += [] if "--dashboard-host=127.0.0.1" in head else ["head node: --dashboard-host is missing"]
    messages += [] if "--num-cpus=0" in head else ["head node: --num-cpus=0 is missing, so Ray would run tasks there"]
    messages += [] if "~/.ray/auth_token" in document["file_mounts"] else ["file_mounts: no token for the nodes"]
    setup = document["setup_commands"]
    installs = f'"ray[default,train,tune,data]=={RAY}" ~/rmdd'
    messages += [] if any(installs in c for c in setup) else ["setup_commands: the tested Ray is not installed"]
    messages += [] if any("/mnt/rmdd" in c for c in setup) else ["setup_commands: no shared storage at /mnt/rmdd"]
    return messages


def prepared(document: dict[str, Any]) -> dict[str, Any]:
    util = pytest.importorskip("ray.autoscaler._private.util")  # Ray has no public check that works without a cloud
    full = util.prepare_config(copy.deepcopy(document))
    util.validate_config(full)
    return full


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_ray_accepts_each_file_and_it_has_no_mistakes(path: Path) -> None:
    document = read(path)
    full = prepared(document)
    assert mistakes(document) == []
    hosts = len(document["provider"].get("worker_ips", []))  # on-premise machines all join at the start
    assert {node["min_workers"] for node in full["available_node_types"].values()} == {hosts}
    commands = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in full[key]]
    assert not [c for c in commands if "0.0.0.0" in c] and "3.0.0.dev" not in str(full)


def test_every_cloud_has_a_file_with_spot_workers() -> None:
    assert [p.stem for p in FILES] == ["aws", "azure", "gcp", "onprem"]
    spot = {"aws": "MarketType", "azure": "priority", "gcp": "provisioningModel"}
    for cloud, key in spot.items():
        document = read(CLUSTERS / f"{cloud}.yaml")
        spot_types = {path[1] for path, value in leaves(document) if path[-1] == key and str(value).lower() == "spot"}
        assert "gpu_spot" in spot_types and document["head_node_type"] not in spot_types


def at(document: dict[str, Any], path: str) -> tuple[Any, Any]:
    *parents, last = path.split("/")
    for key in parents:
        document = document[int(key) if isinstance(document, list) else key]
    return document, int(last) if isinstance(document, list) else last


@pytest.mark.parametrize(
    ("cloud", "path", "value", "words"),
    [
        ("aws", "provider/regoin", "us-west-2", "provider.regoin: no such field"),
        ("aws", "available_node_types/gpu_spot/node_config/InstnceType", "g6.2xlarge", "InstnceType: no such field"),
        ("aws", "available_node_types/gpu_spot/node_config/BlockDeviceMappings/0/Ebs/Size", 5, "Ebs.Size: no such"),
        ("aws", "available_node_types/gpu_spot/min_workers", 1, "idle machines cost money"),
        ("aws", "available_node_types/head/node_config/SecurityGroupIds", ..., "SecurityGroupIds is missing"),
        (
            "aws",
            "provider/security_group",
            {"GroupName": "g", "IpPermissions": [{"CidrIp": "0.0.0.0/0"}]},
            "a port open",
        ),
        (
            "aws",
            "head_start_ray_commands/1",
            "RAY_AUTH_MODE=token ray start --head --num-cpus=0",
            "--dashboard-host is missing",
        ),
        ("aws", "head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0", "on all interfaces"),
        ("aws", "worker_start_ray_commands/1", "ray start --address=$RAY_HEAD_IP:6379", "no token"),
        ("aws", "setup_commands/0", "export AWS_ACCESS_KEY_ID=AKIAABCDEFGHIJKLMNOP", "a credential"),
        ("aws", "setup_commands/0", "WANDB_API_KEY=0123abcd rmdd run demo", "a credential"),
        ("aws", "provider/aws_credentials", {"aws_secret_access_key": "abcd"}, "a credential"),
        ("aws", "setup_commands/0", "~/venv/bin/pip install -U ray", "ray is not pinned"),
        ("aws", "head_setup_commands/0", "pip install 'boto3>=1'", "boto3>=1 is not pinned"),
        ("aws", "docker", {"image": "rayproject/ray:latest-gpu"}, "is not pinned"),
        ("aws", "docker", {"image": "rayproject/ray"}, "is not pinned"),
        ("aws", "file_mounts", {"~/rmdd": "."}, "no token for the nodes"),
        ("gcp", "provider/use_internal_ips", False, "public addresses"),
        ("gcp", "available_node_types/head/node_config/networkInterfaces/0/accessConfigs", [], "no such field"),
        ("gcp", "available_node_types/gpu_spot/node_config/scheduling", [{"preemptible": True}], "another shape"),
        ("azure", "available_node_types/head/node_config/azure_arm_parameters/imageVersion", "latest", "not pinned"),
        ("azure", "available_node_types/head/node_config/azure_arm_parameters/vmsize", "D2", "no such field"),
        ("onprem", "provider/worker_ip", [], "provider.worker_ip: no such field"),
    ],
)
def test_mistakes_that_ray_does_not_report_are_found(cloud: str, path: str, value: Any, words: str) -> None:
    document = copy.deepcopy(read(CLUSTERS / f"{cloud}.yaml"))  # this also copies node types shared by a YAML anchor
    holder, key = at(document, path)
    if value is ...:
        del holder[key]
    else:
        holder[key] = value
    assert any(words in line for line in mistakes(document)), mistakes(document)


@pytest.mark.parametrize("change", [{"setup_command": []}, {"max_workers": "8"}, {"head_node_type": "haed"}])
def test_the_check_of_ray_rejects_wrong_fields(change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="setup_command|'8'|head_node_type"):
        prepared(read(CLUSTERS / "aws.yaml") | change)


def test_all_files_use_the_tested_version_of_ray() -> None:
    import ray

    assert f"Tested with ray {RAY}," in (ROOT / "pyproject.toml").read_text() and ray.__version__ == RAY
