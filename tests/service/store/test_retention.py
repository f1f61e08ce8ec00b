import numpy as np
import pytest
from sqlalchemy import func, insert, select, update

from service.errors import Conflict, Gone
from service.jobs import CheckpointSaved, Job, JobState, LogLine, Reason, ReasonClass, TelemetryEvent, attempt_id
from service.store import STEP, JobStore, Retention, Told
from service.store.schema import events, forgotten, logs, metric_chunks, steps
from tests.service.store.clock import Clock
from tests.service.store.telling import batch, drift, evaluation, spec, started, step

DAY_S = 86_400.0
SAVED = CheckpointSaved(step=2, path="here", size_bytes=3, duration_s=0.5)


def _running(store: JobStore, *told: TelemetryEvent) -> Job:
    job, token = store.start_attempt(store.create(spec())[0])
    store.ingest(attempt_id(job.id, 1), token, batch([started(), step(1), step(2), LogLine(text="a"), *told]))
    return store.transition(job, JobState.RUNNING)


def _ended(store: JobStore, *told: TelemetryEvent) -> Job:
    return store.transition(_running(store, *told), JobState.SUCCEEDED)


def _num_rows(store: JobStore, job_id: str) -> dict[str, int]:
    with store._database.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).where(table.c.job_id == job_id)).scalar_one()
            for table in (steps, metric_chunks, logs)
        }


def test_each_kind_of_memory_ends_in_its_own_time_and_says_so(store: JobStore, clock: Clock) -> None:
    job = _ended(store, evaluation(2), drift(2, norm1=0.5), SAVED)
    policy = Retention(metrics_days=10, logs_days=20, events_days=30)
    clock.advance(9.9 * DAY_S)
    assert store.forget(policy) == {Told.METRICS: 0, Told.LOGS: 0, Told.EVENTS: 0}
    assert store.metric(job.id, "train/loss").num_points == 2

    clock.advance(0.2 * DAY_S)
    assert store.forget(policy) == {Told.METRICS: 1, Told.LOGS: 0, Told.EVENTS: 0}
    said = f"the metrics of {job.id} were forgotten at {clock.now:%Y-%m-%dT%H:%M:%SZ}"
    clock.advance(DAY_S)
    assert store.forget(policy) == {Told.METRICS: 0, Told.LOGS: 0, Told.EVENTS: 0}
    for read in (
        lambda: store.metric_names(job.id),
        lambda: store.metric(job.id, "train/loss"),
        lambda: store.training_loss(job.id),
    ):
        with pytest.raises(Gone, match=said):
            read()
    assert [line.text for line in store.logs(job.id)] == ["a"]
    assert [found.step for found in store.evaluations(job.id)] == [2]

    clock.advance(30 * DAY_S)
    assert store.forget(policy) == {Told.METRICS: 0, Told.LOGS: 1, Told.EVENTS: 1}
    with pytest.raises(Gone, match="the logs of"):
        store.logs(job.id)
    for read_events in (store.evaluations, store.drift, store.start_of):
        with pytest.raises(Gone, match="the events of"):
            read_events(job.id)
    assert _num_rows(store, job.id) == {"steps": 0, "metric_chunks": 0, "logs": 0}


def test_of_forgotten_events_stays_what_happened_when_and_how_it_ended(store: JobStore, clock: Clock) -> None:
    job = _running(store, evaluation(2), SAVED)
    job = store.transition(store.get(job.id), JobState.RECOVERING, reason=Reason.WORKER_LOST)
    job = store.transition(job, JobState.FAILED, reason=Reason.WORKER_LOST, detail="twice")
    before = store.events(job.id)
    clock.advance(DAY_S)
    store.forget(Retention(events_days=1))
    after = store.events(job.id)
    marks = [(event.seq, event.time, event.type, event.attempt, event.rank) for event in before]
    assert [(event.seq, event.time, event.type, event.attempt, event.rank) for event in after] == marks
    for old, new in zip(before, after, strict=True):
        lasting = old.type in ("state_changed", "checkpoint")
        assert new.body == (old.body if lasting else {"forgotten_at": clock.now.isoformat()})
    assert store.count_recoveries(job.id) == {ReasonClass.INFRA: 1}
    assert store.checkpoints(job.id) == [SAVED]
    assert store.get(job.id).detail == "twice"


def test_a_job_that_has_not_ended_is_never_forgotten(store: JobStore, clock: Clock) -> None:
    running, ended = _running(store), _ended(store)
    clock.advance(1000 * DAY_S)
    assert store.forget(Retention(0, 0, 0)) == {Told.METRICS: 1, Told.LOGS: 1, Told.EVENTS: 1}
    assert store.metric(running.id, "train/loss").num_points == 2
    assert store.logs(running.id)
    with pytest.raises(Gone):
        store.logs(ended.id)


def test_for_ever_is_the_default_and_time_does_not_run_backwards(store: JobStore, clock: Clock) -> None:
    job = _ended(store)
    clock.advance(10_000 * DAY_S)
    assert store.forget(Retention()) == {Told.METRICS: 0, Told.LOGS: 0, Told.EVENTS: 0}
    assert store.metric(job.id, "train/loss").num_points == 2
    with pytest.raises(ValueError, match="logs_days is -1; it must be at least 0"):
        Retention(logs_days=-1)


def test_what_takes_many_transactions_goes_whole_and_no_other_job_with_it(store: JobStore, clock: Clock) -> None:
    job, other = _running(store), _ended(store)
    told = np.zeros(220_000, STEP)
    told["step"] = np.arange(len(told)) + 1
    store.record_steps(job.id, 1, told)
    with store._database.write() as connection:
        lines = {"job_id": job.id, "time": clock.now, "attempt": 1, "rank": 0, "level": "info", "text": "b"}
        connection.execute(insert(logs), [lines | {"seq": seq} for seq in range(2, 4_502)])
    store.transition(job, JobState.SUCCEEDED)
    assert _num_rows(store, job.id)["metric_chunks"] > 100
    clock.advance(DAY_S)
    store.forget(Retention(metrics_days=1.0))
    with pytest.raises(Conflict, match="succeeded"):
        store.record_steps(job.id, 1, told[:1])
    store.forget(Retention(logs_days=1.0))
    assert _num_rows(store, job.id) == {"steps": 0, "metric_chunks": 0, "logs": 0}
    with store._database.read() as connection:
        assert all(connection.execute(select(forgotten.c.complete).where(forgotten.c.job_id == job.id)).scalars())
        assert connection.execute(select(func.count()).where(events.c.job_id == other.id)).scalar_one() > 0


def test_a_service_that_died_while_forgetting_is_followed_by_one_that_ends_it(store: JobStore, clock: Clock) -> None:
    job = _ended(store)
    clock.advance(DAY_S)
    store.forget(Retention(logs_days=1.0))
    with store._database.write() as connection:
        connection.execute(update(forgotten).values(complete=False))  # as if it had died just before the end
        line = {"seq": 9, "time": clock.now, "attempt": 1, "rank": 0, "level": "info", "text": "left over"}
        connection.execute(insert(logs).values(job_id=job.id, **line))
    with pytest.raises(Gone):
        store.logs(job.id)
    assert store.forget(Retention()) == {Told.METRICS: 0, Told.LOGS: 1, Told.EVENTS: 0}
    assert _num_rows(store, job.id)["logs"] == 0
