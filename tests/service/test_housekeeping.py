"""What the service forgets by itself, on both databases, by a clock that stands until it is moved."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.errors import Gone
from service.housekeeping import LEASE, Housekeeper
from service.jobs import AuditEntry, JobState, attempt_id
from service.store import JobStore, Retention
from tests.postgresql import PostgresServer
from tests.service.store.clock import Clock
from tests.service.store.telling import batch, spec, started, step

OpenStore = Callable[[], JobStore]

DAY_S = 86_400.0
HOUR_S = 3600.0
POLICY = Retention(metrics_days=10)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[OpenStore]:
    """Opens stores on one database, each as another service would; they are closed at the test's end."""
    server: PostgresServer | None = request.getfixturevalue("postgresql") if request.param == "postgresql" else None
    url = server.url(server.new_database()) if server else None

    def open_one() -> JobStore:
        opened = JobStore.connect(url, clock=clock) if url else JobStore.open(tmp_path / "jobs.sqlite", clock=clock)
        stack.callback(opened.close)
        return opened

    with ExitStack() as stack:
        yield open_one


def _ended_job(store: JobStore) -> str:
    job, token = store.start_attempt(store.create(spec())[0])
    store.ingest(attempt_id(job.id, 1), token, batch([started(), step(1)]))
    store.transition(store.transition(job, JobState.RUNNING), JobState.SUCCEEDED)
    store.audit.append(AuditEntry(action="POST /v1/jobs", target=job.id, status=201, request_id="r"))
    return job.id


def test_one_of_the_services_forgets_when_it_is_time_and_another_when_that_one_is_gone(
    open_store: OpenStore, clock: Clock
) -> None:
    stores = open_store(), open_store()
    first, second = (
        Housekeeper(store, POLICY, 20, every_s=HOUR_S, holder=name)
        for store, name in zip(stores, ("first", "second"), strict=True)
    )
    job = _ended_job(stores[0])
    assert (first.tidy(), second.tidy()) == (True, False)
    clock.advance(9.9 * DAY_S)
    assert (second.tidy(), first.tidy()) == (True, False)  # the first was away for longer than its turn lasts
    assert stores[0].metric_names(job) == ["train/learning_rate", "train/loss", "train/step_s"]
    clock.advance(0.2 * DAY_S)
    assert (first.tidy(), second.tidy()) == (True, False)
    with pytest.raises(Gone):
        stores[1].metric_names(job)
    assert len(stores[0].audit.page().items) == 1
    clock.advance(10 * DAY_S)
    assert first.tidy()
    assert [record.action for record in stores[0].audit.page().items] == ["audit trim"]
    assert stores[0].get(job).state is JobState.SUCCEEDED


def test_it_begins_with_the_service_and_stops_in_the_middle_when_that_stops(
    open_store: OpenStore, clock: Clock
) -> None:
    store = open_store()
    job = _ended_job(store)
    clock.advance(11 * DAY_S)
    stopped = threading.Event()
    stopped.set()
    housekeeper = Housekeeper(store, POLICY, None, every_s=HOUR_S, holder="one")
    housekeeper.tidy(stopped.is_set)
    assert store.metric_names(job)
    stopping = threading.Event()
    thread = threading.Thread(target=housekeeper.run, args=(stopping,))
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not _is_forgotten(store, job):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        stopping.set()
        thread.join(20)
    assert not thread.is_alive()
    assert store.acquire_lease(LEASE, "other", 1.0) is None
    assert len(store.audit.page().items) == 1


def test_a_service_that_starts_forgets_what_its_settings_say(tmp_path: Path) -> None:
    store = JobStore.open(tmp_path / "syncbn.sqlite")
    job = _ended_job(store)
    environment = {
        "PATH": os.environ["PATH"],
        "SYNCBN_DATA_DIR": str(tmp_path),
        "SYNCBN_PORT": "0",
        "SYNCBN_RAY_ADDRESS": "http://127.0.0.1:9",  # no head of its own: nothing here needs one
        "SYNCBN_KEEP_METRICS_DAYS": "0",
    }
    command = [sys.executable, "-m", "service", "serve", "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as service:
        try:
            deadline = time.monotonic() + 60
            while not _is_forgotten(store, job):
                assert service.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            service.send_signal(signal.SIGINT)
            _, log = service.communicate(timeout=30)
        finally:
            service.kill()
    assert b'"metrics": 1' in log
    assert store.logs(job) == []
    assert store.get(job).state is JobState.SUCCEEDED
    store.close()


def _is_forgotten(store: JobStore, job_id: str) -> bool:
    try:
        store.metric_names(job_id)
    except Gone:
        return True
    return False
