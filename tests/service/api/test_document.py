import pytest
from fastapi.testclient import TestClient

_ERRORS = {
    ("get", "/v1/jobs"): {400, 401, 422, 503},
    ("post", "/v1/jobs"): {400, 401, 413, 415, 422, 503},
    ("post", "/v1/jobs:validate"): {400, 401, 413, 415, 422, 503},
    ("post", "/v1/jobs:plan"): {400, 401, 413, 415, 422, 503},
    ("get", "/v1/jobs/{job_id}"): {400, 401, 404, 503},
    ("post", "/v1/jobs/{job_id}:cancel"): {400, 401, 404, 409, 503},
    ("get", "/v1/jobs/{job_id}/report"): {400, 401, 404, 503},
    ("get", "/v1/jobs/{job_id}/metrics"): {400, 401, 404, 422, 503},
    ("get", "/v1/jobs/{job_id}/metrics/{name}"): {400, 401, 404, 422, 503},
    ("get", "/v1/jobs/{job_id}/drift"): {400, 401, 404, 422, 503},
    ("get", "/v1/jobs/{job_id}/events"): {400, 401, 404, 422, 503},
    ("get", "/v1/jobs/{job_id}/logs"): {400, 401, 404, 422, 503},
    ("get", "/v1/jobs/{job_id}/stream"): {400, 401, 404, 422, 503},
    ("post", "/v1/attempts/{attempt_id}/telemetry"): {400, 401, 413, 415, 422, 503},
}


def test_the_document_names_every_route_with_the_errors_it_may_answer(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    told = {
        (method, path): {int(status) for status in operation["responses"] if int(status) >= 400}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if path.startswith("/v1")
    }
    assert told == _ERRORS


def test_every_route_has_a_tag_a_summary_and_a_description(client: TestClient) -> None:
    for operations in client.get("/openapi.json").json()["paths"].values():
        for operation in operations.values():
            assert operation["tags"]
            assert operation["summary"]
            assert operation["description"]


def test_errors_are_documented_as_the_problems_they_are(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and path.startswith("/v1"):
                    assert list(response["content"]) == ["application/problem+json"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_loads_scripts_from_elsewhere(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404
