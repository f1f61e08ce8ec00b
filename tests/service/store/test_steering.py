from typing import Any

import pytest

from service.errors import Conflict, InvalidRequest, NotFound
from service.jobs import Control, IngestBatch, Job, JobSpec, JobState, Normalization, Reason, attempt_id
from service.store import JobStore
from tests.service.store.clock import Clock
from tests.service.store.telling import spec

S = JobState


def walk(store: JobStore, job: Job, *states: JobState, **said: Any) -> Job:
    """Take the job through ``states``; what is ``said`` goes with the last."""
    for to in states:
        if to is S.STARTING:
            job, _ = store.start_attempt(job)
        else:
            job = store.transition(job, to, **(said if to is states[-1] else {}))
    return job


def test_a_checkpoint_is_asked_for_while_the_job_runs_and_the_attempt_hears_of_it(store: JobStore) -> None:
    job, _ = store.create(spec())
    with pytest.raises(Conflict, match="queued; only a starting or running job"):
        store.request_checkpoint(job.id)
    with pytest.raises(NotFound):
        store.request_checkpoint("job_none")
    job, token = store.start_attempt(job)
    assert store.request_checkpoint(job.id).checkpoint_requests == 1
    job = store.transition(job, S.RUNNING)
    asked = store.request_checkpoint(job.id)
    assert (asked.checkpoint_requests, asked.version) == (2, job.version)
    event = store.events(job.id)[-1]
    assert (event.type, event.attempt, event.body) == ("checkpoint_requested", 1, {"checkpoint_requests": 2})
    assert store.ingest(attempt_id(job.id, 1), token, IngestBatch(batches=())).checkpoint_requests == 2
    with pytest.raises(Conflict):
        store.request_checkpoint(walk(store, asked, S.PAUSING).id)


@pytest.mark.parametrize(
    ("path", "said", "control"),
    [
        ((), {}, Control.CONTINUE),
        ((S.RUNNING,), {}, Control.CONTINUE),
        ((S.RUNNING, S.PAUSING), {}, Control.STOP),
        ((S.RUNNING, S.CANCELLING), {"stop_saves": True}, Control.STOP),
        ((S.RUNNING, S.CANCELLING), {}, Control.ABORT),
        ((S.RUNNING, S.PAUSING, S.CANCELLING), {}, Control.ABORT),
        ((S.RUNNING, S.RECOVERING), {}, Control.ABORT),
        ((S.RUNNING, S.RECOVERING, S.QUEUED), {}, Control.ABORT),
        ((S.RUNNING, S.PAUSING, S.PAUSED), {}, Control.ABORT),
        ((S.RUNNING, S.PAUSING, S.RECOVERING), {}, Control.ABORT),
        ((S.RUNNING, S.CANCELLING, S.CANCELLED), {}, Control.ABORT),
        ((S.RUNNING, S.RECOVERING, S.STARTING), {}, Control.ABORT),  # by then an older attempt
    ],
)
def test_what_an_attempt_is_told_to_do(
    store: JobStore, path: tuple[JobState, ...], said: dict[str, Any], control: Control
) -> None:
    job, token = store.start_attempt(store.create(spec())[0])
    job = walk(store, job, *path, **said)
    assert job.stop_saves == said.get("stop_saves", False)
    assert store.ingest(attempt_id(job.id, 1), token, IngestBatch(batches=())).control is control


def test_the_time_in_a_state_is_known_and_nothing_else_moves_it(store: JobStore, clock: Clock) -> None:
    job, _ = store.create(spec())
    assert job.state_since == clock.now
    clock.advance(1)
    since = clock.now
    job, _ = store.start_attempt(job)
    clock.advance(1)
    store.describe(job.id, detail="still")
    store.request_checkpoint(job.id)
    assert store.get(job.id).state_since == since
    job = store.transition(job, S.RUNNING)
    assert job.state_since == clock.now


def test_a_paused_job_goes_on_with_other_workers_and_the_same_images_a_step(store: JobStore) -> None:
    made = JobSpec(name="digits", num_workers=4, batch_size_per_worker=30, max_steps=9)
    job, _ = store.create(made)
    with pytest.raises(Conflict, match="is queued; only a paused job"):
        store.resume(job)
    job = walk(store, job, S.STARTING, S.RECOVERING)
    with pytest.raises(Conflict, match="is recovering; only a paused job"):
        store.resume(job)
    job = walk(store, job, S.STARTING, S.RUNNING, S.PAUSING, S.PAUSED, reason=Reason.PAUSED_BY_USER)
    with pytest.raises(InvalidRequest, match="7 workers cannot share 120 images") as caught:
        store.resume(job, 7)
    assert [problem.pointer for problem in caught.value.problems] == ["/num_workers"]
    assert store.get(job.id) == job
    resumed = store.resume(job, 3)
    assert (resumed.state, resumed.reason, resumed.version) == (S.QUEUED, None, job.version + 1)
    assert (resumed.spec.num_workers, resumed.spec.batch_size_per_worker) == (3, 40)
    assert resumed.spec.global_batch_size == made.global_batch_size
    assert resumed.spec.model_dump(exclude={"num_workers", "batch_size_per_worker"}) == made.model_dump(
        exclude={"num_workers", "batch_size_per_worker"}
    )
    assert store.events(job.id)[-1].type == "resized"
    assert store.events(job.id)[-1].body == {
        "num_workers": {"from": 4, "to": 3},
        "batch_size_per_worker": {"from": 30, "to": 40},
    }
    with pytest.raises(Conflict):
        store.resume(job, 3)


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_job_that_goes_on_as_it_was_is_not_told_to_be_resized(store: JobStore, num_workers: int | None) -> None:
    job = walk(store, store.create(spec(num_workers=2))[0], S.PAUSED)
    assert store.resume(job, num_workers).spec == job.spec
    assert [event.type for event in store.events(job.id)] == ["state_changed"] * 3


@pytest.mark.parametrize("num_workers", [0, -2, 128, 5000])
def test_a_number_of_workers_that_no_spec_allows_is_named(store: JobStore, num_workers: int) -> None:
    made = JobSpec(
        name="t", num_workers=2, batch_size_per_worker=64, normalization=Normalization.LOCAL, max_steps=3
    )  # of 128 workers each would normalize a single image
    job = walk(store, store.create(made)[0], S.PAUSED)
    with pytest.raises(InvalidRequest) as caught:
        store.resume(job, num_workers)
    assert {problem.pointer for problem in caught.value.problems} == {"/num_workers"}
    assert store.get(job.id) == job


def test_a_priority_is_changed_once_and_only_while_it_matters(store: JobStore, clock: Clock) -> None:
    job, _ = store.create(JobSpec(name="t", priority=3, epochs=1))
    clock.advance(1)
    changed = store.set_priority(job, -5)
    assert (changed.spec.priority, changed.version, changed.updated_at) == (-5, job.version + 1, clock.now)
    event = store.events(job.id)[-1]
    assert (event.type, event.body) == ("priority_changed", {"from": 3, "to": -5})
    assert store.set_priority(changed, -5) == changed
    for stale in (1, 3):
        with pytest.raises(Conflict, match="changed meanwhile"):
            store.set_priority(job, stale)
    with pytest.raises(InvalidRequest, match="/priority"):
        store.set_priority(changed, 101)
    ended = store.transition(changed, S.CANCELLED)
    with pytest.raises(Conflict, match="no longer matters"):
        store.set_priority(ended, 1)
    assert len(store.events(job.id)) == 3


def test_a_queued_job_has_a_place_until_it_leaves_the_queue(store: JobStore) -> None:
    first, second, running = (store.create(spec())[0] for _ in range(3))
    running, _ = store.start_attempt(running)
    store.set_queue_positions({first.id: 2, second.id: 1, running.id: 3, "job_none": 4})
    assert [store.get(job.id).queue_position for job in (first, second, running)] == [2, 1, None]
    assert store.get(first.id).version == first.version
    started, _ = store.start_attempt(second)
    assert started.queue_position is None
    store.set_queue_positions({first.id: None})
    assert store.get(first.id).queue_position is None


def test_states_are_told_of_many_jobs_at_once(store: JobStore) -> None:
    first, second = (store.create(spec())[0] for _ in range(2))
    store.transition(second, S.CANCELLED)
    unknown = [f"job_{n}" for n in range(3000)]
    assert store.states_of([first.id, second.id, first.id, *unknown]) == {first.id: S.QUEUED, second.id: S.CANCELLED}
    assert store.states_of([]) == {}
