"""Reads the deployment files as data: Dockerfile instructions, manifests, pinned versions."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
README = DEPLOY / "README.md"
RAY_YAML = DEPLOY / "ray" / "cluster.yaml"
KUBERAY = DEPLOY / "kuberay"


def texts() -> dict[str, str]:
    """Every file below deploy/ by its path from there."""
    return {str(path.relative_to(DEPLOY)): path.read_text() for path in sorted(DEPLOY.rglob("*")) if path.is_file()}


def manifest(kind: str) -> Any:
    """The one Kubernetes object of that kind."""
    (found,) = manifests(kind)
    return found


def manifests(kind: str | None = None) -> list[Any]:
    """All Kubernetes objects, of one kind or of any."""
    found = [doc for path in sorted(KUBERAY.glob("*.yaml")) for doc in yaml.safe_load_all(path.read_text())]
    return [doc for doc in found if kind in (None, doc["kind"])]


def pod_specs() -> dict[str, Any]:
    """Every pod that the manifests start, by a name of its own."""
    cluster, deployment = manifest("RayCluster")["spec"], manifest("Deployment")["spec"]
    groups = {f"ray {g['groupName']}": g["template"]["spec"] for g in cluster["workerGroupSpecs"]}
    service = deployment["template"]["spec"]
    return {"ray head": cluster["headGroupSpec"]["template"]["spec"], "service": service, **groups}


def environment(pod_spec: Any) -> dict[str, Any]:
    """The variables of the pod's only container: a literal string, or where the value is taken from."""
    (container,) = pod_spec["containers"]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def mounts(pod_spec: Any) -> dict[str, str]:
    """Mount path to claim, for the volumes that are claims."""
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"]
        for v in pod_spec["volumes"]
        if len(v) == 2 and "persistentVolumeClaim" in v
    }
    (container,) = pod_spec["containers"]
    return {m["mountPath"]: claims[m["name"]] for m in container["volumeMounts"] if m["name"] in claims}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def image_environment() -> dict[str, str]:
    """The variables that the final image sets."""
    pairs = [pair for word, rest in instructions() if word == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"{package} is not pinned"
    return found[1]
