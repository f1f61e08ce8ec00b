"""Whatever goes wrong, the answer is one kind of document."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from service.api.app import MAX_BODY_BYTES
from service.store import JobStore
from tests.service.api.house import House
from tests.service.store.telling import spec

JSON = {"Content-Type": "application/json"}


def _problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    told: dict[str, Any] = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, told["status"], told["code"]) == (status, status, code)
    assert told["type"] == f"urn:syncbn:problem:{code}"
    assert told["instance"] == answer.request.url.path
    assert told["request_id"] == answer.headers["X-Request-ID"] != ""
    assert told["title"]
    assert told["detail"]
    assert "Traceback" not in answer.text
    return told


def test_a_path_that_leads_nowhere(client: TestClient) -> None:
    _problem(client.get("/v2/jobs"), 404, "no_such_route")


def test_a_method_that_is_not_there(client: TestClient) -> None:
    answer = client.delete("/livez")
    _problem(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET"


def test_a_body_that_is_no_json(client: TestClient) -> None:
    told = _problem(client.post("/v1/jobs", content="{'name'}", headers=JSON), 422, "invalid_request")
    assert [(problem["pointer"], problem["code"]) for problem in told["errors"]] == [("", "json_invalid")]


def test_a_body_of_another_kind(client: TestClient) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        _problem(client.post("/v1/jobs", content=b"{}", headers=headers), 415, "unsupported_media_type")


def test_a_body_that_is_missing(client: TestClient) -> None:
    _problem(client.post("/v1/jobs"), 422, "invalid_request")


def test_a_body_that_is_too_large(client: TestClient) -> None:
    _problem(client.post("/v1/jobs", content=b" " * (MAX_BODY_BYTES + 1), headers=JSON), 413, "body_too_large")


def test_a_body_that_grows_too_large_on_the_way(client: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * 2**20

    _problem(client.post("/v1/jobs", content=pieces(), headers=JSON), 413, "body_too_large")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8400", "127.0.0.1.evil.example", "localhost@evil", "[::2]"]
)
def test_a_host_that_is_not_this_service(client: TestClient, host: str) -> None:
    _problem(client.get("/livez", headers={"Host": host}), 400, "host_not_allowed")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8400", "LOCALHOST", "[::1]:80", "[::1]"])
def test_a_host_that_is_this_service(client: TestClient, host: str) -> None:
    assert client.get("/livez", headers={"Host": host}).status_code == 200


def test_a_defect_of_the_service_tells_no_more_than_its_request_id(client: TestClient, house: House) -> None:
    house.parts = {"cluster": 3 / 2}  # type: ignore[dict-item] # a readiness that breaks its promise
    with capture_logs() as lines:
        told = _problem(client.get("/readyz"), 500, "service_error")
    assert [(line["log_level"], line["request"]) for line in lines] == [("error", told["request_id"])]


def test_a_store_that_does_not_answer(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore.open(path, busy_timeout_s=0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with House(store).client() as client:
        answer = client.post("/v1/jobs", json={"name": "x", "epochs": 1})
        assert _problem(answer, 503, "store_unavailable")["retryable"] is True
    other.execute("ROLLBACK")
    other.close()
    store.close()


def test_a_token_where_one_is_needed(house: House) -> None:
    job, _ = house.store.create(spec())
    with house.client(api_token="secret") as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "secret"},
        ):
            for path in ("/v1/jobs", f"/v1/jobs/{job.id}", f"/v1/jobs/{job.id}/events", f"/v1/jobs/{job.id}/stream"):
                _problem(client.get(path, headers=headers), 401, "unauthorized")
        right = {"Authorization": "Bearer secret"}
        assert client.get(f"/v1/jobs/{job.id}", headers=right).status_code == 200
        assert client.post(f"/v1/jobs/{job.id}:cancel").status_code == 401
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200


def test_the_api_token_opens_no_ingest_and_an_ingest_token_nothing_else(house: House) -> None:
    job, token = house.running_job()
    with house.client(api_token="secret") as client:
        url = f"/v1/attempts/{job.id}-1/telemetry"
        _problem(
            client.post(url, json={"batches": []}, headers={"Authorization": "Bearer secret"}), 401, "unauthorized"
        )
        ingest = {"Authorization": f"Bearer {token}"}
        assert client.post(url, json={"batches": []}, headers=ingest).status_code == 200
        _problem(client.get("/v1/jobs", headers=ingest), 401, "unauthorized")


def test_nobody_elses_page_may_read_the_answers(client: TestClient) -> None:
    answer = client.get("/livez", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
