"""The manifests against each other and against the service's settings."""

from typing import Any

import pytest

from service.api.health import router
from service.exposure import exposure_problems
from service.settings import Settings
from tests.deploy.files import (
    README,
    environment,
    image_environment,
    manifest,
    manifests,
    mounts,
    pod_specs,
)


def _settings(variables: dict[str, Any]) -> Settings:
    """What the service would read; values that come from a Secret are stood in for by a word."""
    fields = {
        name.removeprefix("SYNCBN_").lower(): value if isinstance(value, str) else "a-word-from-a-secret"
        for name, value in variables.items()
    }
    return Settings.model_validate(fields)


def test_every_object_has_what_kubernetes_asks_of_any() -> None:
    kinds = [doc["kind"] for doc in manifests()]
    assert sorted(kinds) == sorted(
        ["Deployment", "NetworkPolicy", "PersistentVolumeClaim", "PersistentVolumeClaim", "RayCluster", "Service"]
    )
    assert all(doc["apiVersion"] and doc["metadata"]["name"] and doc["spec"] for doc in manifests())
    assert len({(doc["kind"], doc["metadata"]["name"]) for doc in manifests()}) == len(kinds)


def test_the_services_variables_are_settings_that_it_accepts() -> None:
    variables = environment(pod_specs()["service"])
    settings = _settings(variables)
    assert settings.api_token is not None
    assert not settings.loopback
    assert exposure_problems(settings, keys_made=False) == []
    assert settings.port == Settings.model_fields["port"].default
    assert str(settings.data_dir) == variables["SYNCBN_DATA_DIR"] == image_environment()["SYNCBN_DATA_DIR"]


def test_runners_reach_the_service_at_its_address_in_the_cluster() -> None:
    service = manifest("Service")
    port = service["spec"]["ports"][0]["port"]
    assert environment(pod_specs()["service"])["SYNCBN_PUBLIC_URL"] == f"http://{service['metadata']['name']}:{port}"
    (opened,) = pod_specs()["service"]["containers"][0]["ports"]
    assert opened["containerPort"] == port == Settings.model_fields["port"].default
    assert service["spec"]["ports"][0]["targetPort"] == opened["name"]


def test_a_service_that_is_not_ready_still_takes_in_reports() -> None:
    assert manifest("Service")["spec"]["publishNotReadyAddresses"] is True


def test_selectors_find_the_pods_they_mean() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    selected = manifest("Service")["spec"]["selector"]
    assert selected == manifest("Deployment")["spec"]["selector"]["matchLabels"]
    assert selected.items() <= labels.items()
    policy = manifest("NetworkPolicy")["spec"]
    own = {"matchLabels": {"ray.io/cluster": manifest("RayCluster")["metadata"]["name"]}}
    assert policy["podSelector"] == own
    assert [rule["from"][0]["podSelector"] for rule in policy["ingress"]] == [own, {"matchLabels": selected}]


def test_checkpoints_lie_under_one_path_everywhere() -> None:
    storage = environment(pod_specs()["service"])["SYNCBN_STORAGE"]
    assert storage == image_environment()["SYNCBN_STORAGE"]
    claims = {doc["metadata"]["name"]: doc["spec"]["accessModes"] for doc in manifests("PersistentVolumeClaim")}
    for spec in pod_specs().values():
        assert mounts(spec)[storage] == "syncbn-storage"
        assert set(mounts(spec).values()) <= set(claims)
    assert claims["syncbn-storage"] == ["ReadWriteMany"]


def test_the_database_belongs_to_one_pod() -> None:
    data_dir = environment(pod_specs()["service"])["SYNCBN_DATA_DIR"]
    assert mounts(pod_specs()["service"])[data_dir] == "syncbn-data"
    assert [name for name, spec in pod_specs().items() if "syncbn-data" in mounts(spec).values()] == ["service"]
    deployment = manifest("Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")


@pytest.mark.parametrize("name", ["service", "ray head", "ray cpu"])
def test_pods_have_no_rights_and_no_variables_that_look_like_settings(name: str) -> None:
    """A Service named syncbn would otherwise set SYNCBN_PORT to an address."""
    spec = pod_specs()[name]
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 1000
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["limits"]["memory"]


def test_the_services_probes_ask_routes_that_exist() -> None:
    (container,) = pod_specs()["service"]["containers"]
    asked = {probe: container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")}
    assert asked == {"livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert set(asked.values()) <= {getattr(route, "path", None) for route in router.routes}


def test_every_secret_is_one_that_the_readme_makes() -> None:
    text = README.read_text()
    for spec in pod_specs().values():
        for value in environment(spec).values():
            if not isinstance(value, str):
                wanted = value["secretKeyRef"]
                assert f"secret generic {wanted['name']} --from-literal={wanted['key']}=" in text
