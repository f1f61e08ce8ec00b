import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import NotFound
from service.jobs import IngestBatch, attempt_id
from service.store import STEP, JobStore
from service.store.series import WINDOW_ROWS
from tests.service.store.telling import rank_batch, spec, step

_LOSS = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


def _tell(store: JobStore, losses: list[list[float]]) -> str:
    """A job whose rank r had ``losses[r]``, from step 1 on."""
    job, token = store.start_attempt(store.create(spec(num_workers=len(losses)))[0])
    told = [rank_batch([step(n + 1, loss) for n, loss in enumerate(row)], r) for r, row in enumerate(losses)]
    store.ingest(attempt_id(job.id, 1), token, IngestBatch(batches=tuple(told)))
    return job.id


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_LOSS, _LOSS, _LOSS), min_size=1, max_size=20))
def test_the_mean_over_ranks_is_numpys_and_nan_where_any_rank_is(
    store: JobStore, rows: list[tuple[float, float, float]]
) -> None:
    losses = np.array(rows, dtype=np.float64).T
    job_id = _tell(store, losses.tolist())
    series = store.metric(job_id, "train/loss", max_points=None)
    assert series.steps == tuple(range(1, len(rows) + 1))
    with np.errstate(invalid="ignore"):
        expected = losses.mean(axis=0)
    np.testing.assert_allclose(series.values, expected, rtol=1e-12, atol=1e-9)  # sums in another order
    for rank in range(3):
        of_rank = store.metric(job_id, "train/loss", rank=rank, max_points=None)
        np.testing.assert_array_equal(of_rank.values, losses[rank])


def test_a_range_of_steps_includes_both_ends(store: JobStore) -> None:
    job_id = _tell(store, [[float(n) for n in range(1, 21)]])
    series = store.metric(job_id, "train/loss", first_step=5, last_step=7)
    assert (series.steps, series.values, series.num_points) == ((5, 6, 7), (5.0, 6.0, 7.0), 3)
    assert series.downsampled is None
    assert store.metric(job_id, "train/loss", first_step=21).steps == ()
    assert store.metric(job_id, "train/loss", rank=3).steps == ()


def test_a_thinned_series_says_so_and_keeps_its_extremes(store: JobStore) -> None:
    losses = [1.0] * 2000
    losses[700], losses[1300], losses[1301] = 50.0, -50.0, math.nan
    job_id = _tell(store, [losses])
    series = store.metric(job_id, "train/loss", max_points=20)
    told = dict(zip(series.steps, series.values, strict=True))
    assert (told[701], told[1301]) == (50.0, -50.0)
    assert math.isnan(told[1302])
    assert len(series.steps) <= 20
    assert series.num_points == 2000
    assert series.downsampled is not None


def test_metrics_are_named_once_there_are_points(store: JobStore) -> None:
    job, _ = store.create(spec())
    assert store.metric_names(job.id) == []
    assert store.metric(job.id, "train/loss").num_points == 0
    job_id = _tell(store, [[1.0]])
    assert store.metric_names(job_id) == ["train/learning_rate", "train/loss", "train/step_s"]
    assert store.metric(job_id, "train/learning_rate").values == (0.1,)
    assert store.metric(job_id, "train/step_s").values == (0.5,)
    with pytest.raises(NotFound, match="train/loss"):
        store.metric(job_id, "train/los")


def test_the_loss_of_a_whole_run_is_exact_until_it_is_long(store: JobStore) -> None:
    losses = np.random.default_rng(0).normal(size=(2, 1_000))
    job_id = _tell(store, losses.tolist())
    exact = store.training_loss(job_id, max_points=1_000)
    assert exact == store.metric(job_id, "train/loss", max_points=None)
    means = store.training_loss(job_id, max_points=100)
    assert (means.num_points, means.downsampled) == (1_000, "means of 10 consecutive steps")
    assert means.steps == tuple(range(10, 1_001, 10))
    np.testing.assert_allclose(means.values, losses.mean(axis=0).reshape(100, 10).mean(axis=1), rtol=1e-12, atol=1e-15)
    empty, _ = store.create(spec())
    assert store.training_loss(empty.id).num_points == 0


def test_the_loss_of_a_long_run_tells_each_stretchs_first_trouble(store: JobStore) -> None:
    losses = np.ones(1_000)
    losses[[333, 337, 509, 999]] = [math.inf, math.nan, -math.inf, math.nan]
    job_id = _tell(store, [losses.tolist()])
    means = store.training_loss(job_id, max_points=100)
    told = dict(zip(means.steps, means.values, strict=True))
    assert told[334] == math.inf  # and the mean at the stretch's last step, which is no number
    assert math.isnan(told[340])
    assert told[510] == -math.inf
    assert math.isnan(told[1_000])
    finite = [value for value in means.values if math.isfinite(value)]
    assert finite == [1.0] * 97
    assert max(means.steps) == 1_000


def test_a_series_longer_than_a_window_is_read_whole_and_in_order(store: JobStore) -> None:
    num_steps = WINDOW_ROWS + 50_000
    job, _ = store.start_attempt(store.create(spec(num_workers=1))[0])
    told = np.zeros(num_steps, STEP)
    told["step"] = np.arange(num_steps) * 3
    told["loss"] = np.random.default_rng(1).normal(size=num_steps)
    store.record_steps(job.id, 1, told[np.random.default_rng(2).permutation(num_steps)])
    series = store.metric(job.id, "train/loss", rank=0, max_points=None)
    np.testing.assert_array_equal(series.steps, told["step"])
    np.testing.assert_array_equal(series.values, told["loss"])
    means = store.training_loss(job.id, max_points=10_000)
    length = -(-(3 * num_steps - 2) // 10_000)
    stretch = told["step"] // length
    expected = np.bincount(stretch, told["loss"]) / np.bincount(stretch)
    np.testing.assert_allclose(means.values, expected, rtol=1e-9, atol=1e-12)
    assert means.num_points == num_steps
