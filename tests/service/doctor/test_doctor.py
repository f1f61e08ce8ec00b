"""The set-up mistakes that are made most often, each made for real, and what the doctor says of it."""

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from service.doctor import Finding, examine
from service.settings import ClientSettings, Settings
from service.store import JobStore
from tests.postgresql import PostgresServer
from tests.service.store.telling import spec

NOBODY = ClientSettings.model_validate({"url": "http://127.0.0.1:9"})


def diagnose(folder: Path, **settings: Any) -> dict[str, Finding]:
    """What is found of a set-up that is sound but for ``settings``."""
    chosen = {"data_dir": folder, "port": 0, **settings}
    findings = examine(Settings.model_validate(chosen), NOBODY)
    assert len({finding.check for finding in findings}) == len(findings)
    assert all(bool(finding.remedy) is not finding.ok for finding in findings)
    return {finding.check: finding for finding in findings}


def complaints(folder: Path, **settings: Any) -> dict[str, str]:
    """The remedies of what is wrong, by check."""
    return {check: found.remedy for check, found in diagnose(folder, **settings).items() if not found.ok}


def test_a_sound_machine_is_left_alone_and_nothing_is_written(tmp_path: Path) -> None:
    found = diagnose(tmp_path / "data")
    assert [check for check, finding in found.items() if not finding.ok] == []
    assert "has no tables yet" in found["database"].found
    assert found["kept"].found == "metrics for ever, logs for ever, events for ever, audit 365 days"
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_used_are_named_with_their_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = complaints(tmp_path, storage=tmp_path / "file" / "storage", data_roots=f"{tmp_path}:{tmp_path / 'none'}")
    assert set(wrong) == {"storage folder", "data roots"}
    assert "SYNCBN_STORAGE" in wrong["storage folder"]
    assert "SYNCBN_DATA_ROOTS" in wrong["data roots"]
    wrong = complaints(tmp_path / "file", secrets_dir=tmp_path / "none")
    assert "SYNCBN_DATA_DIR" in wrong["data folder"]
    assert "SYNCBN_SECRETS_DIR" in wrong["webhook secrets"]


def test_secrets_that_no_webhook_could_use_are_told_by_name_and_not_by_content(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir(mode=0o700)
    for name, content, mode in (("good", "a-secret-of-16-b", 0o600), ("short", "hunter2", 0o600), ("open", "x", 0o644)):
        (secrets / name).write_text(content)
        (secrets / name).chmod(mode)
    wrong = complaints(tmp_path, secrets_dir=secrets)["webhook secrets"]
    assert "good" not in wrong
    assert "open: its file in SYNCBN_SECRETS_DIR is open to everyone" in wrong
    assert "short: its file in SYNCBN_SECRETS_DIR must hold 16" in wrong
    assert "hunter2" not in wrong
    secrets.chmod(0o777)
    assert "chmod 0700" in complaints(tmp_path, secrets_dir=secrets)["webhook secrets"]


def test_a_database_that_cannot_be_used_is_told_without_its_password(
    tmp_path: Path, postgresql: PostgresServer
) -> None:
    ray = {"ray_address": "http://127.0.0.1:9"}
    dead = diagnose(tmp_path, database_url="postgresql://u:hunter2@127.0.0.1:9/jobs", **ray)["database"]
    assert not dead.ok
    assert "SYNCBN_DATABASE_URL" in dead.remedy
    assert "hunter2" not in dead.model_dump_json()
    url = postgresql.url(postgresql.new_database())
    assert "SYNCBN_RAY_ADDRESS" in diagnose(tmp_path, database_url=url)["database"].found
    shared = diagnose(tmp_path, database_url=url, **ray)
    assert shared["database"].ok
    assert shared["clock"].ok
    assert "n of them let pass n times as many" in shared["rates"].found


def test_a_database_of_a_newer_service_or_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "syncbn.sqlite"
    JobStore.open(path).close()
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)

    def make(version: str) -> None:
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})

    make("0005_cursor_keys")
    assert "brings it up to date when it starts" in diagnose(tmp_path)["database"].found
    assert complaints(tmp_path) == {}
    make("9999_future")
    assert "install that version" in complaints(tmp_path)["database"]
    path.write_bytes(b"no database" * 1000)
    assert str(path) in complaints(tmp_path)["database"]
    assert path.read_bytes() == b"no database" * 1000


def test_a_clock_that_was_set_back_is_noticed_by_what_the_database_remembers(tmp_path: Path) -> None:
    store = JobStore.open(tmp_path / "syncbn.sqlite", clock=lambda: datetime.now(UTC) + timedelta(hours=1))
    store.create(spec())
    store.close()
    assert "NTP" in complaints(tmp_path)["clock"]


def test_what_is_forgotten_within_a_day_was_hardly_meant(tmp_path: Path) -> None:
    wrong = complaints(tmp_path, keep_metrics_days=0.5, keep_logs_days=30)
    assert "the metrics of the day before" in wrong["kept"]


def test_a_service_open_to_others_needs_keys_and_tls_and_keys_in_the_database_count(tmp_path: Path) -> None:
    wrong = complaints(tmp_path, host="0.0.0.0", trusted_proxies="*")
    for remedy in ("syncbn keys create", "SYNCBN_API_TOKEN", "SYNCBN_TLS_CERT"):
        assert remedy in wrong["exposure"]
    assert "name the proxies' addresses" in wrong["proxies"]
    store = JobStore.open(tmp_path / "syncbn.sqlite")
    store.keys.make("admin")
    store.close()
    assert complaints(tmp_path, host="0.0.0.0", tls_terminated=True) == {}


_CA = """
[ca]
default_ca = this
[this]
database = index
rand_serial = yes
new_certs_dir = .
default_md = sha256
policy = any
[any]
commonName = supplied
"""


def _certificate(folder: Path, name: str, first_year: int) -> dict[str, Path]:
    """One that signs itself, valid for the two years from the first day of ``first_year``."""
    folder.joinpath("config").write_text(_CA)
    folder.joinpath("index").touch()
    request = [
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        f"/CN={name}",
        "-keyout",
        f"{name}.key",
        "-out",
        "asked",
    ]
    dates = ["-startdate", f"{first_year}0101000000Z", "-enddate", f"{first_year + 2}0101000000Z"]
    sign = ["ca", "-batch", "-selfsign", "-notext", "-config", "config", "-keyfile", f"{name}.key", "-in", "asked"]
    for command in (request, [*sign, *dates, "-out", f"{name}.pem"]):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True, timeout=60)
    return {"tls_cert": folder / f"{name}.pem", "tls_key": folder / f"{name}.key"}


def test_a_certificate_must_fit_its_key_and_the_day(tmp_path: Path) -> None:
    year = datetime.now(UTC).year
    good, other = _certificate(tmp_path, "good", year), _certificate(tmp_path, "other", year)
    assert complaints(tmp_path, **good) == {}
    for wrong, why in (
        (good | {"tls_key": other["tls_key"]}, "mismatch"),
        (good | {"tls_key": tmp_path / "none"}, "no such file"),
        (_certificate(tmp_path, "old", 2001), "has expired"),
        (_certificate(tmp_path, "early", year + 1), "not yet valid"),
    ):
        found = diagnose(tmp_path, **wrong)["certificate"]
        assert not found.ok
        assert why in found.found.lower()
        assert "SYNCBN_TLS_KEY" in found.remedy


def test_webhooks_that_could_turn_inwards_are_told(tmp_path: Path) -> None:
    wrong = complaints(tmp_path, webhook_networks="0.0.0.0/0,10.0.0.0/8")
    assert (
        wrong["webhook networks"]
        == "webhooks could reach this machine itself and the cloud's metadata: name smaller networks"
    )
    assert complaints(tmp_path, webhook_networks="10.1.0.0/16") == {}


def test_a_port_that_another_uses_is_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "SYNCBN_PORT" in complaints(tmp_path, port=other.getsockname()[1])["port"]


def test_workers_of_a_cluster_elsewhere_must_find_the_service_and_the_storage(tmp_path: Path) -> None:
    far = {"ray_address": "http://192.0.2.1:8265"}  # a network for documents, where nobody answers
    wrong = complaints(tmp_path, **far)
    assert "SYNCBN_RAY_ADDRESS" in wrong["cluster"]
    for knob in ("SYNCBN_PUBLIC_URL", "SYNCBN_STORAGE"):
        assert knob in wrong["way back"]
    near = complaints(tmp_path, ray_address="http://127.0.0.1:9")
    assert set(near) == {"cluster"}


def test_too_few_open_files_are_told(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "SYNCBN_DATA_DIR": str(tmp_path), "SYNCBN_URL": "http://127.0.0.1:9"}
    command = f"ulimit -n 300 && exec {sys.executable} -m service doctor --json"
    told = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=100)
    (files,) = (finding for finding in json.loads(told.stdout) if finding["check"] == "open files")
    assert told.returncode == 1
    assert not files["ok"]
    assert "only 300" in files["found"]
    assert "ulimit -n" in files["remedy"]


@pytest.mark.parametrize("field", ["api_token", "ray_token", "database_url"])
def test_no_secret_is_told(tmp_path: Path, field: str) -> None:
    found = diagnose(tmp_path, **{field: "hunter2-and-more-of-it", "ray_address": "http://127.0.0.1:9"})
    assert "hunter2" not in "".join(finding.model_dump_json() for finding in found.values())
