from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.jobs import Role
from tests.service.api.house import House

TOKEN = "operator-token-of-the-tests"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def admin(house: House) -> Any:
    with house.client(api_token=TOKEN) as client:
        client.headers.update(OPERATOR)
        yield client


def _pointers(answer: Any) -> set[str]:
    assert answer.status_code == 422, answer.text
    return {problem["pointer"] for problem in answer.json()["errors"]}


def test_a_principal_is_made_shown_changed_and_listed(admin: TestClient) -> None:
    terms = {"role": "submitter", "quota": {"max_running_workers": 4, "max_queued_jobs": None}}
    made = admin.put("/v1/principals/alice", json=terms)
    assert (made.status_code, made.headers["Location"]) == (201, "/v1/principals/alice")
    assert made.json() == {"name": "alice", **terms}
    assert admin.get(made.headers["Location"]).json() == made.json()
    changed = admin.put("/v1/principals/alice", json={"role": "reader"})
    assert (changed.status_code, changed.json()["role"]) == (200, "reader")
    admin.put("/v1/principals/bob", json={"role": "reader"})
    assert [item["name"] for item in admin.get("/v1/principals").json()["items"]] == ["alice", "bob"]
    assert [item["name"] for item in admin.get("/v1/principals?after=alice").json()["items"]] == ["bob"]
    assert admin.get("/v1/principals/nobody").status_code == 404


def test_every_wrong_term_is_named(admin: TestClient) -> None:
    wrong = {"role": "king", "quota": {"max_workers": 1, "max_queued_jobs": -1}, "colour": "blue"}
    assert _pointers(admin.put("/v1/principals/alice", json=wrong)) == {
        "/role",
        "/quota/max_workers",
        "/quota/max_queued_jobs",
        "/colour",
    }
    assert _pointers(admin.put("/v1/principals/Alice", json={"role": "reader"})) == {"/name"}
    assert _pointers(admin.put("/v1/principals/admin", json={"role": "reader"})) == {"/role"}


def test_a_key_is_told_where_it_is_made_and_nowhere_again(admin: TestClient) -> None:
    admin.put("/v1/principals/alice", json={"role": "reader"})
    made = admin.post("/v1/api-keys", json={"principal": "alice", "expires_in_s": 3600})
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    key = made.json()["key"]
    assert admin.get("/v1/whoami", headers={"Authorization": f"Bearer {key}"}).json()["principal"]["name"] == "alice"
    listed, shown = admin.get("/v1/api-keys"), admin.get(made.headers["Location"])
    assert listed.json()["items"] == [shown.json()]
    assert shown.json()["expires_at"] == made.json()["expires_at"]
    for answer in (listed, shown):
        assert key.removeprefix("syncbn_") not in answer.text


def test_a_key_is_replaced_and_revoked(admin: TestClient, house: House) -> None:
    old = house.key("alice", Role.READER)
    (listed,) = admin.get("/v1/api-keys?principal=alice").json()["items"]
    rotated = admin.post(f"/v1/api-keys/{listed['id']}:rotate", json={"grace_s": 60})
    assert (rotated.status_code, rotated.headers["Cache-Control"]) == (201, "no-store")
    new = {"Authorization": f"Bearer {rotated.json()['key']}"}
    assert [admin.get("/v1/whoami", headers=key).status_code for key in (old, new)] == [200, 200]
    revoked = [admin.post(f"/v1/api-keys/{listed['id']}:revoke") for _ in range(2)]
    assert [answer.status_code for answer in revoked] == [200, 200]
    assert revoked[0].json() == revoked[1].json()
    assert [admin.get("/v1/whoami", headers=key).status_code for key in (old, new)] == [401, 200]
    assert admin.post(f"/v1/api-keys/{listed['id']}:rotate").status_code == 409
    assert admin.post("/v1/api-keys/key_none:revoke").status_code == 404


def test_a_mistyped_expiry_makes_no_key_that_never_ends(admin: TestClient, house: House) -> None:
    admin.put("/v1/principals/alice", json={"role": "reader"})
    for wrong in ({"expires_in": 60}, {"expires_in_s": 0}, {"expires_in_s": "NaN"}, {"expires_in_s": 1e12}):
        (pointer,) = _pointers(admin.post("/v1/api-keys", json={"principal": "alice"} | wrong))
        assert pointer == f"/{next(iter(wrong))}"
    assert _pointers(admin.post("/v1/api-keys", json={"principal": "nobody"})) == {"/principal"}
    assert not house.store.keys.any_made()
