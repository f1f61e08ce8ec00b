"""What Prometheus would read, through its own parser."""

import httpx2
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.api.test_stream import following
from tests.service.store.telling import spec, started, step


def _samples(client: TestClient) -> dict[tuple[str, ...], float]:
    """Values by name and label values."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_jobs_are_counted_by_state_and_facts_as_they_come(client: TestClient, house: House) -> None:
    house.store.create(spec())
    house.running_job(started(), step(1), step(2))
    told = _samples(client)
    assert [told["syncbn_jobs", state] for state in ("queued", "running", "paused")] == [1, 1, 0]
    assert told["syncbn_cluster_up",] == 1


def test_requests_are_timed_by_route_not_by_path(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    for _ in range(3):
        assert client.get(f"/v1/jobs/{job.id}").status_code == 200
    counts = {
        labels: value for labels, value in _samples(client).items() if labels[0].endswith("duration_seconds_count")
    }
    assert sum(value for labels, value in counts.items() if "/v1/jobs/{job_id}" in labels) == 3
    assert not any(job.id in label for labels in counts for label in labels)


def test_open_streams_are_counted_while_they_are_open(house: House) -> None:
    job, _ = house.store.create(spec())
    with listening(house.app()) as url, following(f"{url}/v1/jobs/{job.id}/stream") as messages:
        next(messages)
        with following(f"{url}/v1/jobs/{job.id}/stream") as others:
            next(others)
            text = httpx2.get(f"{url}/metrics").text
    assert "syncbn_open_streams 2.0" in text.splitlines()


def test_metrics_ask_for_a_key_where_keys_are_asked_for(house: House) -> None:
    with house.client("secret") as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200
