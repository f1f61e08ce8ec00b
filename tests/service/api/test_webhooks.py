from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

from service.jobs import TELEMETRY_EVENT, BatchNormSample, LogLine, Role, StepMetrics, Topic
from service.store import events
from tests.service.api.house import House
from tests.service.webhooks.receiving import Receiver, receiving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture
def client(house: House, tmp_path: Path) -> Iterator[TestClient]:
    house.secrets, house.networks = tmp_path / "secrets", (ip_network("127.0.0.0/8"),)
    house.secrets.mkdir()
    for name in ("ci", "ci@alice", "ci@bob"):
        (house.secrets / name).write_text("a-secret-of-these-tests")
        (house.secrets / name).chmod(0o600)
    with house.client() as opened:
        yield opened


def order(receiver: Receiver, path: str = "/ok", **changes: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{receiver.port}{path}"
    return {"url": url, "events": ["evaluation"], "secret": "ci@alice"} | changes


def pointers(answer: Any) -> set[str]:
    assert answer.status_code == 422, answer.text
    return {problem["pointer"] for problem in answer.json()["errors"]}


def test_a_webhook_is_made_shown_tried_and_removed(client: TestClient, house: House, receiver: Receiver) -> None:
    alice = house.key("alice", Role.SUBMITTER)
    made = client.post("/v1/webhooks", json=order(receiver), headers=alice)
    assert made.status_code == 201
    place = made.headers["Location"]
    assert place.startswith("/v1/webhooks/hook_")
    hook = made.json()
    assert (hook["owner"], hook["state"], hook["all"], hook["secret"]) == ("alice", "active", False, "ci@alice")
    assert hook["events"] == ["state_changed", "evaluation"]
    assert client.get(place, headers=alice).json() == hook
    assert client.get("/v1/webhooks", headers=alice).json() == {"items": [hook]}
    tried = client.post(f"{place}:test", headers=alice).json()
    assert (tried["event"], tried["status"], tried["error"]) == ("test", 200, None)
    (post,) = receiver.posts
    assert (post.headers["Syncbn-Event"], b'"type":"test"' in post.body) == ("test", True)
    receiver.fails = {"/ok"}
    failed = client.post(f"{place}:test", headers=alice).json()
    assert (failed["status"], failed["error"]) == (500, "answered 500")
    assert client.get(f"{place}/deliveries", headers=alice).json()["items"] == [failed, tried]
    assert client.delete(place, headers=alice).status_code == 204
    assert client.get(place, headers=alice).status_code == 404
    records = house.store.audit.page().items
    assert [record.action.partition(" ")[0] for record in records] == ["DELETE", "POST", "POST", "POST"]
    assert records[-1].target == place
    assert records[-1].detail == "own jobs to 127.0.0.1, signed with ci@alice"


def test_others_webhooks_do_not_exist_but_for_admins(client: TestClient, house: House, receiver: Receiver) -> None:
    alice, bob, carol = (
        house.key(*who) for who in (("alice", Role.SUBMITTER), ("bob", Role.SUBMITTER), ("c", Role.ADMIN))
    )
    place = client.post("/v1/webhooks", json=order(receiver), headers=alice).headers["Location"]
    for method, path in (("GET", place), ("DELETE", place), ("POST", f"{place}:test"), ("GET", f"{place}/deliveries")):
        refused = client.request(method, path, headers=bob)
        unknown = client.request(method, path.replace(place, "/v1/webhooks/hook_none"), headers=bob)
        assert refused.status_code == unknown.status_code == 404
        assert refused.json()["detail"].replace(place.rpartition("/")[2], "hook_none") == unknown.json()["detail"]
    assert client.get("/v1/webhooks", headers=bob).json() == {"items": []}
    assert len(client.get("/v1/webhooks", headers=carol).json()["items"]) == 1
    assert client.delete(place, headers=carol).status_code == 204


def test_a_secret_belongs_to_the_principal_in_its_name(client: TestClient, house: House, receiver: Receiver) -> None:
    alice, carol = house.key("alice", Role.SUBMITTER), house.key("carol", Role.ADMIN)
    for name in ("ci@bob", "ci", "ci@nobody", "none"):
        answer = client.post("/v1/webhooks", json=order(receiver, secret=name), headers=alice)
        assert pointers(answer) == {"/secret"}
        assert answer.json()["errors"][0]["code"] == "secret_not_allowed"  # whether there is one or not
    missing = client.post("/v1/webhooks", json=order(receiver, secret="none@alice"), headers=alice)
    assert pointers(missing) == {"/secret"}
    assert "no secret of this name" in missing.json()["detail"]
    assert pointers(client.post("/v1/webhooks", json=order(receiver, all=True), headers=alice)) == {"/all"}
    assert client.post("/v1/webhooks", json=order(receiver, all=True, secret="ci"), headers=carol).status_code == 201


def test_every_wrong_field_is_named(client: TestClient, receiver: Receiver) -> None:
    wrong = {
        "url": "ftp://x/",
        "events": ["birthday", "drift"],
        "secret": "../../etc/passwd",
        "all": "perhaps",
        "colour": "red",
    }
    answer = client.post("/v1/webhooks", json=wrong)
    assert pointers(answer) == {"/url", "/events/0", "/secret", "/all", "/colour"}
    for url in ("https://me:word@ci.example/", "https://ci.example/#part", "https://ci.example/" + "x" * 2000):
        assert pointers(client.post("/v1/webhooks", json=order(receiver, url=url))) == {"/url"}
    for url in ("http://10.0.0.1/", "https://169.254.169.254/latest", "http://8.8.8.8/", "https://nowhere.invalid/"):
        refused = client.post("/v1/webhooks", json=order(receiver, url=url))
        assert pointers(refused) == {"/url"}
        assert refused.json()["errors"][0]["code"] == "address_not_allowed"
    assert client.get("/v1/webhooks").json() == {"items": []}


def test_a_webhook_can_be_told_of_every_type_of_event_that_there_is() -> None:
    facts = {kind.model_fields["type"].default for kind in get_args(get_args(TELEMETRY_EVENT._type)[0])}
    facts -= {kind.model_fields["type"].default for kind in (StepMetrics, BatchNormSample, LogLine)}  # no events
    steering = {value for name, value in vars(events).items() if name.isupper()}
    assert {*Topic} == facts | steering | {"*"}
