"""The service against a Ray head that it did not start."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Client
from service.cluster.head import LocalRayHead
from service.cluster.head_record import read_record
from service.jobs import Job, JobState, Phase, Reason
from tests.e2e.conftest import RunningService, small_spec, wait_for, wait_until_ended


def told_to_wait(client: Client, job_id: str) -> Job | None:
    """The job once it says that it waits for the cluster."""
    job = client.job(job_id)
    return job if job.phase is Phase.WAITING_CLUSTER else None


@pytest.fixture
def head(tmp_path: Path) -> Iterator[LocalRayHead]:
    head = LocalRayHead(tmp_path / "someone else's", num_cpus=2)
    yield head
    head.stop()


def test_the_service_runs_jobs_on_a_cluster_it_did_not_start_and_leaves_it_alone(
    head: LocalRayHead, tmp_path: Path
) -> None:
    address, token = head.ensure()
    service = RunningService(tmp_path / "data", {"SYNCBN_RAY_ADDRESS": address, "SYNCBN_RAY_TOKEN": token})
    service.start()
    try:
        service.wait_ready()
        assert not (service.data_dir / "ray").exists(), "it must not keep a head of its own"
        with service.client() as client:
            job = client.submit(small_spec("elsewhere", max_steps=20))
            assert wait_until_ended(client, job.id).state is JobState.SUCCEEDED
            assert client.report(job.id).num_steps == 20
    finally:
        service.stop()
    record = read_record(tmp_path / "someone else's" / "head.json")
    assert record is not None
    assert record.alive, "stopping the service must not stop the cluster"


def test_a_wrong_token_keeps_the_job_queued_and_says_so(head: LocalRayHead, tmp_path: Path) -> None:
    address, _token = head.ensure()
    service = RunningService(tmp_path / "data", {"SYNCBN_RAY_ADDRESS": address, "SYNCBN_RAY_TOKEN": "wrong" * 8})
    service.start()
    try:
        with service.client() as client:
            job = client.submit(small_spec("waits", max_steps=1))
            waiting = wait_for("the reason", lambda: told_to_wait(client, job.id))
            assert (waiting.state, waiting.reason) == (JobState.QUEUED, Reason.CLUSTER_UNREACHABLE)
            assert "token" in waiting.detail
            assert "cluster" in client.ready()
    finally:
        service.stop()


def test_a_cluster_that_cannot_be_reached_keeps_the_job_queued(tmp_path: Path) -> None:
    service = RunningService(tmp_path / "data", {"SYNCBN_RAY_ADDRESS": "http://127.0.0.1:9"})
    service.start()
    try:
        with service.client() as client:
            job = client.submit(small_spec("waits", max_steps=1))
            waiting = wait_for("the reason", lambda: told_to_wait(client, job.id))
            assert "127.0.0.1:9" in waiting.detail
    finally:
        service.stop()
