"""The Ray cluster file and what manifests say to Ray, held against the installed Ray."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from tests.deploy.files import RAY_YAML, environment, manifest, pinned, pod_specs, texts


def _ray_folder() -> Path:
    spec = importlib.util.find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("ray is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _ray_constant(name: str) -> int:
    module = ast.parse((_ray_folder() / "_private" / "ray_constants.py").read_text())
    (value,) = [
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]
    ]
    found = ast.literal_eval(value)
    assert isinstance(found, int)
    return found


def _start_commands() -> list[list[str]]:
    config = yaml.safe_load(RAY_YAML.read_text())
    lines = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    return [shlex.split(line.rpartition(";")[2]) for line in lines]


def test_the_cluster_file_follows_the_schema_in_rays_package() -> None:
    schema = json.loads((_ray_folder() / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(RAY_YAML.read_text()))


def test_every_option_of_ray_start_exists() -> None:
    source = (_ray_folder() / "scripts" / "scripts.py").read_text()
    groups = [manifest("RayCluster")["spec"]["headGroupSpec"], *manifest("RayCluster")["spec"]["workerGroupSpecs"]]
    options = [f"--{name}" for group in groups for name in group["rayStartParams"]]
    options += [word.partition("=")[0] for command in _start_commands() for word in command if word.startswith("--")]
    assert {"--head", "--address", "--num-cpus"} <= set(options)
    assert [option for option in options if f'"{option}"' not in source] == []


def test_ray_is_one_version_everywhere() -> None:
    version = pinned("ray")
    assert manifest("RayCluster")["spec"]["rayVersion"] == version
    tags = {name: set(re.findall(r"syncbn:ray-([\d.]+\d)", text)) for name, text in texts().items()}
    assert {name: found for name, found in tags.items() if found - {version}} == {}
    assert {name for name, found in tags.items() if found} == {
        "README.md", "docker/Dockerfile", "kuberay/raycluster.yaml", "kuberay/service.yaml",
    }  # fmt: skip
    assert f"Ray ({version}" in texts()["README.md"]


def test_every_pod_runs_the_same_image() -> None:
    assert {c["image"] for spec in pod_specs().values() for c in spec["containers"]} == {f"syncbn:ray-{pinned('ray')}"}


def test_the_job_server_is_asked_at_rays_port() -> None:
    port = _ray_constant("DEFAULT_DASHBOARD_PORT")
    address = urlsplit(str(environment(pod_specs()["service"])["SYNCBN_RAY_ADDRESS"]))
    assert (address.hostname, address.port) == (f"{manifest('RayCluster')['metadata']['name']}-head-svc", port)
    head_ports = {p["name"]: p["containerPort"] for p in pod_specs()["ray head"]["containers"][0]["ports"]}
    assert head_ports["dashboard"] == port
    assert [rule["ports"] for rule in manifest("NetworkPolicy")["spec"]["ingress"] if "ports" in rule] == [
        [{"port": port, "protocol": "TCP"}]
    ]
    assert any(f"--dashboard-port={port}" in command for command in _start_commands())
    assert f"SYNCBN_RAY_ADDRESS=http://127.0.0.1:{port}" in texts()["README.md"]


def test_probes_ask_the_agent_at_rays_port_and_path() -> None:
    port = _ray_constant("DEFAULT_DASHBOARD_AGENT_LISTEN_PORT")
    source = (_ray_folder() / "dashboard" / "modules" / "reporter" / "healthz_agent.py").read_text()
    for name, spec in pod_specs().items():
        if name != "service":
            for probe in ("readinessProbe", "livenessProbe"):
                asked = spec["containers"][0][probe]["httpGet"]
                assert asked["port"] == port
                assert f'@routes.get("{asked["path"]}")' in source


def test_every_ray_node_wants_a_token() -> None:
    for name, spec in pod_specs().items():
        if name != "service":
            assert environment(spec)["RAY_AUTH_MODE"] == "token"
            assert environment(spec)["RAY_AUTH_TOKEN"] == environment(pod_specs()["service"])["SYNCBN_RAY_TOKEN"]
    config = yaml.safe_load(RAY_YAML.read_text())
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


def test_objects_fit_into_shared_memory() -> None:
    cluster = manifest("RayCluster")["spec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (shared,) = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if "emptyDir" in v]
        assert shared == {"medium": "Memory", "sizeLimit": "1Gi"}
        assert int(group["rayStartParams"]["object-store-memory"]) < 2**30
