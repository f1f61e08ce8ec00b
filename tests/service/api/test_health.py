from fastapi.testclient import TestClient

from tests.service.api.house import House


def test_the_process_says_that_it_lives(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "ok"}


def test_it_is_ready_when_every_part_is(client: TestClient, house: House) -> None:
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "parts": {"store": "ok", "cluster": "ok"}})
    house.parts["cluster"] = "nothing answers at http://head:8265"
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["parts"] == {"store": "ok", "cluster": "nothing answers at http://head:8265"}
