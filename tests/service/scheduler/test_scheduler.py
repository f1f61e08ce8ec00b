"""The scheduler over a real store, with the scripted launcher for a cluster."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.jobs import (
    AttemptEnded,
    Control,
    Job,
    JobSpec,
    JobState,
    LaunchRequest,
    Outcome,
    Phase,
    Reason,
    TelemetryEvent,
)
from service.scheduler import LaunchState, Scheduler, ScriptedLauncher
from service.store import JobStore
from tests.service.store.telling import batch, started, step


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    yield store
    store.close()


class Cluster(ScriptedLauncher):
    """A scripted launcher that remembers each attempt's token, so that a test can report for its ranks."""

    def __init__(self, store: JobStore, **arguments: Any) -> None:
        super().__init__(on_launch=self._remember, **arguments)
        self._store = store
        self._tokens: dict[str, str] = {}
        self._sent: dict[tuple[str, int], int] = {}

    def _remember(self, request: LaunchRequest, token: str) -> None:
        self._tokens[request.attempt_id] = token

    def report(self, attempt: str, *events: TelemetryEvent, rank: int = 0) -> Control:
        first = self._sent.get((attempt, rank), 0)
        self._sent[attempt, rank] = first + len(events)
        return self._store.ingest(attempt, self._tokens[attempt], batch(events, rank, first)).control

    def start_ranks(self, attempt: str) -> None:
        for rank in (0, 1):
            self.report(attempt, started(), rank=rank)


def scheduler(store: JobStore, launcher: ScriptedLauncher, tmp_path: Path) -> Scheduler:
    return Scheduler(
        store,
        launcher,
        ingest_url="http://127.0.0.1:1",
        storage=tmp_path,
        observe_every_s=0,
        capacity_every_s=0,
    )


def submit(store: JobStore, **fields: Any) -> Job:
    return store.create(JobSpec(**{"name": "t", "epochs": 1, **fields}))[0]


def test_a_job_goes_from_queued_to_succeeded(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    ticker.tick()
    assert store.get(job.id).state is JobState.STARTING
    (request,) = cluster.launched
    assert (request.attempt_id, request.spec) == (f"{job.id}-1", job.spec)
    assert request.storage == str(tmp_path / job.id)
    cluster.start_ranks(request.attempt_id)
    ticker.tick()
    assert store.get(job.id).state is JobState.RUNNING
    cluster.report(
        request.attempt_id,
        step(1, loss=0.5),
        AttemptEnded(outcome=Outcome.SUCCEEDED),
    )
    ticker.tick()
    done = store.get(job.id)
    assert done.state is JobState.SUCCEEDED
    assert done.finished_at is not None
    moves = [e.body["to"] for e in store.events(job.id) if e.type == "state_changed"]
    assert moves[-3:] == ["starting", "running", "succeeded"]


def test_a_lost_worker_is_answered_by_a_new_attempt_once_the_old_one_is_gone(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    ticker.tick()
    first = f"{job.id}-1"
    cluster.start_ranks(first)
    ticker.tick()
    cluster.report(first, AttemptEnded(outcome=Outcome.FAILED, reason=Reason.WORKER_LOST, detail="rank 1 died"))
    ticker.tick()
    assert (store.get(job.id).state, store.get(job.id).reason) == (JobState.RECOVERING, Reason.WORKER_LOST)
    ticker.tick()  # the cluster still has it running: it is stopped first
    assert cluster.stopped == [first]
    ticker.tick()
    assert [request.attempt for request in cluster.launched] == [1, 2]
    assert cluster.report(first) is Control.ABORT  # a survivor of the old attempt is turned away
    assert cluster.report(f"{job.id}-2") is Control.CONTINUE


def test_a_job_is_given_up_when_its_budget_is_spent(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    for _ in range(40):
        ticker.tick()
        current = store.get(job.id)
        if current.state.terminal:
            break
        if current.state is JobState.STARTING:
            cluster.finish(f"{job.id}-{current.attempt}", LaunchState.FAILED, "exit status 137")
    assert current.state is JobState.FAILED
    assert current.reason is Reason.RUNNER_LOST
    assert [request.attempt for request in cluster.launched] == [1, 2, 3, 4]
    assert "exit status 137" in current.detail
    assert "gave up after 3 recoveries" in current.detail
    assert any("last lines of" in record.text for record in store.logs(job.id))


def test_a_cluster_that_does_not_answer_leaves_the_job_queued_and_says_why(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    cluster.reachable = False
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    ticker.tick()
    waiting = store.get(job.id)
    assert (waiting.state, waiting.phase) == (JobState.QUEUED, Phase.WAITING_CLUSTER)
    assert waiting.reason is Reason.CLUSTER_UNREACHABLE
    assert "told not to answer" in waiting.detail
    assert ticker.cluster_status != "ok"
    cluster.reachable = True
    ticker.tick()
    assert store.get(job.id).state is JobState.STARTING


def test_a_running_job_outlives_a_cluster_that_does_not_answer(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    ticker.tick()
    cluster.start_ranks(f"{job.id}-1")
    ticker.tick()
    cluster.reachable = False
    ticker.tick()
    assert store.get(job.id).state is JobState.RUNNING
    cluster.report(f"{job.id}-1", AttemptEnded(outcome=Outcome.SUCCEEDED))
    ticker.tick()
    assert store.get(job.id).state is JobState.SUCCEEDED


def test_a_cluster_that_forgot_the_attempt_gets_a_new_one(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    ticker.tick()
    cluster.start_ranks(f"{job.id}-1")
    ticker.tick()
    cluster.forget(f"{job.id}-1")
    ticker.tick()
    assert store.get(job.id).reason is Reason.RUNNER_LOST
    ticker.tick()
    assert store.get(job.id).attempt == 2


def test_a_cancelled_job_holds_nothing_when_it_says_cancelled(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    ticker.tick()
    store.transition(store.get(job.id), JobState.CANCELLING, reason=Reason.CANCELLED_BY_USER)
    ticker.tick()
    assert store.get(job.id).state is JobState.CANCELLING
    ticker.tick()
    assert store.get(job.id).state is JobState.CANCELLED
    assert cluster.observe(f"{job.id}-1").state is LaunchState.STOPPED


def test_jobs_wait_their_turn_and_are_told_why(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store, num_cpus=2)
    ticker = scheduler(store, cluster, tmp_path)
    first, second, third = submit(store), submit(store), submit(store, num_workers=1)
    ticker.tick()
    assert [store.get(j.id).state for j in (first, second, third)] == [
        JobState.STARTING,
        JobState.QUEUED,
        JobState.QUEUED,
    ]
    assert store.get(second.id).phase is Phase.WAITING_RESOURCES
    assert second.id in store.get(third.id).detail


def test_a_job_that_waited_too_long_fails_with_its_last_reason(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    cluster.reachable = False
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store, timeouts={"queue_s": 1e-6})
    ticker.tick()
    assert (store.get(job.id).state, store.get(job.id).reason) == (JobState.FAILED, Reason.QUEUE_DEADLINE)


def test_a_new_scheduler_takes_up_what_the_old_one_left(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    job = submit(store)
    scheduler(store, cluster, tmp_path).tick()
    cluster.start_ranks(f"{job.id}-1")
    successor = scheduler(store, cluster, tmp_path)
    successor.tick()
    assert store.get(job.id).state is JobState.RUNNING
    assert len(cluster.launched) == 1
