"""The Dockerfile against the checkout: what it copies, installs, opens and asks exists."""

import json
import re
import tomllib
from typing import Any
from urllib.parse import urlsplit

from packaging.specifiers import SpecifierSet

from service.api.health import router
from service.exposure import exposure_problems
from service.settings import Settings
from tests.deploy.files import ROOT, image_environment, instructions


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _copied_files() -> list[str]:
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and "--from=" not in rest]
    return [source for words in copies for source in words[:-1]]


def test_the_image_has_a_python_that_the_project_allows() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert set(bases) == {"python:${PYTHON_VERSION}-slim-bookworm"}
    assert SpecifierSet(_project()["requires-python"]).contains(arguments["PYTHON_VERSION"])


def test_everything_that_is_copied_exists_and_is_let_into_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    copied = _copied_files()
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore


def test_everything_that_the_package_is_built_from_is_copied() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {*build["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], _project()["readme"]}
    assert needed | set(_project()["license-files"]) | {"pyproject.toml", "constraints.txt"} == set(_copied_files())


def test_only_extras_that_exist_are_installed_and_all_installs_are_constrained() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert all("-c constraints.txt" in line for line in installs)
    (extras,) = [found[1].split(",") for line in installs if (found := re.search(r"'\.\[([\w,]+)\]'", line))]
    assert set(extras) == {"service", "ray", "data"}
    assert set(extras) <= set(_project()["optional-dependencies"])


def test_the_port_is_the_services_port() -> None:
    port = Settings.model_fields["port"].default
    assert [rest for word, rest in instructions() if word == "EXPOSE"] == [str(port)]
    assert image_environment()["SYNCBN_PORT"] == str(port)


def test_the_health_check_asks_a_route_that_exists() -> None:
    (check,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    command = json.loads(check.partition("CMD ")[2])
    compile(command[2], "healthcheck", "exec")
    url = urlsplit(re.findall(r"'(http.*?)'", command[2])[0])
    assert url.port == Settings.model_fields["port"].default
    assert url.path in {getattr(route, "path", None) for route in router.routes}


def test_the_command_is_one_that_the_project_installs() -> None:
    command = json.loads(instructions()[-1][1])
    assert instructions()[-1][0] == "CMD"
    assert command[0] in _project()["scripts"]


def test_the_image_runs_without_rights_in_folders_of_its_own() -> None:
    (user,) = [rest for word, rest in instructions() if word == "USER"]
    assert user == "1000:1000"
    (volumes,) = [json.loads(rest) for word, rest in instructions() if word == "VOLUME"]
    image = image_environment()
    assert volumes == [image["SYNCBN_DATA_DIR"], image["SYNCBN_STORAGE"]]
    (prepare,) = [rest for word, rest in instructions() if word == "RUN" and "chown" in rest]
    assert all(volume in prepare.partition("chown")[2] for volume in volumes)


def test_the_image_as_it_is_listens_further_than_loopback_and_brings_no_token() -> None:
    """That makes the service refuse to start until a token is given, and word on TLS."""
    image = image_environment()
    fields = {name.removeprefix("SYNCBN_").lower(): value for name, value in image.items() if name[:7] == "SYNCBN_"}
    settings = Settings.model_validate(fields)
    assert not settings.loopback
    assert len(exposure_problems(settings, keys_made=False)) == 2
    assert "SYNCBN_API_TOKEN" not in image
