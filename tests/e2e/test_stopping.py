"""A service that is stopped takes its jobs along, and they lose nothing by it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs import JobState, Reason
from tests.e2e.conftest import RunningService, small_spec, wait_for
from tests.e2e.test_job import LONG, wait_for_step

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
        certificate = wait_for(
            "the certificate", lambda: [e for e in client.events(job.id) if e.type == "resume_certificate"]
        )
        assert (certificate[0].attempt, certificate[0].body["exact"]) == (2, True)
        events = client.events(job.id)
        (recovery,) = [e for e in events if e.type == "state_changed" and e.body["to"] == JobState.RECOVERING]
        assert recovery.body["reason"] == Reason.SERVICE_STOPPED
        (saved,) = [e.body["step"] for e in events if e.type == "checkpoint" and e.attempt == 1]
        assert f"having saved at step {saved}" in recovery.body["detail"]
        assert [e.body["resumed_step"] for e in events if e.type == "rank_started"] == [0, saved]
        steps = client.metric(job.id, "train/loss", rank=0, max_points=5000).steps
        assert steps[:saved] == tuple(range(1, saved + 1))
