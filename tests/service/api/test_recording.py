from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import event

from service.api.rates import RateLimits
from service.jobs import JobState, Role
from tests.service.api.house import House
from tests.service.store.telling import spec

SPEC = {"name": "digits", "max_steps": 10}


def _told(house: House) -> list[tuple[str | None, str, str, int, str | None]]:
    """Who, what, to what, with what outcome; oldest first."""
    records = reversed(house.store.audit.page(limit=100).items)
    return [(r.principal, r.action, r.target, r.status, r.code) for r in records]


def test_every_change_is_on_record_granted_or_refused(house: House) -> None:
    with house.client() as client:
        alice, rita = house.key("alice", Role.SUBMITTER), house.key("rita", Role.READER)
        job = client.post("/v1/jobs", json=SPEC, headers=alice).json()["id"]
        client.post("/v1/jobs", json=SPEC | {"epochs": 2}, headers=alice)
        client.post("/v1/jobs", json=SPEC, headers=rita)
        client.post("/v1/jobs", json=SPEC)
        client.post(f"/v1/jobs/{job}:cancel", headers=rita)
        client.post(f"/v1/jobs/{job}:cancel", headers=alice)
        client.put("/v1/principals/alice", json={"role": "admin"}, headers=alice)
        client.post("/v1/nowhere?token=secret", headers=alice)
        client.delete(f"/v1/jobs/{job}", headers=alice)
    jobs, cancel = "POST /v1/jobs", "POST /v1/jobs/{job_id}:cancel"
    assert _told(house) == [
        ("alice", jobs, f"/v1/jobs/{job}", 201, None),
        ("alice", jobs, "/v1/jobs", 422, "invalid_request"),
        ("rita", jobs, "/v1/jobs", 403, "forbidden"),
        (None, "POST (no route)", "/v1/jobs", 401, "unauthorized"),
        ("rita", cancel, f"/v1/jobs/{job}:cancel", 404, "not_found"),
        ("alice", cancel, f"/v1/jobs/{job}:cancel", 200, None),
        ("alice", "PUT /v1/principals/{name}", "/v1/principals/alice", 403, "forbidden"),
        ("alice", "POST (no route)", "/v1/nowhere", 404, "no_such_route"),
        ("alice", "DELETE /v1/jobs/{job_id}", f"/v1/jobs/{job}", 405, "method_not_allowed"),
    ]


def test_a_record_leads_to_the_key_the_caller_and_the_answer(house: House) -> None:
    with house.client() as client:
        alice = house.key("alice", Role.SUBMITTER)
        answer = client.post("/v1/jobs", json=SPEC, headers=alice)
    (record,) = house.store.audit.page().items
    assert record.key_id == house.store.keys.page()[0].id
    assert record.request_id == answer.headers["X-Request-ID"]
    assert record.address == "testclient"


def test_reading_checking_reporting_and_floods_are_not_on_record(house: House) -> None:
    house.limits = RateLimits(requests="4/year", refusals="1/year")
    job, token = house.running_job()
    with house.client() as client:
        ingest = {"Authorization": f"Bearer {token}"}
        assert client.post(f"/v1/attempts/{job.id}-1/telemetry", json={"batches": []}, headers=ingest).is_success
        alice = house.key("alice", Role.SUBMITTER)
        assert client.get("/v1/jobs", headers=alice).is_success
        for verb in ("validate", "plan"):
            assert client.post(f"/v1/jobs:{verb}", json=SPEC, headers=alice).is_success
        assert client.get(f"/v1/jobs/{job.id}", headers=alice).status_code == 404
        assert client.post("/v1/jobs", json=SPEC, headers=alice).status_code == 429
        assert [client.post("/v1/jobs", json=SPEC).status_code for _ in range(3)] == [401, 429, 429]
    assert _told(house) == [(None, "POST (no route)", "/v1/jobs", 401, "unauthorized")]


def test_what_could_not_be_put_on_record_is_not_answered_as_done(house: House) -> None:
    with house.store._database.write() as connection:
        connection.exec_driver_sql("DROP TABLE audit")
    with house.client() as client:
        answer = client.post("/v1/jobs", json=SPEC)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert "Location" not in answer.headers
        assert client.get("/v1/jobs").json()["items"] == []
        job, _ = house.store.create(spec())
        cancelled = client.post(f"/v1/jobs/{job.id}:cancel")
        assert (cancelled.status_code, cancelled.json()["code"]) == (503, "store_unavailable")
        assert "on record" in cancelled.json()["detail"]
        assert house.store.get(job.id).state is JobState.CANCELLED
        refused = client.post("/v1/jobs", json={})
        assert refused.status_code == 422


def test_a_job_and_its_record_are_one_transaction_and_all_that_a_submission_costs(house: House) -> None:
    """A principal is looked up once in a while, a job once a request, however many ask for it on the way."""
    transactions: list[str] = []
    with house.client() as client:
        alice = house.key("alice", Role.SUBMITTER)
        client.get("/v1/whoami", headers=alice)
        event.listen(house.store._database._reader, "begin", lambda connection: transactions.append("begin"))
        job = client.post("/v1/jobs", json=SPEC, headers=alice).json()["id"]
        assert len(transactions) == 1
        client.get(f"/v1/jobs/{job}", headers=alice)
        assert len(transactions) == 2
        key = {"Idempotency-Key": "k"} | alice
        assert [client.post("/v1/jobs", json=SPEC, headers=key).status_code for _ in range(2)] == [201, 200]
    assert [status for *_, status, _ in _told(house)] == [201, 201, 200]


def test_a_defect_of_the_service_is_on_record_too(house: House) -> None:
    house.max_workers = "few"  # type: ignore[assignment] # no number: the comparison breaks
    with house.client() as client:
        assert client.post("/v1/jobs", json=SPEC).status_code == 500
    assert _told(house) == [("anonymous", "POST /v1/jobs", "/v1/jobs", 500, "service_error")]


def test_admins_read_the_trail_in_pages(house: House) -> None:
    with house.client() as client:
        for number in range(3):
            client.post("/v1/jobs", json=SPEC | {"seed": number})
        first: Any = client.get("/v1/audit", params={"limit": 2}).json()
        second: Any = client.get("/v1/audit", params={"limit": 2, "cursor": first["next_cursor"]}).json()
        assert len(first["items"]) == 2
        assert len(second["items"]) == 1
        assert second["next_cursor"] is None
        assert client.get("/v1/audit", params={"cursor": "!"}).status_code == 422
        assert client.get("/v1/audit", params={"principal": "nobody"}).json()["items"] == []


def test_what_a_change_was_for_is_told_where_its_path_does_not(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    client.put("/v1/principals/bob", json={"role": "reader", "quota": {"max_queued_jobs": 2}})
    client.post("/v1/api-keys", json={"principal": "bob"})
    told = [record.detail for record in reversed(house.store.audit.page().items)]
    assert told[0] == '{"role":"reader","quota":{"max_running_workers":null,"max_queued_jobs":2}}'
    assert told[1].startswith('{"principal":"bob"')
    assert house.store.get(job.id) == job
