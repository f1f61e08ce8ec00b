"""Server-sent events over a real socket."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx2
import pytest

from service.jobs import JobState, LogLine, Topic
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.store.telling import drift, evaluation, spec, started, step


@contextmanager
def following(url: str, **headers: str) -> Iterator[Iterator[httpx2.ServerSentEvent]]:
    with httpx2.stream("GET", url, headers=headers, timeout=20) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield iter(httpx2.EventSource(answer))


def _kind(message: httpx2.ServerSentEvent) -> tuple[str, Any]:
    payload = json.loads(message.data)
    return message.event, payload["seq"] if message.event == "event" else payload.get("step", payload.get("state"))


def test_a_finished_job_is_told_whole_and_then_ended(house: House) -> None:
    job, _ = house.running_job(started(), step(3))
    house.store.transition(job, JobState.SUCCEEDED)
    with listening(house.app()) as url, following(f"{url}/v1/jobs/{job.id}/stream") as messages:
        told = [_kind(message) for message in messages]
    assert told == [*[("event", seq) for seq in range(1, 6)], ("progress", 3), ("end", "succeeded")]


def test_a_running_job_is_told_as_it_happens(house: House) -> None:
    job, token = house.running_job(started())
    with listening(house.app()) as url, following(f"{url}/v1/jobs/{job.id}/stream") as messages:
        told = [_kind(next(messages)) for _ in range(5)]
        assert told == [*[("event", seq) for seq in range(1, 5)], ("progress", 0)]
        house.tell(job, token, step(1), first_seq=1)
        assert _kind(next(messages)) == ("progress", 1)
        house.store.transition(job, JobState.FAILED)
        assert [_kind(message) for message in messages] == [("event", 5), ("end", "failed")]


@pytest.mark.parametrize(
    ("query", "headers"), [("?after=3", {}), ("", {"Last-Event-ID": "3"}), ("?after=1", {"Last-Event-ID": "3"})]
)
def test_a_reader_goes_on_where_it_left(house: House, query: str, headers: dict[str, str]) -> None:
    job, _ = house.running_job(started(), started())
    house.store.transition(job, JobState.FAILED)
    with listening(house.app()) as url, following(f"{url}/v1/jobs/{job.id}/stream{query}", **headers) as messages:
        told = list(messages)
    assert [message.id for message in told if message.event == "event"] == ["4", "5", "6"]
    assert told[-1].event == "end"


def test_every_one_of_many_readers_is_told_everything_wherever_it_begins(house: House) -> None:
    job, token = house.running_job(started())
    with listening(house.app()) as url, ExitStack() as stack:
        starts = [0, 2, 4] * 10
        readers = [stack.enter_context(following(f"{url}/v1/jobs/{job.id}/stream?after={start}")) for start in starts]
        for number in range(1, 251):
            house.tell(job, token, started(), first_seq=number)
        house.store.transition(job, JobState.FAILED)
        for start, reader in zip(starts, readers, strict=True):
            told = list(reader)
            seqs = [int(message.id) for message in told if message.event == "event"]
            assert seqs == list(range(start + 1, 256))
            assert told[-1].event == "end"


def test_a_long_history_is_told_without_a_hole(house: House) -> None:
    job, _ = house.running_job(*[started() for _ in range(450)])
    house.store.transition(job, JobState.FAILED)
    with listening(house.app()) as url, following(f"{url}/v1/jobs/{job.id}/stream") as messages:
        seqs = [int(message.id) for message in messages if message.event == "event"]
    assert seqs == list(range(1, 455))


def test_progress_is_told_at_most_twice_a_second(house: House) -> None:
    job, token = house.running_job(started())
    leave = threading.Event()

    def keep_telling() -> None:
        number = 1
        while not leave.wait(0.02):
            house.tell(job, token, step(number), first_seq=number)
            number += 1

    teller = threading.Thread(target=keep_telling)
    num_told = 0
    with listening(house.app()) as url:
        before = time.monotonic()
        with following(f"{url}/v1/jobs/{job.id}/stream") as messages:
            teller.start()
            try:
                while num_told < 4:
                    num_told += next(messages).event == "progress"
            finally:
                leave.set()
                teller.join(10)
    # Between four messages there are three pauses of half a second; a slow machine only makes them longer.
    assert time.monotonic() - before >= 1.5


def test_an_open_stream_leaves_when_the_service_stops(house: House) -> None:
    job, _ = house.store.create(spec())
    stopping = threading.Event()
    with listening(house.app(stopping=stopping)) as url, following(f"{url}/v1/jobs/{job.id}/stream") as messages:
        assert next(messages).event == "event"
        before = time.monotonic()
        stopping.set()
        assert list(messages) == []
        assert time.monotonic() - before < 5


def test_a_reader_that_leaves_does_not_keep_the_service(house: House) -> None:
    job, _ = house.store.create(spec())
    with listening(house.app()) as url:
        for _ in range(3):
            with following(f"{url}/v1/jobs/{job.id}/stream") as messages:
                next(messages)
        before = time.monotonic()
    assert time.monotonic() - before < 5


def test_a_reader_may_ask_for_some_types_of_events_alone(house: House) -> None:
    job, token = house.running_job(started(), *[evaluation(n) for n in range(1, 4)], drift(3, bn=0.1))
    path = f"/v1/jobs/{job.id}"
    wanted = "types=evaluation&types=rank_started"
    with listening(house.app()) as url, following(f"{url}{path}/stream?{wanted}&after=4") as messages:
        told = [next(messages) for _ in range(3)]
        assert [message.id for message in told if message.event == "event"] == ["5", "6", "7"]
        house.tell(job, token, drift(4, bn=0.1), evaluation(4), first_seq=5)
        house.store.transition(house.store.get(job.id), JobState.FAILED)
        rest = [message for message in messages if message.event != "progress"]
        assert [(message.event, message.id) for message in rest] == [("event", "10"), ("end", "10")]
    with house.client() as client:
        for query, seqs in (
            (wanted, [4, 5, 6, 7, 10]),
            (f"{wanted}&limit=2&after=4", [5, 6]),
            ("types=*&after=9", [10, 11]),
        ):
            assert [event["seq"] for event in client.get(f"{path}/events?{query}").json()["items"]] == seqs
        for route in ("events", "stream"):
            refused = client.get(f"{path}/{route}?types=evaluation&types=evaluations")
            assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
            (problem,) = refused.json()["errors"]
            assert problem["pointer"] == "/types/1"
            assert all(f"'{topic}'" in problem["message"] for topic in Topic)


def test_a_reader_from_a_history_that_is_no_more_is_told_where_it_begins_anew(house: House) -> None:
    job, token = house.running_job(started(), LogLine(text="first"))
    path = f"/v1/jobs/{job.id}"
    with listening(house.app()) as url:
        with following(f"{url}{path}/stream", **{"Last-Event-ID": "9"}) as messages:
            reset, *events = [next(messages) for _ in range(5)]
            assert (reset.event, reset.id) == ("reset", "0")
            assert json.loads(reset.data) == {"asked_seq": 9, "last_seq": 4, "next_seq": 1}
            assert [message.id for message in events] == ["1", "2", "3", "4"]
            # The feed looks only now and then: what another route has told already is no unknown place.
            house.tell(job, token, started(), first_seq=2)
            with following(f"{url}{path}/stream", **{"Last-Event-ID": "5"}) as others:
                house.store.transition(house.store.get(job.id), JobState.FAILED)
                assert [(message.event, message.id) for message in others if message.event != "progress"] == [
                    ("event", "6"),
                    ("end", "6"),
                ]
        with following(f"{url}{path}/logs/stream", **{"Last-Event-ID": "2"}) as lines:
            told = list(lines)
    assert [(line.event, line.id) for line in told] == [("reset", "0"), ("log", "1"), ("end", "1")]


@pytest.mark.parametrize("last", ["x", "-1"])
def test_a_resume_from_nowhere_is_refused(house: House, last: str) -> None:
    job, _ = house.store.create(spec())
    with house.client() as client:
        answer = client.get(f"/v1/jobs/{job.id}/stream", headers={"Last-Event-ID": last})
    assert answer.status_code == 422
    assert [problem["pointer"] for problem in answer.json()["errors"]] == ["/last-event-id"]
