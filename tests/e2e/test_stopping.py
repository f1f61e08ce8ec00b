"""Jobs that are stopped on the way, by their owner or with the service, and lose nothing by it."""

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx2
import psutil
import pytest
import torch

from service.client import Client
from service.errors import InvalidRequest
from service.jobs import Job, JobSpec, JobState, Reason, StepMetrics, Topic
from service.training.loop import RankContext, train
from tests.e2e.conftest import RunningService, small_spec, wait_for, wait_until_ended
from tests.e2e.test_job import LONG, rank_pids, wait_for_step

SELDOM = {"evaluate_every_steps": LONG, "drift_every_steps": LONG, "checkpoint_every_steps": LONG}


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[RunningService]:
    """A service that a test may stop."""
    running = RunningService(tmp_path / "service")
    try:
        running.start()
        running.wait_ready()
        yield running
    finally:
        running.stop()


def test_a_job_goes_on_at_the_very_step_where_the_service_was_stopped(own_service: RunningService) -> None:
    with own_service.client() as client:
        job = client.submit(small_spec("overnight", max_steps=LONG, num_workers=1, cadence=SELDOM))
        wait_for_step(client, job.id, 50)
    own_service.stop()
    own_service.start()
    with own_service.client() as client:
        certificate = wait_for("the certificate", lambda: client.events(job.id, types=[Topic.RESUME_CERTIFICATE]))
        assert (certificate[0].attempt, certificate[0].body["exact"]) == (2, True)
        events = client.events(job.id, types=[Topic.STATE_CHANGED, Topic.CHECKPOINT, Topic.RANK_STARTED])
        (recovery,) = [e for e in events if e.type == "state_changed" and e.body["to"] == JobState.RECOVERING]
        assert recovery.body["reason"] == Reason.SERVICE_STOPPED
        (saved,) = [e.body["step"] for e in events if e.type == "checkpoint" and e.attempt == 1]
        assert f"having saved at step {saved}" in recovery.body["detail"]
        assert [e.body["resumed_step"] for e in events if e.type == "rank_started"] == [0, saved]
        steps = client.metric(job.id, "train/loss", rank=0, max_points=5000).steps
        assert steps[:saved] == tuple(range(1, saved + 1))


def asked(service: RunningService, job_id: str, verb: str, **wish: object) -> Job:
    """The service's answer to a verb."""
    answer = httpx2.post(f"{service.url}/v1/jobs/{job_id}:{verb}", json=wish, timeout=30.0)
    answer.raise_for_status()
    return Job.model_validate_json(answer.content)


def wait_for_state(client: Client, job_id: str, state: JobState) -> Job:
    def reached() -> Job | None:
        job = client.job(job_id)
        return job if job.state is state else None

    return wait_for(f"{job_id} to be {state}", reached, 90.0)


def losses_of_one_process(spec: JobSpec, num_steps: int, storage: Path) -> list[float]:
    """The first losses of the job, uninterrupted and without a service."""
    alone = spec.model_copy(update={"num_workers": 1, "batch_size_per_worker": spec.global_batch_size})
    events = train(alone, RankContext(0, 1, torch.device("cpu"), storage))
    steps = (event.loss for event in events if isinstance(event, StepMetrics))
    return list(islice(steps, num_steps))


def test_a_paused_job_goes_on_with_fewer_workers_and_the_same_losses(
    service: RunningService, client: Client, tmp_path: Path
) -> None:
    job = client.submit(small_spec("moved", max_steps=LONG, precision="float64", cadence=SELDOM))
    wait_for_step(client, job.id, 10)
    asked(service, job.id, "pause")
    paused = wait_for_state(client, job.id, JobState.PAUSED)
    (saved,) = [e.body["step"] for e in client.events(job.id, types=[Topic.CHECKPOINT])]
    assert f"step {saved}" in paused.detail
    resumed = asked(service, job.id, "resume", num_workers=1)
    assert (resumed.spec.num_workers, resumed.spec.batch_size_per_worker) == (1, 16)
    wait_for_step(client, job.id, saved + 10)
    client.cancel(job.id)
    (certificate,) = [e.body for e in client.events(job.id, types=[Topic.RESUME_CERTIFICATE])]
    assert (certificate["exact"], certificate["saved_by_num_workers"], certificate["num_workers"]) == (True, 2, 1)
    series = client.metric(job.id, "train/loss", rank=0, max_points=5000)
    assert series.steps[: saved + 10] == tuple(range(1, saved + 11))
    expected = losses_of_one_process(job.spec, saved + 10, tmp_path)
    # Roundings grow over hundreds of steps; a step of other images would be off by far more.
    assert series.values[saved : saved + 10] == pytest.approx(expected[saved:], rel=1e-6)
    wait_until_ended(client, job.id)


def test_a_retry_from_a_chosen_checkpoint_has_the_losses_of_the_first_time(client: Client) -> None:
    first = client.submit(small_spec("again", max_steps=90, cadence={"checkpoint_every_steps": 30}))
    assert wait_until_ended(client, first.id).state is JobState.SUCCEEDED
    with pytest.raises(InvalidRequest, match="there are those of steps 60, 90"):
        client.retry(first.id, 30)
    second = client.retry(first.id, 60)
    assert (second.retry_of, second.state) == (first.id, JobState.QUEUED)
    assert Path(second.start_checkpoint or "").name == "step-00000060.pt"
    assert wait_until_ended(client, second.id).state is JobState.SUCCEEDED
    events = client.events(second.id)
    assert [e.body["resumed_step"] for e in events if e.type == "rank_started"] == [60, 60]
    (certificate,) = [e.body for e in events if e.type == "resume_certificate"]
    assert certificate["exact"]
    for rank in (0, 1):
        before, after = (client.metric(job.id, "train/loss", rank=rank, max_points=5000) for job in (first, second))
        assert after.steps == tuple(range(61, 91))
        assert after.values == before.values[60:]  # bit for bit
    evaluations = [[e for e in client.report(job.id).evaluations if e.step == 90] for job in (first, second)]
    assert evaluations[0] == evaluations[1]


def test_a_cancel_that_cannot_save_is_forced_long_before_its_grace_ends(
    service: RunningService, client: Client
) -> None:
    patient = {"stop_grace_s": 3600, "heartbeat_s": 3600, "collective_s": 3600}
    job = client.submit(small_spec("forced", max_steps=LONG, cadence=SELDOM, timeouts=patient))
    pids = rank_pids(client, job.id)
    wait_for_step(client, job.id, 10)
    os.kill(pids[1], signal.SIGSTOP)
    assert client.cancel(job.id, checkpoint=True).stop_saves
    assert client.cancel(job.id, checkpoint=True).state is JobState.CANCELLING
    forced = client.cancel(job.id)
    assert (forced.state, forced.stop_saves) == (JobState.CANCELLING, False)
    done = wait_until_ended(client, job.id)
    assert (done.state, done.reason, done.detail) == (JobState.CANCELLED, Reason.CANCELLED_BY_USER, "")
    wait_for("the ranks to be gone", lambda: not any(psutil.pid_exists(pid) for pid in pids))
