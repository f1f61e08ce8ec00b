"""Jobs that end or pause by rules of their own, on the real service and a real Ray head."""

import math
from pathlib import Path

import pytest

from service.client import Client
from service.jobs import Job, JobState, Reason, Topic
from tests.e2e.conftest import RunningService, small_spec, wait_for, wait_until_ended
from tests.e2e.test_job import LONG
from tests.e2e.test_stopping import SELDOM, asked, wait_for_state


def submit(client: Client, name: str, **fields: object) -> Job:
    """An endless job of one worker, so that two run at once."""
    return client.submit(small_spec(name, LONG, num_workers=1, **fields))


def saved_step(client: Client, job: Job) -> int:
    """The step of the job's only checkpoint, which is there."""
    (saved,) = [event.body for event in client.events(job.id, types=[Topic.CHECKPOINT])]
    assert Path(saved["path"]).is_file()
    return int(saved["step"])


@pytest.mark.timeout(300)
def test_jobs_end_and_pause_by_their_own_rules(service: RunningService, client: Client) -> None:
    limit = {"metric": "rms_mean_shift", "above": 0.05, "action": "pause"}
    every_50 = SELDOM | {"drift_every_steps": 50}
    drifts = submit(client, "adrift", bn_momentum=0.0001, cadence=every_50, drift_limits=[limit])
    every_20 = SELDOM | {"evaluate_every_steps": 20}
    learns = submit(client, "goal", cadence=every_20, target={"value": 0.8}, stop_when=["target", "diverged"])
    steep = {"name": "sgd", "learning_rate": 1e30}
    diverges = submit(client, "steep", cadence=SELDOM, optimizer=steep, stop_when=["diverged"])

    step = paused_by_drift(client, drifts)
    asked(service, drifts.id, "resume")
    stopped_at_its_target(client, learns)
    failed_where_it_began(client, diverges)
    assert first_exceeded(client, drifts, attempt=2) == 50 * (step // 50 + 1)  # the next sample
    client.cancel(drifts.id)
    wait_until_ended(client, drifts.id)


def first_exceeded(client: Client, job: Job, attempt: int) -> int:
    """The step at which the attempt first found a limit exceeded."""

    def told() -> list[int]:
        events = client.events(job.id, types=[Topic.LIMIT_EXCEEDED])
        return [event.body["step"] for event in events if event.attempt == attempt]

    return wait_for("a new sample", told)[0]


def paused_by_drift(client: Client, job: Job) -> int:
    """At which step it goes on."""
    paused = wait_for_state(client, job.id, JobState.PAUSED)
    step = saved_step(client, job)
    assert paused.reason is Reason.DRIFT_LIMIT
    assert "rms_mean_shift" in paused.detail
    assert paused.detail.endswith(f"is above its limit of 0.05 at step 50. Saved at step {step}")
    return step


def stopped_at_its_target(client: Client, job: Job) -> None:
    done = wait_until_ended(client, job.id)
    assert (done.state, done.reason) == (JobState.SUCCEEDED, Reason.TARGET_REACHED)
    evaluations = client.report(job.id).evaluations
    there = [evaluation.stored.accuracy >= 0.8 for evaluation in evaluations]
    first = next(i for i in range(len(there)) if all(there[i : i + 3]))
    assert f"Reached accuracy 0.8 after step {evaluations[first].step}, " in done.detail
    step = saved_step(client, job)
    assert done.detail.endswith(f"Saved at step {step}")
    assert evaluations[first + 2].step <= step < LONG


def failed_where_it_began(client: Client, job: Job) -> None:
    done = wait_until_ended(client, job.id)
    assert (done.state, done.reason) == (JobState.FAILED, Reason.DIVERGED)
    (found,) = [event.body for event in client.events(job.id, types=[Topic.NON_FINITE])]
    step, tensor = found["step"], found["tensor"]
    assert f"at step {step}, the first that is not finite. It began in" in done.detail
    assert f"{tensor}, on rank 0" in done.detail
    series = client.metric(job.id, "train/loss", last_step=step)
    assert series.steps == tuple(range(1, step + 1))
    assert [math.isfinite(loss) for loss in series.values] == [True] * (step - 1) + [False]
