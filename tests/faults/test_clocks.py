"""Clocks that are set while jobs run and leases are held."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.jobs import Control, JobState, Reason
from service.scheduler import LaunchState
from service.store import JobStore
from tests.service.scheduler.test_scheduler import Cluster, run, scheduler
from tests.service.store.telling import step

HOUR_S = 3600.0


class SettableClock:
    """The system's clock, as someone has set it."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def set(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest.fixture
def store(tmp_path: Path, clock: SettableClock) -> Iterator[JobStore]:
    store = JobStore.open(tmp_path / "jobs.sqlite", clock=clock)
    yield store
    store.close()


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_a_clock_that_is_set_ends_no_job_and_hides_no_silence(
    store: JobStore, clock: SettableClock, tmp_path: Path, seconds: float
) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path, clock=clock)
    lively = run(store, cluster, ticker, timeouts={"heartbeat_s": 60, "idle_s": 60, "stop_grace_s": 60})
    frozen = run(store, cluster, ticker, timeouts={"heartbeat_s": 1})
    ticker.tick()
    clock.set(seconds)
    ticker.tick()
    assert [store.get(job.id).state for job in (lively, frozen)] == [JobState.RUNNING, JobState.RUNNING]
    assert cluster.stopped == []
    assert cluster.report(f"{lively.id}-1", step(1)) is Control.CONTINUE
    deadline = datetime.now(UTC) + timedelta(seconds=60)
    while store.get(frozen.id).state is JobState.RUNNING:
        ticker.tick()
        assert datetime.now(UTC) < deadline
    assert store.get(frozen.id).reason is Reason.NO_HEARTBEAT
    assert store.get(lively.id).state is JobState.RUNNING
    assert [event.seq for event in store.events(lively.id)] == list(range(1, len(store.events(lively.id)) + 1))


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_a_clock_that_is_set_leaves_one_scheduler_that_may_write(
    store: JobStore, clock: SettableClock, tmp_path: Path, seconds: float
) -> None:
    cluster = Cluster(store)
    first = scheduler(store, cluster, tmp_path, clock=clock, lease_ttl_s=60)
    second = scheduler(store, cluster, tmp_path, clock=clock, lease_ttl_s=60)
    job = run(store, cluster, first)
    clock.set(seconds)
    for ticker in (second, first, second):
        ticker.tick()
    # Whoever has the lease by now, the job goes on, and nothing was done twice.
    assert store.get(job.id).state is JobState.RUNNING
    assert len(cluster.launched) == 1
    cluster.finish(f"{job.id}-1", LaunchState.FAILED)
    for ticker in (first, second, first, second):
        ticker.tick()
    assert [request.attempt for request in cluster.launched] == [1, 2]
    assert store.get(job.id).attempt == 2
