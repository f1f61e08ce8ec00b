"""What the deployment files say in words: variables that exist, no secrets, links that lead somewhere."""

import re

import pytest

from service.settings import ClientSettings, Settings
from tests.deploy.files import DEPLOY, README, environment, pod_specs, texts

_VARIABLES = {f"SYNCBN_{name.upper()}" for model in (Settings, ClientSettings) for name in model.model_fields}


@pytest.mark.parametrize("name", sorted(texts()))
def test_every_variable_that_is_named_exists(name: str) -> None:
    assert set(re.findall(r"\bSYNCBN_\w+", texts()[name])) <= _VARIABLES


def test_the_readme_explains_every_variable() -> None:
    assert set(re.findall(r"^\| `(SYNCBN_\w+)` \|", README.read_text(), re.MULTILINE)) == _VARIABLES


def test_the_defaults_in_the_readme_are_the_services() -> None:
    said = dict(re.findall(r"^\| `SYNCBN_(\w+)` \| `(.+?)` \|", README.read_text(), re.MULTILINE))
    fields = {**Settings.model_fields, **ClientSettings.model_fields}
    assert said == {name: str(fields[name.lower()].default).rstrip("/") for name in said}
    assert set(said) == {"DATA_DIR", "HOST", "PORT", "URL"}


def test_secrets_enter_by_reference_alone() -> None:
    for spec in pod_specs().values():
        for name, value in environment(spec).items():
            if re.search("TOKEN|SECRET|PASSWORD|KEY", name):
                assert set(value) == {"secretKeyRef"}


@pytest.mark.parametrize("name", sorted(texts()))
def test_nothing_looks_like_a_secret(name: str) -> None:
    text = texts()[name]
    assert "kind: Secret" not in text
    assert "PRIVATE KEY" not in text
    assert re.findall(r"\b[0-9a-fA-F]{32,}\b|\b[A-Za-z0-9+]{40,}={0,2}", text) == []
    assigned = re.findall(r"(?:TOKEN|token|PASSWORD|password)=(\S+)", text)
    assert [value for value in assigned if not value.startswith(('"$(', "...`"))] == []


def test_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (DEPLOY / link).exists()] == []


def test_paths_that_commands_name_exist() -> None:
    paths = set(re.findall(r"\bdeploy/[\w./-]+\w", "\n".join(texts().values())))
    assert paths
    assert [path for path in paths if not (DEPLOY.parent / path).exists()] == []
