"""Many jobs cancelled by one request."""

from typing import Any

from fastapi.testclient import TestClient

from service.jobs import JobState, PrincipalTerms, Role
from tests.service.api.house import House
from tests.service.store.telling import spec


def _outcomes(answer: Any) -> list[tuple[str, int, str | None]]:
    assert answer.status_code == 200, answer.text
    return [(item["id"], item["status"], item["code"] or item["job"]["state"]) for item in answer.json()["items"]]


def test_each_job_is_answered_as_if_it_had_been_asked_alone(client: TestClient, house: House) -> None:
    waiting, _ = house.store.create(spec())
    running, _ = house.running_job()
    ended, _ = house.running_job()
    house.store.transition(house.store.get(ended.id), JobState.SUCCEEDED)
    ids = [waiting.id, running.id, ended.id, "job_none", waiting.id]
    assert _outcomes(client.post("/v1/jobs:cancel", json={"ids": ids, "checkpoint": True})) == [
        (waiting.id, 200, "cancelled"),
        (running.id, 202, "cancelling"),
        (ended.id, 409, "conflict"),
        ("job_none", 404, "not_found"),
    ]
    assert house.store.get(running.id).stop_saves
    assert [house.store.get(job.id).state for job in (waiting, running, ended)] == [
        JobState.CANCELLED,
        JobState.CANCELLING,
        JobState.SUCCEEDED,
    ]


def test_jobs_of_others_are_as_if_they_were_not_there(house: House) -> None:
    for name in ("ada", "bob"):
        house.store.principals.put(name, PrincipalTerms(role=Role.SUBMITTER))
    key = house.store.keys.make("ada").key
    theirs, _ = house.store.create(spec(), owner="bob")
    mine, _ = house.store.create(spec(), owner="ada")
    with house.client() as client:
        headers = {"Authorization": f"Bearer {key}"}
        answer = client.post("/v1/jobs:cancel", json={"ids": [theirs.id, mine.id]}, headers=headers)
        assert _outcomes(answer) == [(theirs.id, 404, "not_found"), (mine.id, 200, "cancelled")]
        listed = client.get("/v1/jobs", params={"owner": "bob"}, headers=headers)
        assert listed.json()["items"] == []
    assert house.store.get(theirs.id).state is JobState.QUEUED


def test_an_empty_or_endless_list_is_refused(client: TestClient) -> None:
    for ids in ([], ["job"] * 201):
        assert client.post("/v1/jobs:cancel", json={"ids": ids}).status_code == 422
