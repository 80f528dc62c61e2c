"""Test the manifests of `clusters/kuberay` and the Dockerfile: fields, versions, shared storage, no open ports."""

import copy
import itertools
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cluster_files import CLUSTERS, RAY, ROOT, problems
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

FILES = sorted((CLUSTERS / "kuberay").glob("*.yaml"))
DOCKERFILE = (CLUSTERS / "Dockerfile").read_text(encoding="utf-8")
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def of(*required: str, **fields: Any) -> dict[str, Any]:
    """Return the JSON schema of an object that has only the given `fields`; the fields in `required` must exist."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


WORDS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = of(
    "name",
    "image",
    "resources",
    name=TEXT,
    image=TEXT,
    resources=of("requests", "limits", requests=WORDS, limits=WORDS),
    volumeMounts=many(of("name", "mountPath", name=TEXT, mountPath=TEXT)),
)
VOLUME = of(
    "name",
    name=TEXT,
    persistentVolumeClaim=of("claimName", claimName=TEXT),
    emptyDir=of(medium={"enum": ["Memory"]}, sizeLimit=TEXT),
)
POD = of(
    "containers",
    "volumes",
    "securityContext",
    securityContext=of(
        "runAsNonRoot", runAsNonRoot={"const": True}, runAsUser={"type": "integer", "minimum": 1}, fsGroup=COUNT
    ),
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=WORDS,
    tolerations=many(of("key", "operator", key=TEXT, operator=TEXT, value=TEXT, effect=TEXT)),
    containers=many(CONTAINER),
    volumes=many(VOLUME),
)
TEMPLATE = of("spec", spec=POD)
CLUSTER = of(
    "rayVersion",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
    rayVersion={"const": RAY},
    authOptions=of("mode", mode={"const": "token"}),
    enableInTreeAutoscaling={"const": True},
    autoscalerOptions=of(idleTimeoutSeconds=COUNT),
    headGroupSpec=of(
        "rayStartParams",
        "template",
        serviceType={"const": "ClusterIP"},
        rayStartParams=of("num-cpus", **{"num-cpus": {"const": "0"}}),
        template=TEMPLATE,
    ),
    workerGroupSpecs=many(
        of(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=TEXT,
            minReplicas={"const": 0},
            replicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=WORDS,
            template=TEMPLATE,
        )
    ),
)
JOB = of(
    "entrypoint",
    "rayClusterSpec",
    "shutdownAfterJobFinishes",
    "activeDeadlineSeconds",
    entrypoint=TEXT,
    rayClusterSpec=CLUSTER,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    runtimeEnvYAML=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes={"const": True},
    ttlSecondsAfterFinished=COUNT,
)
CLAIM = of(
    "accessModes",
    "resources",
    accessModes={"const": ["ReadWriteMany"]},
    storageClassName=TEXT,
    resources=of("requests", requests=of("storage", storage=TEXT)),
)
KINDS = {
    "RayCluster": ("ray.io/v1", CLUSTER),
    "RayJob": ("ray.io/v1", JOB),
    "PersistentVolumeClaim": ("v1", CLAIM),
}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


ALL = [(p.stem, document) for p in FILES for document in documents(p)]
RUN = next(document for _, document in ALL if document["kind"] == "RayJob")
CLUSTER_SPECS = [d["spec"].get("rayClusterSpec", d["spec"]) for _, d in ALL if d["kind"].startswith("Ray")]


def check(document: dict[str, Any]) -> None:
    version, spec = KINDS[document["kind"]]
    named = of("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"})
    schema = of("apiVersion", "kind", "metadata", "spec", apiVersion={"const": version}, kind=TEXT, metadata=named)
    schema["properties"]["spec"] = spec
    jsonschema.validate(document, schema)


@pytest.mark.parametrize(("file", "document"), ALL, ids=lambda v: v if isinstance(v, str) else v["kind"])
def test_each_manifest_is_valid_and_opens_no_port(file: str, document: dict[str, Any]) -> None:
    check(document)
    assert problems(document) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplica=3),
        lambda d: d["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplicas="8"),
        lambda d: d["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=1),
        lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template"),
        lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"),
        lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(hostNetwork=True),
        lambda d: d["spec"]["rayClusterSpec"].update(authOptions={"mode": "disabled"}),
        lambda d: d["spec"]["rayClusterSpec"].update(rayVersion="2.59.0"),
        lambda d: d["spec"].update(entryPoint="python jobs/run.py"),
        lambda d: d.update(apiVersion="ray.io/v1alpha1"),
    ],
)
def test_the_schema_rejects_broken_manifests(break_it: Any) -> None:
    document = copy.deepcopy(RUN)
    break_it(document)
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_open_ports_and_unpinned_images_are_reported() -> None:
    document = copy.deepcopy(RUN)
    head = document["spec"]["rayClusterSpec"]["headGroupSpec"]
    head["rayStartParams"]["dashboard-host"] = "0.0.0.0"
    head["serviceType"] = "NodePort"
    head["template"]["spec"]["containers"][0] |= {"image": "registry.example.com/rmdd", "env": [{"password": "abc"}]}
    assert len(problems(document)) == 4


def strict(schema: Any) -> Any:
    """Return a copy of `schema` (of a Kubernetes resource definition) that rejects all fields it does not define."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        result = {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
        if "metadata" in schema["properties"]:
            result["properties"]["metadata"] = {"type": "object"}
    return result


@pytest.mark.parametrize("document", [d for _, d in ALL if d["kind"].startswith("Ray")], ids=lambda d: d["kind"])
def test_the_manifests_match_the_resource_definitions_of_kuberay(document: dict[str, Any]) -> None:
    if not (folder := os.environ.get("RMDD_KUBERAY_CRDS")):
        pytest.skip("set RMDD_KUBERAY_CRDS to the folder of KubeRay's ray.io_rayclusters.yaml and ray.io_rayjobs.yaml")
    definition = yaml.safe_load((Path(folder) / f"ray.io_{document['kind'].lower()}s.yaml").read_text())
    (served,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.validate(document, strict(served["schema"]["openAPIV3Schema"]))


@pytest.mark.parametrize("spec", CLUSTER_SPECS, ids=["cluster", "job"])
def test_pods_share_storage_and_one_image(spec: dict[str, Any]) -> None:
    pods = [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    claims = {d["metadata"]["name"] for _, d in ALL if d["kind"] == "PersistentVolumeClaim"}
    images = {c["image"] for pod in pods for c in pod["containers"]}
    assert len(images) == 1 and f"-t {images.pop()} ." in DOCKERFILE
    for pod in pods:
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for c in pod["containers"] for m in c["volumeMounts"]}
        assert mounts["/mnt/rmdd"]["persistentVolumeClaim"]["claimName"] in claims
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_the_job_starts_a_script_of_the_image_with_a_valid_run() -> None:
    from rmdd import config

    words = shlex.split(RUN["spec"]["entrypoint"])
    home = re.search(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[1]
    file = Path(words[1]).relative_to(home)
    assert words[0] == "python" and (ROOT / file).is_file() and f" {file.parts[0]} {file.parts[0]}\n" in DOCKERFILE
    changes = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    run = config.load(words[words.index("--config") + 1], changes)
    assert run.runtime.storage.startswith("/mnt/rmdd/") and run.runtime.workers
    assert int(yaml.safe_load(RUN["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_the_image_pins_the_tested_ray_and_does_not_run_as_root() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {r.name: r for r in map(Requirement, project["dependencies"])}
    base = re.search(r"^FROM rayproject/ray:([\d.]+)-py(\d)(\d+)-cpu$", DOCKERFILE, re.MULTILINE)
    installed = Requirement(re.search(r'pip install --no-cache-dir "([^"]+)" \.\n', DOCKERFILE)[1])
    assert base[1] == RAY and str(installed.specifier) == f"=={RAY}" and installed.extras == needs["ray"].extras
    assert RAY in needs["ray"].specifier and f"{base[2]}.{base[3]}" in SpecifierSet(project["requires-python"])
    assert problems({"image": re.search(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)[1], "run": DOCKERFILE}) == []
    assert re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE) == ["ray"]
    copied = re.findall(r"^COPY --chown=1000:100 (.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert all((ROOT / name).exists() for names in copied for name in names.split())
