"""A job's log, as it is downloaded and as it is followed."""

import json

from fastapi.testclient import TestClient

from service.jobs import JobState, LogLine
from service.store import Retention
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.api.test_stream import following
from tests.service.store.telling import spec


def test_a_log_is_downloaded_whole(client: TestClient, house: House) -> None:
    job, _ = house.running_job(*[LogLine(text=f"line {number}") for number in range(2500)])
    answer = client.get(f"/v1/jobs/{job.id}/logs/download")
    assert answer.headers["content-disposition"] == f'attachment; filename="{job.id}.log"'
    assert [line.rpartition(": ")[2] for line in answer.text.splitlines()] == [f"line {n}" for n in range(2500)]


def test_a_log_is_followed_from_where_the_reader_left(house: House) -> None:
    job, token = house.running_job(*[LogLine(text=f"line {number}") for number in range(3)])
    path = f"/v1/jobs/{job.id}/logs/stream"
    with listening(house.app()) as url, following(f"{url}{path}", **{"Last-Event-ID": "1"}) as log:
        told = [next(log), next(log)]
        assert [(line.event, line.id, json.loads(line.data)["text"]) for line in told] == [
            ("log", "2", "line 1"),
            ("log", "3", "line 2"),
        ]
        house.tell(job, token, LogLine(text="new"), first_seq=3)
        assert json.loads(next(log).data)["text"] == "new"
        house.store.transition(house.store.get(job.id), JobState.FAILED)
        assert [message.event for message in log] == ["end"]


def test_a_log_that_is_no_longer_kept_is_gone_and_not_empty(client: TestClient, house: House) -> None:
    job, _ = house.running_job(LogLine(text="line"))
    house.store.transition(house.store.get(job.id), JobState.FAILED)
    house.store.forget(Retention(logs_days=0))
    for path in ("", "/download", "/stream"):
        answer = client.get(f"/v1/jobs/{job.id}/logs{path}")
        assert (answer.status_code, answer.json()["code"]) == (410, "gone")


def test_a_log_of_no_job_is_not_found(client: TestClient, house: House) -> None:
    house.store.create(spec())
    for path in ("", "/download", "/stream"):
        assert client.get(f"/v1/jobs/job_none/logs{path}").status_code == 404
