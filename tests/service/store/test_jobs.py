import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import Conflict, InvalidRequest, NotFound
from service.jobs import (
    RUNNER,
    TRANSITIONS,
    CheckpointSaved,
    Control,
    Job,
    JobState,
    LogLine,
    Phase,
    Reason,
    ReasonClass,
    TelemetryEvent,
    attempt_id,
)
from service.store import JobStore
from tests.service.store.clock import Clock
from tests.service.store.telling import batch, spec, started, step


def test_a_new_job_is_queued_with_its_first_event(store: JobStore, clock: Clock) -> None:
    job, created = store.create(spec())
    assert created
    assert job == store.get(job.id)
    assert (job.state, job.attempt, job.version) == (JobState.QUEUED, 0, 1)
    assert job.created_at == job.updated_at == clock.now
    (event,) = store.events(job.id)
    assert (event.seq, event.type, event.attempt) == (1, "state_changed", None)
    assert event.body == {"from": None, "to": "queued", "reason": None, "detail": "", "phase": None}


def test_the_same_key_and_spec_give_the_first_job(store: JobStore) -> None:
    first, _ = store.create(spec(), "key")
    assert store.create(spec(), "key") == (first, False)
    assert store.recall(spec(), "key") == first
    assert store.create(spec(), "another key")[1]
    assert store.create(spec())[1]


def test_the_same_key_with_another_spec_is_refused(store: JobStore) -> None:
    store.create(spec(), "key")
    with pytest.raises(InvalidRequest) as caught:
        store.create(spec(max_steps=7), "key")
    assert [problem.pointer for problem in caught.value.problems] == ["/Idempotency-Key"]
    assert len(store.list_jobs().items) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "line\nbreak", "clé"])
def test_a_key_that_no_header_should_hold_is_refused(store: JobStore, key: str) -> None:
    with pytest.raises(InvalidRequest, match="/Idempotency-Key"):
        store.create(spec(), key)


def test_racing_threads_with_one_key_make_one_job(store: JobStore) -> None:
    barrier = threading.Barrier(8)

    def create(_: int) -> tuple[Job, bool]:
        barrier.wait(10)
        return store.create(spec(), "key")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(create, range(8)))
    assert len({job.id for job, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1


def test_unknown_jobs_are_not_found(store: JobStore) -> None:
    for ask in (store.get, store.events, store.logs, store.metric_names, store.drift, store.evaluations):
        with pytest.raises(NotFound, match="job_none"):
            ask("job_none")
    for act in (store.describe, store.count_recoveries):
        with pytest.raises(NotFound, match="job_none"):
            act("job_none")
    with pytest.raises(NotFound):
        store.attempt("job_none", 1)


def test_a_job_goes_from_queued_to_succeeded_with_its_times(store: JobStore, clock: Clock) -> None:
    job, _ = store.create(spec())
    clock.advance(1)
    job, _ = store.start_attempt(job)
    clock.advance(1)
    started_at = clock.now
    job = store.transition(job, JobState.RUNNING, phase=Phase.TRAINING)
    assert (job.state, job.phase, job.started_at, job.finished_at) == ("running", "training", started_at, None)
    clock.advance(1)
    job = store.transition(job, JobState.RECOVERING, reason=Reason.WORKER_LOST, detail="rank 1 died")
    assert (job.phase, job.reason, job.detail) == (None, Reason.WORKER_LOST, "rank 1 died")
    job, _ = store.start_attempt(job)
    clock.advance(1)
    job = store.transition(job, JobState.RUNNING)
    assert job.started_at == started_at
    clock.advance(1)
    job = store.transition(job, JobState.SUCCEEDED, phase=Phase.TRAINING)
    assert (job.phase, job.finished_at, job.attempt) == (None, clock.now, 2)
    states = ["queued", "starting", "running", "recovering", "starting", "running", "succeeded"]
    events = store.events(job.id)
    assert [event.body["to"] for event in events] == states
    assert [event.body["from"] for event in events] == [None, *states[:-1]]
    assert [event.seq for event in events] == list(range(1, 8))
    assert events[3].body["reason"] == "worker_lost"
    assert job.version == 7


def test_a_job_that_has_changed_meanwhile_is_a_conflict_and_stays(store: JobStore) -> None:
    seen, _ = store.create(spec())
    cancelled = store.transition(seen, JobState.CANCELLED)
    with pytest.raises(Conflict, match="changed meanwhile"):
        store.transition(seen, JobState.FAILED)
    with pytest.raises(Conflict, match="changed meanwhile"):
        store.start_attempt(seen)
    assert store.get(seen.id) == cancelled
    assert len(store.events(seen.id)) == 2


def test_of_threads_that_move_the_same_job_one_wins(store: JobStore) -> None:
    job, _ = store.create(spec())
    barrier = threading.Barrier(8)

    def move(index: int) -> bool:
        barrier.wait(10)
        try:
            if index % 2:
                store.start_attempt(job)
            else:
                store.transition(job, JobState.CANCELLED)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(move, range(8)))
    assert sum(won) == 1
    assert store.get(job.id).version == 2
    assert len(store.events(job.id)) == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.lists(st.sampled_from(JobState), max_size=12))
def test_random_walks_follow_the_table_and_leave_an_event_each(store: JobStore, path: list[JobState]) -> None:
    job, _ = store.create(spec())
    walked = [JobState.QUEUED]
    for to in path:
        if to in TRANSITIONS[job.state]:
            job = store.transition(job, to, phase=Phase.LOADING)
            walked.append(to)
            assert (job.finished_at is not None) == (not TRANSITIONS[to])
            assert (job.phase is None) == (not TRANSITIONS[to])
        else:
            with pytest.raises(Conflict, match="cannot become"):
                store.transition(job, to)
    assert store.get(job.id) == job
    assert job.version == len(walked)
    assert [event.body["to"] for event in store.events(job.id)] == walked


def test_describing_writes_an_event_only_if_something_changes(store: JobStore) -> None:
    job, _ = store.create(spec())
    said = store.describe(job.id, phase=Phase.WAITING_RESOURCES, reason=Reason.CLUSTER_FULL, detail="2 of 4 CPUs")
    assert (said.phase, said.reason, said.detail) == ("waiting_resources", "cluster_full", "2 of 4 CPUs")
    assert store.describe(job.id, phase=Phase.WAITING_RESOURCES, detail="2 of 4 CPUs") == said
    cleared = store.describe(job.id, reason=None)
    assert (cleared.phase, cleared.reason, cleared.detail) == ("waiting_resources", None, "2 of 4 CPUs")
    assert [event.type for event in store.events(job.id)] == ["state_changed", "phase_changed", "phase_changed"]
    assert store.events(job.id)[-1].body == {"phase": "waiting_resources", "reason": None, "detail": "2 of 4 CPUs"}


def test_describing_does_not_stand_in_the_way_of_a_transition(store: JobStore) -> None:
    job, _ = store.create(spec())
    store.describe(job.id, phase=Phase.WAITING_CLUSTER)
    assert store.transition(job, JobState.CANCELLED).phase is None


def test_nothing_more_is_said_of_a_terminal_job(store: JobStore) -> None:
    job, _ = store.create(spec())
    job = store.transition(job, JobState.CANCELLED, reason=Reason.CANCELLED_BY_USER)
    assert store.describe(job.id, phase=Phase.TRAINING, detail="late") == job
    assert len(store.events(job.id)) == 2


def test_recoveries_are_counted_by_class_of_reason(store: JobStore) -> None:
    job, _ = store.create(spec())
    assert store.count_recoveries(job.id) == {}
    for reason in (Reason.WORKER_LOST, Reason.RUNNER_LOST, Reason.COLLECTIVE_TIMEOUT):
        job, _ = store.start_attempt(job)
        job = store.transition(job, JobState.RECOVERING, reason=reason)
    assert store.count_recoveries(job.id) == {ReasonClass.INFRA: 2, ReasonClass.HANG: 1}


def test_unfinished_jobs_come_oldest_first(store: JobStore, clock: Clock) -> None:
    made = []
    for index in range(4):
        clock.advance(1)
        made.append(store.create(spec(f"job {index}"))[0])
    store.transition(made[1], JobState.CANCELLED)
    store.start_attempt(made[3])
    assert [job.spec.name for job in store.unfinished()] == ["job 0", "job 2", "job 3"]


def test_an_observation_is_remembered(store: JobStore, clock: Clock) -> None:
    job, _ = store.create(spec())
    clock.advance(3)
    store.observed(job.id)
    seen = store.get(job.id)
    assert seen.observed_at == clock.now
    assert seen.version == job.version


def test_text_that_is_no_text_is_kept_as_well_as_it_can_be(store: JobStore) -> None:
    job, _ = store.create(spec())
    said = store.describe(job.id, detail="half a pair \ud83d and \0, whole \U0001f600")
    assert said.detail == "half a pair \ufffd and \ufffd, whole \U0001f600"
    _, token = store.start_attempt(job)
    store.ingest(attempt_id(job.id, 1), token, batch([LogLine(text="\udcff")]))
    assert [record.text for record in store.logs(job.id)] == ["\ufffd"]


def test_everything_is_still_there_after_opening_again(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "new folder" / "jobs.sqlite"
    store = JobStore.open(path, clock=clock)
    job, token = store.start_attempt(store.create(spec(), "key")[0])
    store.ingest(attempt_id(job.id, 1), token, batch([LogLine(text="hello")], RUNNER))
    job = store.get(job.id)
    store.close()
    again = JobStore.open(path, clock=clock)
    try:
        assert again.get(job.id) == job
        assert again.create(spec(), "key") == (job, False)
        assert [record.text for record in again.logs(job.id)] == ["hello"]
    finally:
        again.close()


def test_unfinished_jobs_are_told_with_their_newest_spec(store: JobStore) -> None:
    job, _ = store.create(spec())
    assert store.unfinished() == store.unfinished() == [job]
    changed = store.set_priority(job, 5)
    assert [found.spec for found in store.unfinished()] == [changed.spec]
    store.transition(changed, JobState.PAUSED)
    resized = store.resume(store.get(job.id), num_workers=1)
    assert [found.spec.num_workers for found in store.unfinished()] == [resized.spec.num_workers] == [1]


def test_many_attempts_are_told_at_once_as_they_are_told_one_by_one(store: JobStore) -> None:
    started_jobs = [store.start_attempt(store.create(spec())[0]) for _ in range(3)]
    for index, (job, token) in enumerate(started_jobs):
        facts: list[TelemetryEvent] = [started(), *(step(number) for number in range(1, 1 + index))]
        store.ingest(attempt_id(job.id, 1), token, batch(facts))
    waiting, _ = store.create(spec())
    found = store.newest_attempts([*(job for job, _ in started_jobs), waiting])
    assert found == {job.id: store.attempt(job.id, 1) for job, _ in started_jobs}
    assert [found[job.id].last_step for job, _ in started_jobs] == [0, 1, 2]


def test_checkpoints_that_a_later_attempt_has_dropped_are_not_told(store: JobStore) -> None:
    def saved(number: int) -> CheckpointSaved:
        return CheckpointSaved(step=number, path=f"/step-{number}.pt", size_bytes=1, duration_s=0.1)

    job, token = store.start_attempt(store.create(spec())[0])
    store.ingest(attempt_id(job.id, 1), token, batch([saved(10), saved(20), saved(30)]))
    assert [checkpoint.step for checkpoint in store.checkpoints(job.id)] == [10, 20, 30]
    job, token = store.start_attempt(store.transition(job, JobState.RECOVERING))
    store.ingest(attempt_id(job.id, 2), token, batch([saved(20), saved(25)]))
    assert store.checkpoints(job.id) == [saved(10), saved(20), saved(25)]


def test_a_larger_attempt_of_before_is_told_to_abort(store: JobStore) -> None:
    job, token = store.start_attempt(store.create(spec(num_workers=2))[0])
    job = store.transition(store.transition(job, JobState.PAUSING), JobState.PAUSED)
    job, _ = store.start_attempt(store.resume(job, num_workers=1))
    assert store.ingest(attempt_id(job.id, 1), token, batch([step(1)], rank=1)).control is Control.ABORT
