"""What only a server can do: go away, come back, and be shared."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, select

from service.errors import StoreUnavailable
from service.jobs import JobState, Phase
from service.store import JobStore
from service.store.engine import MAX_TRIES
from service.store.jobs import change_state
from service.store.leases import require_lease
from service.store.postgresql import MAX_CONNECTIONS
from service.store.schema import jobs
from tests.postgresql import PostgresServer
from tests.service.store.telling import spec


@pytest.fixture
def database(postgresql: PostgresServer) -> str:
    return postgresql.new_database()


@pytest.fixture
def store(postgresql: PostgresServer, database: str) -> Iterator[JobStore]:
    opened = JobStore.connect(postgresql.url(database), busy_timeout_s=0.2)
    yield opened
    opened.close()


def test_a_server_that_restarts_is_unavailable_meanwhile_and_then_used_again(
    postgresql: PostgresServer, store: JobStore
) -> None:
    job, _ = store.create(spec(), "key")
    postgresql.stop()
    try:
        before = time.monotonic()
        for ask in (store.ping, store.unfinished, lambda: store.create(spec())):
            with pytest.raises(StoreUnavailable, match=r"does not answer: .*SYNCBN_DATABASE_URL"):
                ask()
        assert time.monotonic() - before < 30
    finally:
        postgresql.start()
    assert store.create(spec(), "key") == (job, False)
    store.ping()


def test_a_connection_that_was_cut_is_replaced_before_it_is_used(
    postgresql: PostgresServer, database: str, store: JobStore
) -> None:
    store.ping()
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    assert postgresql.execute(cut) != []
    store.ping()
    job, _ = store.create(spec())

    def be_cut_off(connection: Connection) -> None:
        connection.execute(jobs.update().values(detail="half done"))
        postgresql.execute(cut)
        connection.execute(select(jobs.c.id))

    with pytest.raises(StoreUnavailable):
        store._database.transact(be_cut_off)
    assert store.get(job.id) == job


def test_a_job_that_another_holds_is_waited_for_no_longer_than_the_timeout(
    postgresql: PostgresServer, database: str, store: JobStore
) -> None:
    held, _ = store.create(spec())
    free, _ = store.create(spec())
    with psycopg.connect(postgresql.url(database).get_secret_value()) as other:
        other.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (held.id,))
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            store.transition(held, JobState.CANCELLED)
        assert store.get(held.id) == held  # readers wait for nobody
        store.transition(free, JobState.CANCELLED)
    store.transition(held, JobState.CANCELLED)


@pytest.fixture
def patient(postgresql: PostgresServer, database: str) -> Iterator[JobStore]:
    opened = JobStore.connect(postgresql.url(database), busy_timeout_s=60)
    yield opened
    opened.close()


def wait_until_blocked(postgresql: PostgresServer, database: str, late: Future[Any]) -> None:
    """Return once a writer waits for another one's lock; fail where ``late`` did not have to."""
    waiting = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database}' AND wait_event_type = 'Lock'"
    deadline = time.monotonic() + 30
    while not postgresql.execute(waiting):
        assert not late.done(), "it did not wait"
        assert time.monotonic() < deadline


def test_nothing_is_said_of_a_job_that_ends_meanwhile(
    postgresql: PostgresServer, database: str, patient: JobStore
) -> None:
    job, _ = patient.create(spec())
    with ThreadPoolExecutor(1) as pool:
        with patient._database.write() as connection:
            change_state(connection, job, JobState.CANCELLED, phase=None, reason=None, detail="", now=job.created_at)
            late = pool.submit(patient.describe, job.id, phase=Phase.WAITING_CLUSTER)
            wait_until_blocked(postgresql, database, late)
        assert late.result(30).phase is None
    assert len(patient.events(job.id)) == 2


def test_a_lease_is_not_taken_over_while_its_holder_writes(
    postgresql: PostgresServer, database: str, patient: JobStore
) -> None:
    lease = patient.acquire_lease("scheduler", "a", 0.0)
    with ThreadPoolExecutor(1) as pool:
        with patient._database.write() as connection:
            require_lease(connection, lease)
            late = pool.submit(patient.acquire_lease, "scheduler", "b", 10.0)
            wait_until_blocked(postgresql, database, late)
        taken = late.result(30)
    assert taken is not None
    assert taken.token == 2


def test_writers_that_wait_for_each_other_in_a_circle_are_both_done_in_the_end(store: JobStore) -> None:
    made = [store.create(spec())[0].id for _ in range(2)]
    both_hold_one = threading.Barrier(2)
    tries: list[int] = []

    def swap(first: int) -> int:
        mine: list[int] = []

        def work(connection: Connection) -> int:
            mine.append(first)
            for which in (first, 1 - first):
                connection.execute(jobs.update().where(jobs.c.id == made[which]).values(detail=f"{first}"))
                if which == first and len(mine) == 1:
                    both_hold_one.wait(30)
            return first

        answer = store._database.transact(work)
        tries.append(len(mine))
        return answer

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(swap, range(2))) == [0, 1]
    assert sorted(tries) == [1, 2]
    assert MAX_TRIES > 2
    assert len({store.get(job_id).detail for job_id in made}) == 1


def test_more_threads_than_connections_wait_for_one(postgresql: PostgresServer, database: str) -> None:
    store = JobStore.connect(postgresql.url(database), busy_timeout_s=20)
    with ThreadPoolExecutor(MAX_CONNECTIONS + 8) as pool:
        list(pool.map(lambda _: store.ping(), range(200)))
    open_now = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'"
    assert postgresql.execute(open_now)[0][0] <= MAX_CONNECTIONS
    store.close()


def test_a_database_that_cannot_keep_every_text_is_refused(postgresql: PostgresServer) -> None:
    with pytest.raises(StoreUnavailable, match=r"LATIN1; make it with .* ENCODING 'UTF8'"):
        JobStore.connect(postgresql.url(postgresql.new_database("LATIN1")))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://anna:{}@127.0.0.1:1/jobs",
        "postgres://anna:{}@127.0.0.1:1/jobs",
        "postgresql://anna:{}@127.0.0.1:notaport/jobs",
        "mysql://anna:{}@127.0.0.1/jobs",
        "anna:{}@127.0.0.1",
    ],
)
def test_no_message_holds_the_password(url: str) -> None:
    password = "hun/ter2 & more"
    with pytest.raises(StoreUnavailable) as caught:
        JobStore.connect(SecretStr(url.format(quote(password, safe=""))))
    error: BaseException | None = caught.value
    while error is not None:
        for secret in (password, quote(password, safe="")):
            assert secret not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__
