"""The scheduler over a real store, with the scripted launcher for a cluster."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.metrics import MEANINGS
from service.jobs import (
    ANONYMOUS,
    AttemptEnded,
    CheckpointSaved,
    Control,
    Job,
    JobSpec,
    JobState,
    LaunchRequest,
    Outcome,
    Phase,
    Quota,
    Reason,
    TelemetryEvent,
)
from service.scheduler import LaunchState, Scheduler, ScriptedLauncher
from service.store import JobStore
from tests.service.store.clock import Clock
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

    def start_ranks(self, attempt: str, num_workers: int = 2) -> None:
        for rank in range(num_workers):
            self.report(attempt, started(), rank=rank)


def scheduler(store: JobStore, launcher: ScriptedLauncher, tmp_path: Path, **arguments: Any) -> Scheduler:
    return Scheduler(
        store,
        launcher,
        ingest_url="http://127.0.0.1:1",
        storage=tmp_path,
        observe_every_s=0,
        capacity_every_s=0,
        **arguments,
    )


def submit(store: JobStore, owner: str = ANONYMOUS, **fields: Any) -> Job:
    return store.create(JobSpec(**{"name": "t", "epochs": 1, **fields}), owner=owner)[0]


def run(store: JobStore, cluster: Cluster, ticker: Scheduler, **fields: Any) -> Job:
    """A running job in its first attempt."""
    job = submit(store, **fields)
    ticker.tick()
    cluster.start_ranks(f"{job.id}-1", job.spec.num_workers)
    ticker.tick()
    job = store.get(job.id)
    assert job.state is JobState.RUNNING
    return job


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(step=step, path=f"/storage/step-{step}.pt", size_bytes=1, duration_s=0.1)


def seen(store: JobStore, job: Job) -> tuple[JobState, Reason | None]:
    job = store.get(job.id)
    return job.state, job.reason


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
    waiting = [store.get(job.id) for job in (second, third)]
    assert [(job.queue_position, job.phase, job.reason) for job in waiting] == [
        (1, Phase.WAITING_RESOURCES, Reason.CLUSTER_FULL),
        (2, Phase.WAITING_RESOURCES, Reason.BEHIND_OTHERS),
    ]
    for _ in range(3):
        assert not ticker.tick() or store.get(first.id).state is JobState.STARTING
    assert [store.get(job.id) for job in (second, third)] == waiting  # a queue that stands still is not written


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
    scheduler(store, cluster, tmp_path, holder="the only one here").tick()
    cluster.start_ranks(f"{job.id}-1")
    successor = scheduler(store, cluster, tmp_path, holder="the only one here")
    successor.tick()
    assert store.get(job.id).state is JobState.RUNNING
    assert len(cluster.launched) == 1


def test_of_two_schedulers_one_acts_and_the_other_takes_over_when_it_leaves(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    first, second = scheduler(store, cluster, tmp_path), scheduler(store, cluster, tmp_path, lease_ttl_s=0.01)
    first.tick()
    job = submit(store)
    second.tick()
    assert store.get(job.id).state is JobState.QUEUED
    assert second.cluster_status == "ok"
    stopping = threading.Event()
    stopping.set()
    first.run(stopping)
    deadline = time.monotonic() + 10
    while store.get(job.id).state is JobState.QUEUED:
        second.tick()
        assert time.monotonic() < deadline
    assert len(cluster.launched) == 1


def test_a_scheduler_that_lost_its_lease_unknowingly_changes_nothing(tmp_path: Path) -> None:
    clock = Clock()
    store = JobStore.open(tmp_path / "jobs.sqlite", clock=clock)
    cluster = Cluster(store)
    late = scheduler(store, cluster, tmp_path, lease_ttl_s=60)
    running = run(store, cluster, late)
    clock.advance(61)  # to itself it still holds the lease
    assert store.acquire_lease("scheduler", "another", 60) is not None
    queued = submit(store)
    cluster.report(f"{running.id}-1", AttemptEnded(outcome=Outcome.SUCCEEDED))
    for _ in range(2):
        assert not late.tick()
        assert [store.get(job.id).state for job in (running, queued)] == [JobState.RUNNING, JobState.QUEUED]
    assert len(cluster.launched) == 1
    store.close()


def test_a_paused_job_holds_nothing_and_goes_on_when_it_is_resumed(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store, num_cpus=2)
    ticker = scheduler(store, cluster, tmp_path)
    job = run(store, cluster, ticker)
    other = submit(store)
    store.transition(store.get(job.id), JobState.PAUSING)
    assert cluster.report(f"{job.id}-1", step(1)) is Control.STOP
    cluster.report(f"{job.id}-1", saved(1), AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=1))
    ticker.tick()
    assert [store.get(j.id).state for j in (job, other)] == [JobState.PAUSING, JobState.QUEUED]
    cluster.finish(f"{job.id}-1", LaunchState.SUCCEEDED)
    ticker.tick()
    assert cluster.stopped == []
    assert (store.get(job.id).state, store.get(job.id).detail) == (JobState.PAUSED, "saved at step 1")
    ticker.tick()
    assert store.get(other.id).state is JobState.STARTING
    store.resume(store.get(job.id))
    ticker.tick()
    assert store.get(job.id).queue_position == 1
    store.transition(store.get(other.id), JobState.CANCELLING)
    for _ in range(3):
        ticker.tick()
    assert [request.attempt_id for request in cluster.launched] == [f"{job.id}-1", f"{other.id}-1", f"{job.id}-2"]


@pytest.mark.parametrize(
    ("told", "state", "reason", "said"),
    [
        ([step(1), saved(1), step(2)], JobState.PAUSED, Reason.PAUSED_BY_USER, "a resume goes on from step 1"),
        ([], JobState.PAUSED, Reason.PAUSED_BY_USER, "a resume goes on from the beginning"),
        ([step(1)], JobState.RECOVERING, Reason.CHECKPOINT_FAILED, "no checkpoint to pause at"),
    ],
)
def test_a_job_that_does_not_leave_in_time_is_ended_and_its_last_checkpoint_counts(
    store: JobStore, tmp_path: Path, told: list[TelemetryEvent], state: JobState, reason: Reason, said: str
) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = run(store, cluster, ticker, timeouts={"stop_grace_s": 0})
    cluster.report(f"{job.id}-1", *told)
    store.transition(store.get(job.id), JobState.PAUSING)
    ticker.tick()
    assert cluster.stopped == [f"{job.id}-1"]
    ticker.tick()
    assert seen(store, job) == (state, reason)
    assert "within its stop_grace_s of 0 s" in store.get(job.id).detail
    assert said in store.get(job.id).detail


def test_a_cancelled_job_that_shall_save_gets_its_grace(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    patient, hasty = run(store, cluster, ticker), run(store, cluster, ticker, timeouts={"stop_grace_s": 0})
    for job in (patient, hasty):
        store.transition(store.get(job.id), JobState.CANCELLING, stop_saves=True)
        assert cluster.report(f"{job.id}-1") is Control.STOP
    ticker.tick()
    assert cluster.stopped == [f"{hasty.id}-1"]
    cluster.report(f"{patient.id}-1", saved(7), AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=7))
    cluster.finish(f"{patient.id}-1", LaunchState.SUCCEEDED)
    ticker.tick()
    for job, said in ((patient, "saved at step 7 first"), (hasty, "it left without saving a checkpoint")):
        assert seen(store, job) == (JobState.CANCELLED, Reason.CANCELLED_BY_USER)
        assert store.get(job.id).detail == said


def test_a_job_starts_after_those_it_names_or_fails_with_them(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    good, bad = run(store, cluster, ticker), run(store, cluster, ticker)
    after_good, after_both = submit(store, after=(good.id,)), submit(store, after=(good.id, bad.id))
    ticker.tick()
    assert store.get(after_both.id).detail == f"starts after {good.id} (running), {bad.id} (running)"
    assert store.get(after_both.id).phase is Phase.WAITING_JOBS
    cluster.report(f"{good.id}-1", AttemptEnded(outcome=Outcome.SUCCEEDED))
    store.transition(store.get(bad.id), JobState.CANCELLING)
    for _ in range(3):
        ticker.tick()
    assert store.get(after_good.id).state is JobState.STARTING
    assert seen(store, after_both) == (JobState.FAILED, Reason.JOB_BEFORE_FAILED)
    assert f"{bad.id} (cancelled)" in store.get(after_both.id).detail


def test_owners_share_the_cluster_and_keep_to_their_quotas(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store, num_cpus=6)
    quotas = {"a": Quota(max_running_workers=4), "b": Quota()}
    asked: list[str] = []

    def quota_of(owner: str) -> Quota:
        asked.append(owner)
        return quotas[owner]

    ticker = scheduler(store, cluster, tmp_path, quota_of=quota_of)
    jobs = [submit(store, owner=owner, num_workers=2) for owner in "aaabb"]
    ticker.tick()
    assert sorted(asked) == ["a", "b"]
    assert [request.job_id for request in cluster.launched] == [jobs[0].id, jobs[3].id, jobs[1].id]
    assert seen(store, jobs[2]) == (JobState.QUEUED, Reason.BEHIND_OTHERS)
    assert seen(store, jobs[4]) == (JobState.QUEUED, Reason.CLUSTER_FULL)
    cluster.resize(8)
    ticker.tick()
    assert store.get(jobs[4].id).state is JobState.STARTING
    assert seen(store, jobs[2]) == (JobState.QUEUED, Reason.OWNER_QUOTA)


def test_a_running_job_that_takes_no_step_is_ended(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = run(store, cluster, ticker, timeouts={"idle_s": 1e-6})
    ticker.tick()
    ticker.tick()
    assert seen(store, job) == (JobState.FAILED, Reason.IDLE_DEADLINE)
    assert cluster.stopped == [f"{job.id}-1"]


def test_a_job_that_lost_its_room_waits_in_the_queue_and_goes_on_there(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store, num_cpus=4)
    ticker = scheduler(store, cluster, tmp_path)
    job = run(store, cluster, ticker, num_workers=4)
    cluster.resize(2)
    cluster.finish(f"{job.id}-1", LaunchState.FAILED, "node b is gone")
    ticker.tick()
    ticker.tick()
    assert seen(store, job) == (JobState.QUEUED, Reason.CLUSTER_FULL)
    cluster.resize(4)
    ticker.tick()
    assert (store.get(job.id).state, store.get(job.id).attempt) == (JobState.STARTING, 2)


def test_a_job_begins_from_the_checkpoint_that_it_was_given(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    store.create(JobSpec(name="t", epochs=1), start_checkpoint="/storage/step-1.pt")
    scheduler(store, cluster, tmp_path).tick()
    assert [request.start_checkpoint for request in cluster.launched] == ["/storage/step-1.pt"]


def test_gauges_tell_who_leads_whether_the_cluster_answers_and_how_old_the_last_look_is(
    store: JobStore, tmp_path: Path
) -> None:
    cluster = Cluster(store)
    first, second = (scheduler(store, cluster, tmp_path, holder=name) for name in ("first", "second"))
    assert first.gauges["syncbn_cluster_up"] == 0
    before = time.monotonic()
    for each in (first, second):
        each.tick()
    age_s = first.gauges["syncbn_scheduler_tick_age_seconds"]
    assert 0 < age_s <= time.monotonic() - before
    assert [each.gauges["syncbn_scheduler_leads"] for each in (first, second)] == [1, 0]
    assert first.gauges["syncbn_cluster_up"] == 1
    assert set(first.gauges) <= set(MEANINGS)


def test_a_cluster_that_refuses_a_job_is_asked_again_less_and_less_often(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    cluster.takes_jobs = False
    ticker = scheduler(store, cluster, tmp_path)
    job = submit(store)
    before = time.monotonic()
    while cluster.num_refused < 2:
        ticker.tick()
        assert time.monotonic() - before < 60
    assert time.monotonic() - before >= 1.0  # however often it looked
    state, reason = seen(store, job)
    assert (state, reason) == (JobState.RECOVERING, Reason.CLUSTER_UNREACHABLE)
    assert "asked again in 2 s" in store.get(job.id).detail
    cluster.takes_jobs = True
    while not cluster.launched:
        ticker.tick()
        assert time.monotonic() - before < 60
    assert time.monotonic() - before >= 3.0
    assert store.get(job.id).attempt == 3
