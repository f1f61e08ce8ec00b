import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.jobs import JobState, Phase
from service.store import JobStore, Lease, LeaseLost
from tests.postgresql import PostgresServer
from tests.service.store.clock import Clock
from tests.service.store.conftest import OpenStore
from tests.service.store.rival import ask_for_the_lease
from tests.service.store.telling import spec


def taken(store: JobStore, holder: str, ttl_s: float = 10.0) -> Lease:
    lease = store.acquire_lease("scheduler", holder, ttl_s)
    assert lease is not None
    return lease


def test_one_holder_at_a_time_and_each_change_of_holder_has_a_new_token(store: JobStore, clock: Clock) -> None:
    first = taken(store, "a")
    assert (first.token, (first.expires_at - clock.now).total_seconds()) == (1, 10)
    clock.advance(10 - 1e-6)
    assert store.acquire_lease("scheduler", "b", 10.0) is None
    assert store.acquire_lease("another", "b", 10.0) is not None
    assert taken(store, "a").token == 1
    clock.advance(10 - 1e-6)
    assert store.acquire_lease("scheduler", "b", 10.0) is None  # asking again has renewed it
    clock.advance(1e-6)
    assert taken(store, "b").token == 2
    clock.advance(60)
    assert taken(store, "b").token == 2  # expired, but nobody came between
    assert store.acquire_lease("scheduler", "a", 10.0) is None


def test_a_lease_is_renewed_until_another_has_taken_it(store: JobStore, clock: Clock) -> None:
    lease = taken(store, "a")
    clock.advance(9)
    assert store.renew_lease(lease, 10.0)
    clock.advance(9)
    assert store.acquire_lease("scheduler", "b", 10.0) is None
    clock.advance(5)
    assert store.renew_lease(lease, 10.0)  # late, and still nobody's else
    clock.advance(10)
    taken(store, "b")
    assert not store.renew_lease(lease, 10.0)
    assert store.acquire_lease("scheduler", "a", 10.0) is None


def test_a_lease_that_is_given_back_is_free_at_once_and_no_longer_good(store: JobStore) -> None:
    lease = taken(store, "a")
    store.release_lease(lease)
    assert not store.renew_lease(lease, 10.0)
    again = taken(store, "a")
    assert again.token == 2
    store.release_lease(lease)  # of the former holder: without effect
    assert store.renew_lease(again, 10.0)
    store.release_lease(again)
    assert taken(store, "b").token == 3


def test_whoever_lost_the_lease_can_write_nothing(store: JobStore, clock: Clock) -> None:
    job, _ = store.create(spec())
    waiting, _ = store.create(spec())
    late = taken(store, "late")
    held = store.transition(store.start_attempt(job, late)[0], JobState.RUNNING, lease=late)
    clock.advance(10)
    current = taken(store, "current")
    before = (store.unfinished(), store.events(job.id), store.events(waiting.id))
    with pytest.raises(LeaseLost, match="late no longer holds the lease scheduler"):
        store.transition(held, JobState.SUCCEEDED, lease=late)
    with pytest.raises(LeaseLost):
        store.describe(waiting.id, phase=Phase.WAITING_RESOURCES, lease=late)
    with pytest.raises(LeaseLost):
        store.start_attempt(waiting, late)
    with pytest.raises(LeaseLost):
        store.set_queue_positions({waiting.id: 1}, late)
    assert (store.unfinished(), store.events(job.id), store.events(waiting.id)) == before
    assert store.transition(held, JobState.SUCCEEDED, lease=current).state is JobState.SUCCEEDED
    store.set_queue_positions({waiting.id: 1}, current)
    assert store.get(waiting.id).queue_position == 1


def test_of_many_that_ask_at_once_one_gets_the_lease(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(4)]
    barrier = threading.Barrier(len(stores))

    def ask(index: int) -> Lease | None:
        barrier.wait(30)
        return stores[index].acquire_lease("scheduler", f"holder {index}", 10.0)

    with ThreadPoolExecutor(len(stores)) as pool:
        answers = list(pool.map(ask, range(len(stores))))
    assert [lease.token for lease in answers if lease is not None] == [1]


def test_holders_that_take_turns_never_write_at_the_same_time(open_store: OpenStore) -> None:
    """What holders write is stored in one block for each token, in the order of the tokens."""
    stores = [open_store() for _ in range(3)]
    job, _ = stores[0].create(spec())
    barrier = threading.Barrier(len(stores))

    def work(index: int) -> set[int]:
        store, tokens = stores[index], set()
        for _ in range(15):
            barrier.wait(60)
            lease = store.acquire_lease("scheduler", str(index), 0.0)  # anyone may take it over at any time
            assert lease is not None
            tokens.add(lease.token)
            try:
                for number in range(3):
                    store.describe(job.id, detail=f"{lease.token} {number}", lease=lease)
            except LeaseLost:
                continue
        return tokens

    with ThreadPoolExecutor(len(stores)) as pool:
        held = list(pool.map(work, range(len(stores))))
    assert sum(map(len, held)) == len(set.union(*held)) > 15  # no token had two holders
    said = [event.body["detail"] for event in stores[0].events(job.id) if event.type == "phase_changed"]
    written = [int(detail.split(" ")[0]) for detail in said]
    assert written == sorted(written)


def test_of_processes_that_ask_at_once_one_gets_the_lease(postgresql: PostgresServer) -> None:
    url = postgresql.url(postgresql.new_database())
    store = JobStore.connect(url)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    rival = context.Process(target=ask_for_the_lease, args=(url.get_secret_value(), start))
    rival.start()
    try:
        start.wait(60)
        lease = store.acquire_lease("scheduler", "me", 60.0)
        rival.join(60)
        assert rival.exitcode == (1 if lease is None else 0)
    finally:
        rival.kill()
        rival.join()
        store.close()
