from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.api.__main__ import document

ROOT = Path(__file__).parents[3]

_ERRORS = {
    ("post", "/v1/jobs:validate"): {400, 401, 403, 413, 415, 422, 429, 503},
    ("post", "/v1/jobs:plan"): {400, 401, 403, 413, 415, 422, 429, 503},
    ("post", "/v1/jobs"): {400, 401, 403, 413, 415, 422, 429, 503},
    ("get", "/v1/jobs"): {400, 401, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}"): {400, 401, 404, 429, 503},
    ("patch", "/v1/jobs/{job_id}"): {400, 401, 403, 404, 409, 412, 413, 415, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/report"): {400, 401, 404, 410, 429, 503},
    ("get", "/v1/jobs/{job_id}/bn"): {400, 401, 404, 410, 422, 429, 503},
    ("get", "/v1/jobs:compare"): {400, 401, 404, 410, 422, 429, 503},
    ("post", "/v1/jobs:cancel"): {400, 401, 403, 413, 415, 422, 429, 503},
    ("post", "/v1/jobs/{job_id}:cancel"): {400, 401, 403, 404, 409, 422, 429, 503},
    ("post", "/v1/jobs/{job_id}:pause"): {400, 401, 403, 404, 409, 429, 503},
    ("post", "/v1/jobs/{job_id}:resume"): {400, 401, 403, 404, 409, 413, 415, 422, 429, 503},
    ("post", "/v1/jobs/{job_id}:checkpoint"): {400, 401, 403, 404, 409, 429, 503},
    ("post", "/v1/jobs/{job_id}:retry"): {400, 401, 403, 404, 409, 413, 415, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/metrics"): {400, 401, 404, 410, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/metrics/{name}"): {400, 401, 404, 410, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/drift"): {400, 401, 404, 410, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/events"): {400, 401, 404, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/logs"): {400, 401, 404, 410, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/logs/download"): {400, 401, 404, 410, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/logs/stream"): {400, 401, 404, 410, 422, 429, 503},
    ("get", "/v1/jobs/{job_id}/stream"): {400, 401, 404, 422, 429, 503},
    ("get", "/v1/whoami"): {400, 401, 429, 503},
    ("get", "/v1/principals"): {400, 401, 403, 422, 429, 503},
    ("get", "/v1/principals/{name}"): {400, 401, 403, 404, 422, 429, 503},
    ("put", "/v1/principals/{name}"): {400, 401, 403, 409, 413, 415, 422, 429, 503},
    ("get", "/v1/api-keys"): {400, 401, 403, 422, 429, 503},
    ("post", "/v1/api-keys"): {400, 401, 403, 413, 415, 422, 429, 503},
    ("get", "/v1/api-keys/{key_id}"): {400, 401, 403, 404, 429, 503},
    ("post", "/v1/api-keys/{key_id}:revoke"): {400, 401, 403, 404, 429, 503},
    ("post", "/v1/api-keys/{key_id}:rotate"): {400, 401, 403, 404, 409, 413, 415, 422, 429, 503},
    ("get", "/v1/audit"): {400, 401, 403, 422, 429, 503},
    ("get", "/v1/webhooks"): {400, 401, 422, 429, 503},
    ("post", "/v1/webhooks"): {400, 401, 403, 413, 415, 422, 429, 503},
    ("delete", "/v1/webhooks/{hook_id}"): {400, 401, 403, 404, 429, 503},
    ("get", "/v1/webhooks/{hook_id}"): {400, 401, 404, 429, 503},
    ("get", "/v1/webhooks/{hook_id}/deliveries"): {400, 401, 404, 422, 429, 503},
    ("post", "/v1/webhooks/{hook_id}:test"): {400, 401, 403, 404, 429, 503},
    ("post", "/v1/attempts/{attempt_id}/telemetry"): {400, 401, 413, 415, 422, 429, 503},
}


def test_the_document_that_is_published_is_that_of_this_code() -> None:
    published = (ROOT / "docs/openapi.json").read_text()
    assert published == document(), "the API has changed: look at what, then `make openapi`"


def test_the_document_names_every_route_with_the_errors_it_may_answer(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    told = {
        (method, path): {int(status) for status in operation["responses"] if int(status) >= 400}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if path.startswith("/v1")
    }
    assert told == _ERRORS


def test_the_document_says_for_every_route_which_key_and_role_it_needs(client: TestClient) -> None:
    """Reading asks for readers, changing for submitters or admins; attempts show a token that has no role."""
    document = client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"api key", "ingest token"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            security = operation.get("security")
            if path == "/metrics":
                assert security == [{"api key": ["reader"]}]
            elif not path.startswith("/v1/"):
                assert security is None, path
            elif path.startswith("/v1/attempts/"):
                assert security == [{"ingest token": []}]
            else:
                (roles,) = [scheme["api key"] for scheme in security]
                managing = path.startswith(("/v1/principals", "/v1/api-keys", "/v1/audit"))
                least = ["admin"] if managing else ["reader"] if method == "get" else ["submitter"]
                assert roles == least, (method, path)


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
