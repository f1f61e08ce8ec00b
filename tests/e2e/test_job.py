"""From POST to report: real jobs through the whole service, and what is done to them on the way."""

import math
import os
import signal
from pathlib import Path

import psutil
import pytest

from service.client import Client
from service.errors import Conflict, InvalidRequest
from service.jobs import DriftColour, JobState, Normalization, Reason, Topic
from tests.e2e.conftest import RunningService, small_spec, wait_for, wait_until_ended

LONG = 1_000_000
"""More steps than any test waits for."""


def rank_pids(client: Client, job_id: str, attempt: int = 1) -> list[int]:
    """Process ids of the ranks of an attempt, once all of them have reported."""

    def look() -> list[int] | None:
        events = [e for e in client.events(job_id, types=[Topic.RANK_STARTED]) if e.attempt == attempt]
        return [e.body["pid"] for e in sorted(events, key=lambda e: e.rank or 0)] if len(events) == 2 else None

    return wait_for(f"the ranks of attempt {attempt}", look)


def wait_for_step(client: Client, job_id: str, step: int) -> None:
    def reached() -> bool:
        progress = client.job(job_id).progress
        return progress is not None and progress.step >= step

    wait_for(f"step {step} of {job_id}", reached)


def succeeded_job(client: Client) -> str:
    job = client.submit(small_spec("short", max_steps=1))
    assert wait_until_ended(client, job.id).state is JobState.SUCCEEDED
    return job.id


def test_a_job_goes_from_post_to_report(client: Client) -> None:
    job = client.submit(small_spec("whole way", max_steps=200, cadence={"evaluate_every_steps": 50}))
    kinds = [kind for kind, _ in client.stream(job.id)]
    assert kinds[-1] == "end"
    assert {"state_changed", "rank_started", "evaluation", "drift", "checkpoint", "progress"} <= set(kinds)
    done = client.job(job.id)
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    report = client.report(job.id)
    assert report.complete
    assert report.num_steps == 200
    assert [e.step for e in report.evaluations] == [50, 100, 150, 200]
    assert report.last_evaluation is not None
    assert report.last_evaluation.population.accuracy > 0.5  # ten classes: chance is 0.1
    assert report.drift.max_rank_disagreement == 0
    for rank in (0, 1):
        series = client.metric(job.id, "train/loss", rank=rank, max_points=5000)
        assert series.steps == tuple(range(1, 201))
    assert series.values[-1] < series.values[0]
    assert {layer.num_channels for drift in client.drift(job.id) for layer in drift.layers} == {16}
    assert any("accuracy" in record.text for record in client.logs(job.id))


def test_two_jobs_with_the_same_seed_have_the_same_losses(client: Client) -> None:
    jobs = [client.submit(small_spec("twin", max_steps=30, seed=3)) for _ in range(2)]
    losses = []
    for job in jobs:
        assert wait_until_ended(client, job.id).state is JobState.SUCCEEDED
        losses.append(client.metric(job.id, "train/loss", max_points=5000).values)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 30


def test_local_normalization_is_reported_as_what_it_is(client: Client) -> None:
    job = client.submit(small_spec("local", max_steps=60, normalization=Normalization.LOCAL, batch_size_per_worker=2))
    assert wait_until_ended(client, job.id).state is JobState.SUCCEEDED
    drift = client.report(job.id).drift
    assert drift.max_rank_disagreement is not None
    assert drift.max_rank_disagreement > 0
    assert drift.colour in DriftColour


def test_a_killed_worker_is_replaced_and_the_job_goes_on_from_its_checkpoint(client: Client) -> None:
    job = client.submit(small_spec("killed worker", max_steps=1500, cadence={"checkpoint_every_steps": 100}))
    pids = rank_pids(client, job.id)
    wait_for("a checkpoint", lambda: client.events(job.id, types=[Topic.CHECKPOINT]))
    os.kill(pids[1], signal.SIGKILL)
    done = wait_until_ended(client, job.id)
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 2)
    events = client.events(job.id, types=[Topic.STATE_CHANGED, Topic.RANK_STARTED])
    recovery = next(e for e in events if e.type == "state_changed" and e.body["to"] == "recovering")
    assert recovery.body["reason"] == Reason.WORKER_LOST
    assert "rank 1" in recovery.body["detail"]
    resumed = [e.body["resumed_step"] for e in events if e.type == "rank_started" and e.attempt == 2]
    assert resumed[0] == resumed[1] >= 100
    series = client.metric(job.id, "train/loss", rank=0, max_points=5000)
    assert series.steps == tuple(range(1, 1501))


def test_a_cancelled_job_leaves_no_worker(client: Client) -> None:
    job = client.submit(small_spec("cancelled", max_steps=LONG))
    pids = rank_pids(client, job.id)
    client.cancel(job.id)
    done = wait_until_ended(client, job.id)
    assert (done.state, done.reason) == (JobState.CANCELLED, Reason.CANCELLED_BY_USER)
    wait_for("the ranks to be gone", lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert client.cancel(job.id).state is JobState.CANCELLED
    with pytest.raises(Conflict):
        client.cancel(succeeded_job(client))


def test_an_error_in_training_fails_the_job_with_its_words(client: Client, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train-images-idx3-ubyte").write_bytes(b"not an IDX file")
    job = client.submit(small_spec("broken data", max_steps=5, data=f"idx:{broken}"))
    done = wait_until_ended(client, job.id)
    assert (done.state, done.attempt, done.reason) == (JobState.FAILED, 1, Reason.TRAINING_ERROR)
    assert str(broken) in done.detail
    assert "train-labels-idx1-ubyte" in done.detail


def test_a_loss_that_overflows_is_called_diverged(client: Client) -> None:
    spec = small_spec("overflow", max_steps=60, optimizer={"name": "sgd", "learning_rate": 1e30})
    job = client.submit(spec)
    assert wait_until_ended(client, job.id).state is JobState.SUCCEEDED
    report = client.report(job.id)
    assert report.convergence.verdict == "diverged"
    series = client.metric(job.id, "train/loss", max_points=5000)
    assert len(series.steps) == 60
    assert not all(map(math.isfinite, series.values))


def test_what_is_impossible_is_refused_before_it_is_queued(client: Client) -> None:
    spec = small_spec("x", max_steps=1, num_workers=4000, data="idx:/no/such/folder")
    with pytest.raises(InvalidRequest) as caught:
        client.submit(spec)
    assert {p.pointer for p in caught.value.problems} == {"/num_workers", "/data"}


def test_a_service_killed_in_the_middle_of_a_job_finds_it_finished(service: RunningService) -> None:
    with service.client() as client:
        job = client.submit(small_spec("survivor", max_steps=3000))
        wait_for_step(client, job.id, 100)
        ranks_before = rank_pids(client, job.id)
    port = int(service.url.rpartition(":")[2])
    service.kill()
    assert all(psutil.pid_exists(pid) for pid in ranks_before), "the ranks must not notice"
    service.start(port)
    with service.client() as client:
        done = wait_until_ended(client, job.id)
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
        assert client.report(job.id).complete
        for rank in (0, 1):
            series = client.metric(job.id, "train/loss", rank=rank, max_points=5000)
            assert series.steps == tuple(range(1, 3001))


def test_a_second_service_on_the_same_folder_is_refused(service: RunningService) -> None:
    second = RunningService(service.data_dir)
    with pytest.raises(AssertionError, match=f"in use by a service with process id {service.pid}"):
        second.start()


def test_a_taken_port_is_named_with_the_way_out(service: RunningService, tmp_path: Path) -> None:
    second = RunningService(tmp_path / "second")
    with pytest.raises(AssertionError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*--port or SYNCBN_PORT"):
        second.start(int(service.url.rpartition(":")[2]))
