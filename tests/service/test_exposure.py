import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request
from pydantic import ValidationError

from service.composition import server_config
from service.exposure import Exposed, exposure_problems, refuse_exposure
from service.settings import Settings

TOKEN = "0123456789abcdef"
TLS = {"tls_terminated": True}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"host": "localhost"},
        {"host": "::1"},
        {"host": "127.8.9.1", "public_url": "http://localhost:8400"},
        {"host": "0.0.0.0", "api_token": TOKEN, **TLS},
        {"host": "::", "api_token": TOKEN, "tls_cert": "cert.pem", "tls_key": "key.pem"},
        {"public_url": "https://jobs.example", "api_token": TOKEN, **TLS},
    ],
)
def test_these_settings_expose_nothing(fields: dict[str, object]) -> None:
    refuse_exposure(Settings.model_validate(fields), keys_made=False)


@pytest.mark.parametrize(
    ("fields", "remedies"),
    [
        ({"host": "0.0.0.0"}, ["syncbn keys create", "SYNCBN_API_TOKEN", "SYNCBN_TLS_CERT", "SYNCBN_TLS_TERMINATED"]),
        ({"host": "10.0.0.7", **TLS}, ["SYNCBN_API_TOKEN"]),
        ({"host": "example.org", "api_token": TOKEN}, ["SYNCBN_TLS_KEY"]),
        ({"host": "::", "api_token": TOKEN[:-1], **TLS}, ["openssl rand -hex 32"]),
        ({"host": "::", "api_token": "", **TLS}, ["SYNCBN_API_TOKEN"]),
        ({"public_url": "https://jobs.example", **TLS}, ["SYNCBN_API_TOKEN", "jobs.example"]),
    ],
)
def test_these_would_and_the_refusal_says_every_remedy(fields: dict[str, object], remedies: list[str]) -> None:
    with pytest.raises(Exposed) as refused:
        refuse_exposure(Settings.model_validate(fields), keys_made=False)
    for remedy in [*remedies, "127.0.0.1"]:
        assert remedy in str(refused.value)
    assert TOKEN[:-1] not in str(refused.value)


def test_stored_keys_are_as_good_as_a_token() -> None:
    settings = Settings.model_validate({"host": "0.0.0.0", **TLS})
    assert exposure_problems(settings, keys_made=True) == []


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ValidationError, match="go together"):
        Settings.model_validate({"tls_cert": "cert.pem"})


def test_data_may_be_read_anywhere_on_loopback_and_nowhere_beyond_unless_said() -> None:
    assert Settings().readable_roots is None
    assert Settings.model_validate({"host": "0.0.0.0"}).readable_roots == ()
    said = Settings.model_validate({"host": "0.0.0.0", "data_roots": f"/a{os.pathsep}/b"})
    assert said.readable_roots == (Path("/a"), Path("/b"))
    assert Settings.model_validate({"data_roots": ""}).readable_roots == ()


def test_serve_refuses_before_it_listens(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"PATH": os.environ["PATH"], "SYNCBN_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-m", "service", "serve", "--json", "--host", "0.0.0.0", "--port", str(port)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert '"code": "exposed"' in answer.stderr


def test_a_service_with_a_certificate_speaks_https_and_believes_no_proxy(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    name = ["-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made: list[str | Path] = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", cert, *name]
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    app = FastAPI()

    @app.get("/address")
    def address(request: Request) -> str | None:
        return request.client.host if request.client else None

    settings = Settings.model_validate({"tls_cert": cert, "tls_key": key})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(server_config(app, settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            url = f"https://localhost:{listener.getsockname()[1]}/address"
            asked = urllib.request.Request(url, headers={"X-Forwarded-For": "192.0.2.7"})
            trusted = ssl.create_default_context(cafile=str(cert))
            with urllib.request.urlopen(asked, context=trusted, timeout=10) as answer:
                assert answer.read() == b'"127.0.0.1"'
            with pytest.raises(OSError, match=r"closed|reset"):
                urllib.request.urlopen(url.replace("https", "http"), timeout=10)
        finally:
            server.should_exit = True
            thread.join(20)
        assert not thread.is_alive()
