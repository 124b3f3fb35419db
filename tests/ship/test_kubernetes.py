"""The manifests: valid for Kubernetes' own schemas, plain and with the GPU patch, and in step with the server."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.access.policy import POLICY
from adaplex_server.settings import load_settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
BASE = FOLDER / "base"
Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def plain() -> list[Manifest]:
    (kustomization,) = read(BASE / "kustomization.yaml")
    manifests = [one for name in kustomization["resources"] for one in read(BASE / name)]
    config = kustomization["configMapGenerator"][0]
    data = {name: (BASE / name).read_text() for name in config["files"]}
    return [*manifests, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": config["name"]}, "data": data}]


def patched(manifest: Manifest, operations: list[dict[str, Any]]) -> Manifest:
    """JSON patch (RFC 6902), the two operations that are used; a replaced field must be there."""
    made = copy.deepcopy(manifest)
    for one in operations:
        *way, last = one["path"].strip("/").split("/")
        place: Any = made
        for step in way:
            place = place[int(step)] if isinstance(place, list) else place[step]
        if isinstance(place, list):
            assert (one["op"], last) == ("add", "-")
            place.append(one["value"])
        else:
            assert one["op"] == "add" or last in place, one["path"]
            place[last] = one["value"]
    return made


def with_gpus() -> list[Manifest]:
    (kustomization,) = read(FOLDER / "gpu" / "kustomization.yaml")
    (patch,) = kustomization["patches"]
    operations = yaml.safe_load((FOLDER / "gpu" / patch["path"]).read_text())
    found = [one for one in plain() if (one["kind"], one["metadata"]["name"]) == tuple(patch["target"].values())]
    assert len(found) == 1
    return [patched(one, operations) if one == found[0] else one for one in plain()]


BOTH = pytest.mark.parametrize("manifests", [plain(), with_gpus()], ids=["plain", "gpu"])


def the(manifests: list[Manifest], kind: str, name: str = "adaplex") -> Any:
    (found,) = [one for one in manifests if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


@BOTH
def test_kubernetes_would_take_them(manifests: list[Manifest]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for one in manifests:
        for version in ("1.30", validate.latest_version()):
            validate.validate(one, version, strict=True)


@pytest.mark.parametrize(("folder", "manifests"), [(FOLDER, plain()), (FOLDER / "gpu", with_gpus())])
def test_kubectl_builds_them(folder: Path, manifests: list[Manifest]) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not there")
    built = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60)
    made = list(yaml.safe_load_all(built.stdout))
    assert sorted(one["kind"] for one in made) == sorted(one["kind"] for one in manifests)
    server = the(made, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    tag = "cpu" if folder == FOLDER else "cuda"
    ours = the(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert server["image"].endswith(f":{tag}") and server["resources"] == ours["resources"]


def test_a_wrong_manifest_would_be_seen() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for path, value in (("/spec/replicas", "two"), ("/spec/template/spec/containers/0/livenesProbe", {})):
        wrong = patched(the(plain(), "StatefulSet"), [{"op": "add", "path": path, "value": value}])
        with pytest.raises(validate.ValidationError):
            validate.validate(wrong, "1.30", strict=True)


@BOTH
def test_a_pod_may_do_little(manifests: list[Manifest]) -> None:
    pod = the(manifests, "StatefulSet")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    for container in (*pod["initContainers"], *pod["containers"]):
        allowed = container["securityContext"]
        assert (allowed["allowPrivilegeEscalation"], allowed["readOnlyRootFilesystem"]) == (False, True)
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} <= container["resources"].keys() or "nvidia.com/gpu" in str(container)


@BOTH
def test_every_mounted_volume_is_there(manifests: list[Manifest]) -> None:
    spec = the(manifests, "StatefulSet")["spec"]
    pod = spec["template"]["spec"]
    volumes = {one["name"] for one in (*pod["volumes"], *(claim["metadata"] for claim in spec["volumeClaimTemplates"]))}
    containers = (*pod["initContainers"], *pod["containers"])
    assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == volumes
    (config,) = [one["configMap"]["name"] for one in pod["volumes"] if "configMap" in one]
    assert the(manifests, "ConfigMap", config)


@BOTH
def test_probes_and_ports_are_the_servers(manifests: list[Manifest]) -> None:
    spec = the(manifests, "StatefulSet")["spec"]
    (server,) = spec["template"]["spec"]["containers"]
    ports = {one["name"]: one["containerPort"] for one in server["ports"]}
    asked = [server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert [one["path"] for one in asked] == ["/health", "/health", "/ready"]
    assert all(POLICY[f"GET {one['path']}"] == "nothing" and one["port"] in ports for one in asked)
    services = [one for one in manifests if one["kind"] == "Service"]
    for service in services:
        assert {one["targetPort"]: one["port"] for one in service["spec"]["ports"]} == ports
        assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert spec["serviceName"] in {one["metadata"]["name"] for one in services}
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    assert f"EXPOSE {ports['http']} {ports['grpc']}" in dockerfile
    assert f"USER {spec['template']['spec']['securityContext']['runAsUser']}:" in dockerfile


@BOTH
def test_the_settings_are_known_and_leave_time_to_drain(manifests: list[Manifest]) -> None:
    spec = the(manifests, "StatefulSet")["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    environment = {one["name"]: one["value"] for one in server["env"]}
    config = environment.pop("ADAPLEX_CONFIG")
    assert Path(config).parent in [Path(one["mountPath"]) for one in server["volumeMounts"]]
    given = tomllib.loads(the(manifests, "ConfigMap", "adaplex-config")["data"][Path(config).name])
    settings = load_settings(BASE / Path(config).name, environment, {})
    assert given
    pause = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + settings.drain_seconds + 10 < spec["terminationGracePeriodSeconds"]
    assert HttpSettings().drain == settings.drain_seconds


def test_the_routes_of_the_inference_gateway_are_served() -> None:
    pool, route = read(FOLDER / "inference-gateway" / "pool.yaml")
    labels = the(plain(), "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    paths = [match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]]
    assert all(any(known.endswith(f" {path}") for known in POLICY) for path in paths)
    backends = {one["name"] for rule in route["spec"]["rules"] for one in rule["backendRefs"]}
    assert backends == {pool["metadata"]["name"]} == {"adaplex"}


def test_the_notes_name_what_is_there() -> None:
    notes = (FOLDER / "README.md").read_text()
    for name in re.findall(r"ADAPLEX_([A-Z_]+)", notes):
        assert name.lower() in {
            *load_settings(None, {}, {}).model_fields_set,
            *type(load_settings(None, {}, {})).model_fields,
        }
    for path in re.findall(r"`(/[a-z]+)`", notes):
        assert path == "/data" or f"GET {path}" in POLICY
