"""Who may ask for what, held for every route that there is: also for those that others add."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.rates import RateLimits
from service.jobs import CheckpointSaved, JobState, Role
from tests.service.api.house import House
from tests.service.store.telling import spec

TOKEN = "operator-token-of-the-tests"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def client(house: House, tmp_path: Path) -> Iterator[TestClient]:
    house.storage = tmp_path / "storage"
    house.limits = RateLimits(refusals="10000/year")
    with house.client(api_token=TOKEN) as opened:
        yield opened


def routes(client: TestClient) -> list[tuple[str, str]]:
    """Method and path of every route of the API proper."""
    paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    found = [(method, path) for path, operations in paths.items() for method in operations if path.startswith("/v1/")]
    assert len(found) > 15
    return [(method, path) for method, path in found if not path.startswith("/v1/attempts/")]


def ask(client: TestClient, method: str, path: str, headers: dict[str, str], job_id: str = "job_none") -> Any:
    filled = path.format(job_id=job_id, key_id="key_none", hook_id="hook_none", name="train")
    return client.request(method, filled, headers=headers, json=None if method == "get" else {})


def test_no_route_answers_without_a_right_key(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    revoked = house.key("alice", Role.ADMIN)
    house.store.keys.revoke(house.store.keys.page()[0].id)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, revoked):
        for method, path in routes(client):
            answer = ask(client, method, path, headers, job.id)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_body_is_not_even_read_before_the_key_is_known(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/jobs", content="{no json", headers=headers).status_code == 401
    assert client.post("/v1/jobs", content="{no json", headers=headers | OPERATOR).status_code == 422


def test_for_who_is_no_admin_others_jobs_do_not_exist(client: TestClient, house: House) -> None:
    alices, _ = house.store.create(spec(), owner="alice")
    bob = house.key("bob", Role.SUBMITTER)
    for method, path in routes(client):
        if "{job_id}" in path:
            answer = ask(client, method, path, bob, alices.id)
            unknown = ask(client, method, path, bob, "job_unknown")
            assert answer.status_code == unknown.status_code == 404, (method, path)
            assert answer.json()["detail"] == unknown.json()["detail"].replace("job_unknown", alices.id)
    assert client.get("/v1/jobs", headers=bob).json()["items"] == []


def test_everyone_sees_the_own_jobs_and_an_admin_all(client: TestClient, house: House) -> None:
    alice, bob = house.key("alice", Role.SUBMITTER), house.key("bob", Role.SUBMITTER)
    wanted = {"name": "digits", "max_steps": 10}
    made = {name: client.post("/v1/jobs", json=wanted, headers=key).json() for name, key in (("a", alice), ("b", bob))}
    assert [made["a"]["owner"], made["b"]["owner"]] == ["alice", "bob"]
    for key, visible in ((alice, "a"), (bob, "b"), (OPERATOR, "ab")):
        listed = client.get("/v1/jobs", headers=key).json()["items"]
        assert {job["id"] for job in listed} == {made[name]["id"] for name in visible}
        for name in visible:
            assert client.get(f"/v1/jobs/{made[name]['id']}", headers=key).status_code == 200


def test_a_word_against_repeating_is_each_principals_own(client: TestClient, house: House) -> None:
    word = {"Idempotency-Key": "one"}
    wanted = {"name": "digits", "max_steps": 10}
    keys = [house.key(name, Role.SUBMITTER) for name in ("alice", "bob")]
    made = [client.post("/v1/jobs", json=wanted, headers=key | word) for key in keys]
    assert [answer.status_code for answer in made] == [201, 201]
    assert made[0].json()["id"] != made[1].json()["id"]


def test_a_reader_changes_nothing_and_a_submitter_manages_nobody(client: TestClient, house: House) -> None:
    rita, sam = house.key("rita", Role.READER), house.key("sam", Role.SUBMITTER)
    ritas, _ = house.store.create(spec(), owner="rita")
    sams, _ = house.store.create(spec(), owner="sam")
    document = client.get("/openapi.json").json()["paths"]
    for method, path in routes(client):
        (least,) = document[path][method]["security"][0]["api key"]
        for key, job, role in ((rita, ritas, Role.READER), (sam, sams, Role.SUBMITTER)):
            if path.endswith("/stream"):
                continue  # told until the job ends; who may read it is said above
            answer = ask(client, method, path, key, job.id)
            assert (answer.status_code == 403) is not role.includes(Role(least)), (method, path, role)
    assert house.store.get(ritas.id) == ritas


def test_a_retry_begins_from_no_file_outside_of_what_the_service_keeps(
    client: TestClient, house: House, tmp_path: Path
) -> None:
    """An attempt, or whoever has got hold of its token, tells where its checkpoints are."""
    outside = tmp_path / "elsewhere" / "step-10.pt"
    outside.parent.mkdir()
    outside.touch()
    house.storage.mkdir()
    (house.storage / "link.pt").symlink_to(outside)
    for path in (outside, house.storage / "link.pt", house.storage / ".." / "elsewhere" / "step-10.pt"):
        job, _ = house.running_job(CheckpointSaved(step=10, path=str(path), size_bytes=1, duration_s=0.1))
        house.store.transition(job, JobState.FAILED)
        answer = client.post(f"/v1/jobs/{job.id}:retry", headers=OPERATOR)
        (problem,) = answer.json()["errors"]
        assert (problem["pointer"], problem["code"]) == ("/from_checkpoint", "path_not_allowed")


def test_whoami_tells_principal_and_key(client: TestClient, house: House) -> None:
    me = client.get("/v1/whoami", headers=house.key("alice", Role.READER)).json()
    assert me["principal"] == {
        "name": "alice",
        "role": "reader",
        "quota": {"max_running_workers": None, "max_queued_jobs": None},
    }
    assert me["key"]["principal"] == "alice"
    operator = client.get("/v1/whoami", headers=OPERATOR).json()
    assert (operator["principal"]["name"], operator["principal"]["role"], operator["key"]) == ("admin", "admin", None)


def test_a_service_without_keys_is_open_until_the_first_one_is_made_and_never_again(house: House) -> None:
    with house.client() as client:
        me = client.get("/v1/whoami").json()
        assert (me["principal"]["name"], me["principal"]["role"]) == ("anonymous", "admin")
        alice = house.key("alice", Role.ADMIN)
        assert client.get("/v1/whoami").status_code == 401
        assert client.get("/v1/whoami", headers=alice).json()["principal"]["name"] == "alice"
        house.store.keys.revoke(house.store.keys.page()[0].id)
        assert client.get("/v1/whoami", headers=alice).status_code == 401
        assert client.get("/v1/whoami").status_code == 401
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200


def test_an_attempts_token_opens_its_own_door_alone_and_a_key_never_that_door(client: TestClient, house: House) -> None:
    job, token = house.running_job()
    door = f"/v1/attempts/{job.id}-1/telemetry"
    ingest = {"Authorization": f"Bearer {token}"}
    for method, path in routes(client):
        assert ask(client, method, path, ingest, job.id).status_code == 401, (method, path)
    for key in (OPERATOR, house.key("alice", Role.ADMIN), {}):
        assert client.post(door, json={"batches": []}, headers=key).status_code == 401
    assert client.post(door, json={"batches": []}, headers=ingest).status_code == 200
