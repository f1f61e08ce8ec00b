"""The client against the real API over a real socket."""

import math
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.client import Client, ServiceUnreachable
from service.errors import Conflict, InvalidRequest, NotFound, PreconditionFailed, ServiceError, Unauthorized
from service.jobs import Job, JobState, LogLine, Progress, Topic
from service.store import JobStore
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.store.telling import drift, evaluation, spec, started, step


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    yield House(store)
    store.close()


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    with listening(house.app()) as url, Client(url) as opened:
        yield opened


def test_a_job_is_submitted_listed_and_cancelled(client: Client, house: House) -> None:
    job = client.submit(spec())
    assert job == house.store.get(job.id) == client.job(job.id)
    assert client.submit(spec(), idempotency_key="k").id == client.submit(spec(), idempotency_key="k").id
    page = client.jobs(limit=1)
    assert page.next_cursor is not None
    assert [found.id for found in client.jobs(cursor=page.next_cursor).items] == [job.id]
    assert client.cancel(job.id).state is JobState.CANCELLED
    assert [found.id for found in client.jobs(states=[JobState.CANCELLED], name="digits").items] == [job.id]


def test_a_job_is_paused_resumed_saved_put_forward_and_taken_up_again(client: Client, house: House) -> None:
    job, _ = house.running_job()
    assert client.checkpoint(job.id).checkpoint_requests == 1
    assert client.pause(job.id).state is JobState.PAUSING
    house.store.transition(house.store.get(job.id), JobState.PAUSED)
    resumed = client.resume(job.id, num_workers=1)
    assert (resumed.state, resumed.spec.num_workers, resumed.spec.batch_size_per_worker) == (JobState.QUEUED, 1, 64)
    assert client.resume(job.id).version == resumed.version
    changed = client.set_priority(job.id, 3, version=resumed.version)
    assert (changed.spec.priority, changed.version) == (3, resumed.version + 1)
    with pytest.raises(PreconditionFailed, match=f"version {changed.version}"):
        client.set_priority(job.id, 4, version=resumed.version)
    with pytest.raises(Conflict, match=":cancel it first"):
        client.retry(job.id)
    client.cancel(job.id)
    new = client.retry(job.id, from_checkpoint=False, idempotency_key="again")
    assert (new.retry_of, new.spec) == (job.id, changed.spec)
    assert client.retry(job.id, idempotency_key="again").id == new.id
    running, _ = house.running_job()
    assert client.cancel(running.id, checkpoint=True).stop_saves


def test_what_a_job_told_is_read(client: Client, house: House) -> None:
    job, _ = house.running_job(
        started(), step(1, math.nan), step(2, 0.5), LogLine(text="hello"), evaluation(2), drift(2, a=0.5, b=1.0)
    )
    assert client.metric_names(job.id) == house.store.metric_names(job.id)
    series = client.metric(job.id, "train/loss", rank=0, first_step=1, last_step=2)
    assert series.steps == (1, 2)
    assert math.isnan(series.values[0])
    assert series.values[1] == 0.5
    assert client.drift(job.id) == [drift(2, a=0.5, b=1.0)]
    assert client.drift(job.id, layer="b") == [drift(2, b=1.0)]
    assert client.events(job.id, after=3, limit=1) == house.store.events(job.id, 3, 1)
    assert [record.text for record in client.logs(job.id)] == ["hello"]
    assert client.logs(job.id, after=1) == []
    assert client.report(job.id).num_steps == 2


def test_the_services_errors_are_raised_as_they_were(client: Client, house: House) -> None:
    house.max_workers = 1
    with pytest.raises(InvalidRequest) as caught:
        client.submit(spec())
    assert [(problem.pointer, problem.code) for problem in caught.value.problems] == [
        ("/num_workers", "cluster_too_small")
    ]
    with pytest.raises(NotFound, match="there is no job job_none"):
        client.job("job_none")
    with pytest.raises(ServiceError, match="nothing at"):
        client.job("../livez")  # an id leads nowhere but to a job
    job, _ = house.running_job()
    house.store.transition(job, JobState.SUCCEEDED)
    with pytest.raises(Conflict, match="already succeeded"):
        client.cancel(job.id)
    with pytest.raises(NotFound):
        list(client.stream("job_none"))


def test_a_token_is_carried(house: House) -> None:
    with listening(house.app(api_token="secret")) as url:
        with Client(url, token="secret") as client:
            client.submit(spec())
        with Client(url) as client, pytest.raises(Unauthorized, match="SYNCBN_API_TOKEN"):
            client.jobs()


def test_readiness_tells_each_part_whether_ready_or_not(client: Client, house: House) -> None:
    assert client.ready() == {"store": "ok", "cluster": "ok"}
    house.parts["cluster"] = "away"
    assert client.ready() == {"store": "ok", "cluster": "away"}


def test_where_nothing_listens_the_error_says_what_to_start() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with Client(url) as client:
            with pytest.raises(ServiceUnreachable, match=rf"{url}.*syncbn serve"):
                client.job("job_x")
            with pytest.raises(ServiceUnreachable, match=url):
                list(client.stream("job_x"))


def test_a_service_that_does_not_answer_in_time_is_unreachable() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout_s=0.1) as client, pytest.raises(ServiceUnreachable, match="does not answer in time"):
            client.job("job_x")


def test_an_answer_of_something_else_is_an_error_with_its_status(house: House) -> None:
    nothing = pytest.raises(ServiceError, match="there is nothing at /elsewhere/v1/jobs")
    with listening(house.app()) as url, Client(f"{url}/elsewhere") as client, nothing as caught:
        client.jobs()
    assert (caught.value.status, caught.value.code, caught.value.retryable) == (404, "no_such_route", False)


def test_a_job_is_followed_to_its_end(client: Client, house: House) -> None:
    job, token = house.running_job(started())
    messages = client.stream(job.id)
    assert [next(messages)[0] for _ in range(4)] == ["state_changed"] * 3 + ["rank_started"]
    house.tell(job, token, step(1, 0.5), first_seq=1)
    kind, payload = next(messages)
    while not (kind == "progress" and payload["step"] == 1):
        kind, payload = next(messages)
    assert Progress.model_validate(payload).train_loss == 0.5
    house.store.transition(job, JobState.SUCCEEDED)
    *_, (kind, payload) = messages
    assert (kind, Job.model_validate(payload).state) == ("end", JobState.SUCCEEDED)


def test_a_stream_goes_on_over_a_restart_of_the_service_without_telling_twice(house: House) -> None:
    job, token = house.running_job()
    with ExitStack() as first:
        url = first.enter_context(listening(house.app()))
        with Client(url) as client:
            messages = client.stream(job.id, after=1)
            told = [next(messages)[1]["seq"] for _ in range(2)]
            first.close()
            house.tell(job, token, started())
            with listening(house.app(), port=int(url.rpartition(":")[2])):
                told.append(next(messages)[1]["seq"])
                house.store.transition(job, JobState.FAILED)
                told += [payload["seq"] for kind, payload in messages if kind == "state_changed"]
    assert told == [2, 3, 4, 5]


def test_some_types_of_events_are_read_and_a_history_that_is_no_more_is_told_anew(client: Client, house: House) -> None:
    job, _ = house.running_job(started(), evaluation(1))
    house.store.transition(job, JobState.SUCCEEDED)
    types = [Topic.EVALUATION, Topic.RANK_STARTED]
    assert [event.seq for event in client.events(job.id, types=types)] == [4, 5]
    told = [(kind, payload.get("seq")) for kind, payload in client.stream(job.id, after=9, types=types)]
    assert [one for one in told if one[0] != "progress"] == [
        ("reset", None),
        ("rank_started", 4),
        ("evaluation", 5),
        ("end", None),
    ]


def test_a_log_is_followed_to_the_end_of_its_job(client: Client, house: House) -> None:
    job, token = house.running_job(LogLine(text="first"))
    lines = client.follow_logs(job.id)
    assert next(lines).text == "first"
    house.tell(job, token, LogLine(text="second"), first_seq=1)
    assert next(lines).text == "second"
    house.store.transition(house.store.get(job.id), JobState.SUCCEEDED)
    assert list(lines) == []


def test_a_spec_is_planned(client: Client, house: House) -> None:
    planned = client.plan(spec(num_workers=house.max_workers + 1))
    assert not planned.feasible
    assert planned.plan.global_batch_size == 32 * (house.max_workers + 1)


def test_a_stream_is_given_up_when_the_service_stays_away(house: House) -> None:
    job, _ = house.running_job()
    with ExitStack() as service:
        url = service.enter_context(listening(house.app()))
        with Client(url) as client:
            messages = client.stream(job.id, patience_s=0.5)
            next(messages)
            service.close()
            with pytest.raises(ServiceUnreachable):
                list(messages)
