import asyncio
import time
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from service.api.doorkeeper import REMEMBERED_S, Doorkeeper
from service.api.gate import Gate
from service.api.rates import Rate, RateLimits, neighbourhood
from service.errors import Unauthorized
from service.jobs import PrincipalTerms, Role
from service.store import JobStore
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.store.telling import spec

TOKEN = "operator-token-of-the-tests"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}
WRONG = {"Authorization": "Bearer wrong"}


def test_a_rate_lets_so_many_pass_for_each_name() -> None:
    rate = Rate("requests", "3/year")
    told = [rate.take("alice") for _ in range(4)]
    assert [(one.allowed, one.remaining) for one in told] == [(True, 2), (True, 1), (True, 0), (False, 0)]
    assert told[-1].reset_s >= 1
    assert (rate.look("bob").allowed, rate.look("bob").remaining) == (True, 3)
    assert rate.take("bob").headers["RateLimit-Policy"] == f'"requests";q=3;w={360 * 86400}'


def test_a_rate_lets_more_pass_when_its_window_has_moved() -> None:
    rate = Rate("requests", "2/second")
    while rate.take("alice").allowed:
        pass
    deadline = time.monotonic() + 20
    while not rate.look("alice").allowed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert rate.take("alice").allowed


@pytest.mark.parametrize("rate", ["", "3", "many/second", "3/fortnight"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match=r"rate limit|granularity"):
        Rate("requests", rate)


@pytest.mark.parametrize(
    ("address", "counted_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_neighbours_that_one_caller_commands_count_as_one(address: str, counted_as: str) -> None:
    assert neighbourhood(address) == counted_as


def test_who_asks_too_often_waits_and_nobody_else(house: House) -> None:
    house.limits = RateLimits(requests="3/year")
    with house.client(api_token=TOKEN) as client:
        alice, bob = house.key("alice", Role.READER), house.key("bob", Role.READER)
        for left in (2, 1, 0):
            answer = client.get("/v1/jobs", headers=alice)
            assert answer.status_code == 200
            assert answer.headers["RateLimit"].startswith(f'"requests";r={left};t=')
        over = client.get("/v1/whoami", headers=alice)
        assert (over.status_code, over.json()["code"], over.json()["retryable"]) == (429, "too_many_requests", True)
        assert int(over.headers["Retry-After"]) >= 1
        assert over.headers["RateLimit-Policy"].startswith('"requests";q=3;w=')
        assert client.get("/v1/jobs", headers=bob).status_code == 200
        assert client.get("/livez").status_code == 200


def test_all_keys_of_a_principal_share_its_rate(house: House) -> None:
    house.limits = RateLimits(requests="2/year")
    with house.client() as client:
        keys = [house.key("alice", Role.READER) for _ in range(3)]
        assert [client.get("/v1/whoami", headers=key).status_code for key in keys] == [200, 200, 429]


def test_where_no_keys_are_asked_for_nobody_is_counted(house: House) -> None:
    house.limits = RateLimits(requests="1/year")
    with house.client() as client:
        for _ in range(3):
            answer = client.get("/v1/whoami")
            assert answer.status_code == 200
            assert "RateLimit" not in answer.headers


def test_after_too_many_wrong_keys_guessing_goes_on_in_the_dark(house: House) -> None:
    """The operator's token, which a person chose, is not looked at any more; a stored key cannot be guessed."""
    house.limits = RateLimits(refusals="3/year")
    with house.client(api_token=TOKEN) as client:
        alice = house.key("alice", Role.READER)
        assert client.get("/v1/whoami", headers=OPERATOR).status_code == 200
        assert [client.get("/v1/whoami", headers=WRONG).status_code for _ in range(5)] == [401] * 3 + [429] * 2
        assert client.get("/v1/whoami").status_code == 429
        assert client.get("/v1/whoami", headers=OPERATOR).status_code == 429
        assert client.get("/v1/whoami", headers=alice).status_code == 200


def test_a_stream_ends_soon_after_its_key(house: House) -> None:
    job, _ = house.store.create(spec(), owner="alice")
    alice = house.key("alice", Role.READER)
    app = house.app()
    app.add_middleware(Gate, doorkeeper=Doorkeeper(house.store, None), limits=RateLimits(), recheck_s=0.1)
    with (
        listening(app) as url,
        httpx2.Client(base_url=url, headers=alice, trust_env=False, timeout=30) as client,
        client.stream("GET", f"/v1/jobs/{job.id}/stream") as answer,
    ):
        messages = iter(httpx2.EventSource(answer))
        assert next(messages).event == "event"
        assert client.get("/v1/whoami").status_code == 200
        house.store.keys.revoke(house.store.keys.page()[0].id)
        assert "end" not in [message.event for message in messages]
        assert client.get("/v1/whoami").status_code == 401


def test_what_another_service_changes_of_keys_is_noticed_in_a_stated_time(house: House, tmp_path: Path) -> None:
    key = house.key("alice", Role.READER)["Authorization"].removeprefix("Bearer ")
    patient, hasty = (Doorkeeper(house.store, None, remembered_s=s) for s in (60.0, 0.05))
    for doorkeeper in (patient, hasty):
        assert asyncio.run(doorkeeper.identify_and_remember(key)).principal.name == "alice"
    other = JobStore.open(tmp_path / "jobs.sqlite")
    other.keys.revoke(other.keys.page()[0].id)
    other.close()
    assert patient.recall(key) is not None
    deadline = time.monotonic() + 20
    while hasty.recall(key) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(Unauthorized, match="was revoked"):
        asyncio.run(hasty.identify_and_remember(key))
    house.store.principals.put("bob", PrincipalTerms(role=Role.READER))
    assert patient.recall(key) is None  # what this process changes counts at once
    assert REMEMBERED_S == 5.0  # as docs/security.md says


def test_reports_without_the_attempts_token_are_refused_unread_and_counted(house: House) -> None:
    house.limits = RateLimits(refusals="4/year")
    job, token = house.running_job()
    door = f"/v1/attempts/{job.id}-1/telemetry"
    doors = [door, f"/v1/attempts/{job.id}-{'9' * 30}/telemetry", "/v1/attempts/none", door, door]
    with house.client() as client:
        json = {"Content-Type": "application/json"}
        answers = [client.post(path, content="{no json", headers=json) for path in doors]
        assert [answer.status_code for answer in answers] == [401] * 4 + [429]
        right = {"Authorization": f"Bearer {token}"}
        assert client.post(door, json={"batches": []}, headers=right).status_code == 200


def test_right_keys_are_no_refusals(house: House) -> None:
    house.limits = RateLimits(refusals="1/year")
    with TestClient(house.app(TOKEN), base_url="http://127.0.0.1") as client:
        for _ in range(3):
            assert client.get("/v1/whoami", headers=OPERATOR).status_code == 200
