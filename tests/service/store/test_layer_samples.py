"""Samples of layers: each kept once beside the events, read back whole or as series."""

import math

import numpy as np
import pytest
from sqlalchemy import func, select

from service.errors import Gone, InvalidRequest, NotFound
from service.jobs import (
    Job,
    JobState,
    LayerMetricSeries,
    MomentumReplay,
    Reason,
    ReplayedMomentum,
    TelemetryEvent,
    attempt_id,
)
from service.store import JobStore, Retention, Told
from service.store.layer_history import MAX_POINTS_TOGETHER
from service.store.schema import layer_samples
from tests.service.store.clock import Clock
from tests.service.store.telling import batch, drift, sample, spec, started


def running(store: JobStore, *told: TelemetryEvent) -> tuple[Job, str]:
    job, token = store.start_attempt(store.create(spec())[0])
    store.ingest(attempt_id(job.id, 1), token, batch([started(), *told]))
    return store.transition(job, JobState.RUNNING), token


def num_rows(store: JobStore, job: Job) -> int:
    with store._database.read() as connection:
        query = select(func.count()).where(layer_samples.c.job_id == job.id)
        return int(connection.execute(query).scalar_one())


def series(store: JobStore, job: Job, layer: str, metric: str, **asked: int) -> LayerMetricSeries:
    (found,) = store.layer_history(job.id, layer=layer, metrics=[metric], **asked).series
    return found


def test_samples_are_no_events_and_each_is_stored_once(store: JobStore) -> None:
    told = [sample(20, norm1=math.nan, norm2=1.0), sample(40, norm1=-math.inf, norm2=2.0)]
    job, token = running(store, *told)
    assert [event.type for event in store.events(job.id)][-1] == "state_changed"
    assert "batch_norm_sample" not in {event.type for event in store.events(job.id)}
    repeated = batch([told[1], sample(60, norm1=3.0)], first_seq=2)  # the first of them has arrived before
    assert store.ingest(attempt_id(job.id, 1), token, repeated).next_seq == {0: 4}
    assert store.ingest(attempt_id(job.id, 1), token, repeated).next_seq == {0: 4}
    assert num_rows(store, job) == 3
    # NaN is equal to nothing, so as they travel.
    found = [kept.model_dump_json() for _, kept in store.samples(job.id)]
    assert found == [kept.model_dump_json() for kept in (*told, sample(60, norm1=3.0))]


def test_of_a_repeated_step_the_latest_attempt_counts_in_any_order_of_arrival(store: JobStore) -> None:
    job, _ = running(store, sample(20, norm1=1.0), sample(40, norm1=2.0), sample(60, norm1=3.0))
    job, token = store.start_attempt(store.transition(job, JobState.RECOVERING, reason=Reason.WORKER_LOST))
    store.ingest(attempt_id(job.id, 2), token, batch([started(20), sample(40, norm1=7.0), sample(40, norm1=8.0)]))
    taken = [(attempt, kept.step, kept.layers[0].max_abs_z) for attempt, kept in store.samples(job.id, newest=3)]
    assert taken == [(1, 40, 2), (1, 60, 3), (2, 40, 8)]
    assert store.layer_history(job.id).last_sample == sample(40, norm1=8.0)
    assert series(store, job, "norm1", "sample/max_abs_z").values == (1, 8, 3)


def test_a_step_that_no_column_holds_is_refused(store: JobStore) -> None:
    job, token = running(store)
    with pytest.raises(InvalidRequest, match="steps are at least 0"):
        store.ingest(attempt_id(job.id, 1), token, batch([sample(2**31, norm1=0.0)], first_seq=1))


def test_numbers_of_layers_are_found_by_patterns_and_ranges(store: JobStore) -> None:
    replay = MomentumReplay(
        step=40,
        num_steps=40,
        used=0.1,
        best=0.03,
        candidates=(ReplayedMomentum(momentum=0.03, rms_mean_shift=0.1, output_error=0.1),),
    )
    measured = (drift(20, b1=0.5, a2=0.25), drift(40, b1=math.nan, a2=0.125), sample(30, b1=4.0, a2=5.0), replay)
    job, _ = running(store, *measured)
    whole = store.layer_history(job.id)
    assert whole.layers == ("b1", "a2")  # in order of execution
    assert (whole.momentum_replay, whole.last_sample) == (replay, measured[2])
    assert {found.metric for found in whole.series} == set(whole.metrics)
    assert {"drift/rms_mean_shift", "sample/max_abs_z", "sample/num_dead"} <= set(whole.metrics)
    assert "drift/median_hellinger" not in whole.metrics  # which nobody told
    one = series(store, job, "b?", "drift/rms_mean_shift")
    np.testing.assert_array_equal(one.values, [0.5, math.nan])
    assert (one.steps, one.num_points, one.downsampled) == ((20, 40), 2, None)
    assert series(store, job, "a2", "*/rms_mean_shift", last_step=30).values == (0.25,)
    assert series(store, job, "a2", "sample/buffers_equal").values == (1.0,)
    with pytest.raises(NotFound, match=r"no BatchNorm layer 'c\*'; it has b1, a2"):
        store.layer_history(job.id, layer="c*")
    with pytest.raises(NotFound, match="no metric 'rms'; they have drift/num_channels"):
        store.layer_history(job.id, metrics=["rms"])
    assert store.layer_history(job.id, first_step=50).layers == ()
    nothing = store.layer_history(store.create(spec())[0].id)
    assert (nothing.layers, nothing.metrics, nothing.series) == ((), (), ())
    with pytest.raises(NotFound):
        store.layer_history("job_none")


def test_long_series_are_thinned_without_losing_extremes_or_what_is_not_finite(store: JobStore) -> None:
    values = {
        step: math.nan if step == 300 else 99.0 if step == 77 else -5.0 if step == 40 else 1.0 for step in range(400)
    }
    job, _ = running(store, *(sample(step, norm1=value) for step, value in values.items()))
    thin = series(store, job, "norm1", "sample/max_abs_z", max_points=20)
    assert len(thin.steps) <= 20
    assert {40, 77, 300} <= set(thin.steps)
    np.testing.assert_array_equal(thin.values, [values[step] for step in thin.steps])
    assert (thin.num_points, thin.downsampled) == (400, "least and greatest value of each bucket of samples")
    everything = store.layer_history(job.id, max_points=5000)
    assert sum(len(found.steps) for found in everything.series) <= MAX_POINTS_TOGETHER


def test_samples_are_forgotten_with_the_metrics(store: JobStore, clock: Clock) -> None:
    job, _ = running(store, *(sample(step, norm1=0.0) for step in range(250)))
    other, _ = running(store, sample(1, norm1=0.0))
    store.transition(job, JobState.SUCCEEDED)
    clock.advance(86_400.0)
    assert store.forget(Retention(metrics_days=1.0))[Told.METRICS] == 1
    assert (num_rows(store, job), num_rows(store, other)) == (0, 1)
    for read in (store.samples, store.layer_history):
        with pytest.raises(Gone, match="the metrics of"):
            read(job.id)
