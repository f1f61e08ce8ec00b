"""One job that everything befalls, on the real service and a real Ray head, and that goes on each time."""

import os
import signal

import psutil
import pytest

from service.client import Client
from service.cluster.head_record import read_record
from service.jobs import JobEvent, JobState, Reason, Topic
from tests.e2e.conftest import RunningService, small_spec, wait_for, wait_until_ended
from tests.e2e.test_job import LONG, rank_pids

PATIENCE_S = 150.0


def runner_pid(service: RunningService, attempt_id: str) -> int:
    """The runner of an attempt: the process below the head that runs the module for it."""
    job_id, _, number = attempt_id.rpartition("-")
    for process in service.head_processes():
        try:
            if "service.cluster.runner" in process.cmdline():
                run = process.environ().get("SYNCBN_RUN", "")
                if job_id in run and f'"attempt":{number}' in run:
                    return process.pid
        except psutil.Error:
            continue
    raise AssertionError(f"no runner of {attempt_id}")


def wait_for_attempt(client: Client, job_id: str, attempt: int) -> list[int]:
    """The ranks of an attempt that has saved a checkpoint, so that the next one can go on from there."""

    def saved() -> bool:
        return any(e.attempt == attempt for e in client.events(job_id, types=[Topic.CHECKPOINT]))

    wait_for(f"a checkpoint of attempt {attempt}", saved, PATIENCE_S)
    return rank_pids(client, job_id, attempt)


def all_events(client: Client, job_id: str) -> list[JobEvent]:
    events: list[JobEvent] = []
    while page := client.events(job_id, after=events[-1].seq if events else 0):
        events += page
    return events


def all_steps(client: Client, job_id: str, rank: int) -> list[int]:
    steps: list[int] = []
    while True:
        first = steps[-1] + 1 if steps else 1
        window = {"first_step": first, "last_step": first + 4999, "max_points": 5000}
        series = client.metric(job_id, "train/loss", rank=rank, **window)
        if not series.steps:
            return steps
        steps += series.steps


@pytest.mark.timeout(600)
def test_a_job_outlives_a_frozen_rank_a_killed_runner_and_a_killed_head(
    service: RunningService, client: Client
) -> None:
    spec = small_spec("cat", LONG, cadence={"checkpoint_every_steps": 300}, timeouts={"collective_s": 5})
    job_id = client.submit(spec).id

    frozen = wait_for_attempt(client, job_id, 1)[1]
    os.kill(frozen, signal.SIGSTOP)
    wait_for_attempt(client, job_id, 2)
    os.kill(runner_pid(service, f"{job_id}-2"), signal.SIGKILL)
    wait_for_attempt(client, job_id, 3)
    record = read_record(service.data_dir / "ray" / "head.json")
    assert record is not None
    (gcs,) = [process for process in service.head_processes() if process.name() == "gcs_server"]
    gcs.kill()
    wait_for_attempt(client, job_id, 4)
    client.cancel(job_id, checkpoint=True)
    done = wait_until_ended(client, job_id, PATIENCE_S)

    assert (done.state, done.attempt) == (JobState.CANCELLED, 4)
    assert "saved at step" in done.detail
    events = all_events(client, job_id)
    recoveries = [e.body for e in events if e.type == "state_changed" and e.body["to"] == JobState.RECOVERING]
    assert [body["reason"] for body in recoveries][:2] == [Reason.COLLECTIVE_TIMEOUT, Reason.RUNNER_LOST]
    assert f"pid {frozen} had stopped answering" in recoveries[0]["detail"]
    assert recoveries[2]["reason"] in (Reason.RUNNER_LOST, Reason.WORKER_LOST)
    assert record.processes() == []
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    resumed = {e.attempt: e.body["resumed_step"] for e in events if e.type == "rank_started"}
    assert all(resumed[attempt] > 0 for attempt in (2, 3, 4))
    for rank in (0, 1):
        steps = all_steps(client, job_id, rank)
        assert steps == list(range(1, len(steps) + 1))
