"""What the scheduler does about a job, as a table: state, last word, what the cluster says, and what follows."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.jobs import (
    TRANSITIONS,
    Attempt,
    AttemptEnded,
    Job,
    JobSpec,
    JobState,
    Outcome,
    Reason,
    ReasonClass,
    Retries,
    Timeouts,
)
from service.scheduler import Decision, LaunchState, Observation, decide
from service.scheduler.decide import queue_deadline_passed

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SUCCEEDED = AttemptEnded(outcome=Outcome.SUCCEEDED)
LOST = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.WORKER_LOST, detail="rank 1 on node a died")
WRONG = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.TRAINING_ERROR, detail="ValueError: too few images")


def job(state: JobState, **timeouts: float) -> Job:
    spec = JobSpec(name="t", epochs=1, num_workers=2, timeouts=Timeouts(**timeouts))
    born = NOW - timedelta(seconds=100)
    return Job(
        id="job_1", spec=spec, state=state, attempt=1, version=3, state_since=born, created_at=born, updated_at=born
    )


def decision(
    state: JobState,
    says: LaunchState | None = LaunchState.RUNNING,
    *,
    ended: AttemptEnded | None = None,
    ranks: int = 2,
    silent_s: float | None = 1.0,
    used: dict[ReasonClass, int] | None = None,
    service_age_s: float = 1000.0,
    **timeouts: float,
) -> Decision:
    heartbeat = None if silent_s is None else NOW - timedelta(seconds=silent_s)
    attempt = Attempt(
        job_id="job_1",
        number=1,
        created_at=NOW - timedelta(seconds=200),
        heartbeat_at=heartbeat,
        num_ranks_started=ranks,
        ended=ended,
    )
    observation = None if says is None else Observation(says, "words of the cluster")
    return decide(job(state, **timeouts), attempt, observation, used or {}, NOW, NOW - timedelta(seconds=service_age_s))


S, L = JobState, LaunchState


@pytest.mark.parametrize(
    ("arguments", "to", "reason"),
    [
        # a job that works is left alone, whether or not the cluster answers
        ((S.RUNNING, L.RUNNING), None, None),
        ((S.RUNNING, None), None, None),
        ((S.STARTING, L.PENDING, {"ranks": 1}), None, None),
        # every rank has reported
        ((S.STARTING, L.RUNNING), S.RUNNING, None),
        ((S.STARTING, L.RUNNING, {"ended": SUCCEEDED}), S.RUNNING, None),
        # the runner's last word counts, also when the cluster cannot be asked
        ((S.RUNNING, L.RUNNING, {"ended": SUCCEEDED}), S.SUCCEEDED, None),
        ((S.RUNNING, None, {"ended": SUCCEEDED}), S.SUCCEEDED, None),
        ((S.RUNNING, L.FAILED, {"ended": LOST}), S.RECOVERING, Reason.WORKER_LOST),
        ((S.STARTING, L.FAILED, {"ended": LOST, "ranks": 0}), S.RECOVERING, Reason.WORKER_LOST),
        # errors of the user's own are not repeated
        ((S.RUNNING, L.FAILED, {"ended": WRONG}), S.FAILED, Reason.TRAINING_ERROR),
        # no last word, and the cluster says it is over
        ((S.RUNNING, L.FAILED), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.RUNNING, L.UNKNOWN), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.RUNNING, L.SUCCEEDED), S.RECOVERING, Reason.RUNNER_LOST),
        # silence
        ((S.RUNNING, L.RUNNING, {"silent_s": 61.0}), S.RECOVERING, Reason.NO_HEARTBEAT),
        ((S.RUNNING, L.RUNNING, {"silent_s": 61.0, "service_age_s": 30.0}), None, None),
        ((S.RUNNING, L.RUNNING, {"silent_s": 11.0, "heartbeat_s": 10.0}), S.RECOVERING, Reason.NO_HEARTBEAT),
        ((S.STARTING, L.PENDING, {"ranks": 0, "silent_s": None}), S.RECOVERING, Reason.NO_HEARTBEAT),
        ((S.STARTING, L.PENDING, {"ranks": 0, "silent_s": None, "heartbeat_s": 150.0}), None, None),
        # deadlines
        ((S.RUNNING, L.RUNNING, {"total_s": 99.0}), S.FAILED, Reason.TOTAL_DEADLINE),
        ((S.RUNNING, L.RUNNING, {"total_s": 101.0}), None, None),
        # cancelling ends when nothing of the attempt is left
        ((S.CANCELLING, L.RUNNING), None, None),
        ((S.CANCELLING, None), None, None),
        ((S.CANCELLING, L.STOPPED), S.CANCELLED, Reason.CANCELLED_BY_USER),
        ((S.CANCELLING, L.UNKNOWN), S.CANCELLED, Reason.CANCELLED_BY_USER),
        ((S.CANCELLING, L.SUCCEEDED, {"ended": SUCCEEDED}), S.SUCCEEDED, None),
    ],
)
def test_what_follows(arguments: tuple[Any, ...], to: JobState | None, reason: Reason | None) -> None:
    state, says, *rest = arguments
    made = decision(state, says, **(rest[0] if rest else {}))
    assert (made.to, made.reason) == (to, reason)
    assert made.to is None or made.to in TRANSITIONS[state]


@pytest.mark.parametrize("state", [S.CANCELLING, S.RECOVERING])
def test_processes_that_still_run_are_stopped_first(state: JobState) -> None:
    assert decision(state, L.RUNNING) == Decision(stop=True)


def test_of_a_traceback_only_the_line_that_names_the_error_is_told() -> None:
    attempt = Attempt(job_id="job_1", number=1, created_at=NOW, heartbeat_at=NOW)
    traceback = "Traceback:\n  File x\nImportError: no module named y\n\n"
    observation = Observation(LaunchState.FAILED, traceback)
    made = decide(job(S.RUNNING), attempt, observation, {}, NOW, NOW)
    assert made.detail == "the runner left without a last word; the cluster says failed: ImportError: no module named y"
    assert made.keep_output


def test_a_new_attempt_starts_only_when_nothing_of_the_last_is_left() -> None:
    assert not decision(S.RECOVERING, L.RUNNING).start
    assert not decision(S.RECOVERING, None).start
    assert decision(S.RECOVERING, L.STOPPED).start
    assert decision(S.RECOVERING, L.UNKNOWN).start


def test_a_silent_runner_is_stopped_and_what_it_wrote_is_kept() -> None:
    made = decision(S.RUNNING, L.RUNNING, silent_s=61.0)
    assert made.stop
    assert made.keep_output
    assert "silent for 61 s" in made.detail


@pytest.mark.parametrize("reason_class", [ReasonClass(name) for name in Retries.model_fields])
def test_each_class_of_reason_has_its_own_budget(reason_class: ReasonClass) -> None:
    reason = next(reason for reason in Reason if reason.reason_class is reason_class)
    ended = AttemptEnded(outcome=Outcome.FAILED, reason=reason)
    budget = Retries().of_class(reason_class)
    others = {other: 99 for other in ReasonClass if other is not reason_class}
    assert decision(S.RUNNING, ended=ended, used=others | {reason_class: budget - 1}).to is S.RECOVERING
    given_up = decision(S.RUNNING, ended=ended, used={reason_class: budget})
    assert given_up.to is S.FAILED
    assert f"gave up after {budget} recoveries" in given_up.detail


def test_a_queued_job_may_only_wait_as_long_as_its_owner_allows() -> None:
    assert queue_deadline_passed(job(S.QUEUED, queue_s=99.0), NOW)
    assert not queue_deadline_passed(job(S.QUEUED, queue_s=101.0), NOW)
    assert not queue_deadline_passed(job(S.QUEUED), NOW)
