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
from service.scheduler import (
    Decision,
    Evidence,
    LaunchState,
    Observation,
    decide,
    passed_deadline,
    within_budget,
)
from service.scheduler.rules import Ruling

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SUCCEEDED = AttemptEnded(outcome=Outcome.SUCCEEDED)
SAVED = AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=40)
LEFT = AttemptEnded(outcome=Outcome.STOPPED, detail="stopped by Ray with SIGTERM")
LOST = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.WORKER_LOST, detail="rank 1 on node a died")
FULL = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.CHECKPOINT_FAILED, detail="no space left on device")
WRONG = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.TRAINING_ERROR, detail="ValueError: too few images")
DIVERGED = Ruling(Reason.DIVERGED, "Diverged: the loss is nan at step 7.")
AT_TARGET = Ruling(Reason.TARGET_REACHED, "Reached accuracy 0.9 after step 30.")
AT_REST = Ruling(Reason.PLATEAU_REACHED, "Plateau: nothing moves.")
DRIFTED = Ruling(Reason.DRIFT_LIMIT, "Layer bn: rms_mean_shift 0.3 is above its limit of 0.2 at step 30.")


def job(
    state: JobState,
    *,
    since_s: float = 50.0,
    stop_saves: bool = False,
    reason: Reason | None = None,
    detail: str = "",
    **timeouts: float,
) -> Job:
    """A job submitted 100 s ago that has been in its state for ``since_s``."""
    spec = JobSpec(name="t", epochs=1, num_workers=2, timeouts=Timeouts(**timeouts))
    born = NOW - timedelta(seconds=100)
    return Job(
        id="job_1",
        spec=spec,
        state=state,
        state_since=NOW - timedelta(seconds=since_s),
        stop_saves=stop_saves,
        reason=reason,
        detail=detail,
        attempt=1,
        version=3,
        created_at=born,
        updated_at=born,
    )


def decision(
    state: JobState,
    says: LaunchState | None = LaunchState.RUNNING,
    *,
    ended: AttemptEnded | None = None,
    ranks: int = 2,
    silent_s: float | None = 1.0,
    listening_s: float = 1000.0,
    step_s: float | None = None,
    resumable_step: int | None = None,
    ruling: Ruling | None = None,
    behind: bool = False,
    **about_job: Any,
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
    evidence = Evidence(
        attempt=attempt,
        observation=None if says is None else Observation(says, "words of the cluster"),
        now=NOW,
        listening_since=NOW - timedelta(seconds=listening_s),
        last_step_at=None if step_s is None else NOW - timedelta(seconds=step_s),
        resumable_step=resumable_step,
        ruling=ruling,
        rules_are_behind=behind,
    )
    return decide(job(state, **about_job), evidence)


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
        ((S.RUNNING, L.FAILED, {"ended": WRONG}), S.RECOVERING, Reason.TRAINING_ERROR),
        # no last word, and the cluster says it is over
        ((S.RUNNING, L.FAILED), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.RUNNING, L.UNKNOWN), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.RUNNING, L.SUCCEEDED), S.RECOVERING, Reason.RUNNER_LOST),
        # unless the scheduler before this one may just be handing it to the cluster
        ((S.STARTING, L.UNKNOWN, {"ranks": 0, "since_s": 5.0, "listening_s": 2.0}), None, None),
        ((S.STARTING, L.UNKNOWN, {"ranks": 0, "since_s": 16.0, "listening_s": 2.0}), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.STARTING, L.UNKNOWN, {"ranks": 0, "since_s": 5.0}), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.STARTING, L.FAILED, {"ranks": 0, "since_s": 5.0, "listening_s": 2.0}), S.RECOVERING, Reason.RUNNER_LOST),
        # silence
        ((S.RUNNING, L.RUNNING, {"silent_s": 61.0}), S.RECOVERING, Reason.NO_HEARTBEAT),
        ((S.RUNNING, L.RUNNING, {"silent_s": 61.0, "listening_s": 30.0}), None, None),
        ((S.RUNNING, L.RUNNING, {"silent_s": 11.0, "heartbeat_s": 10.0}), S.RECOVERING, Reason.NO_HEARTBEAT),
        ((S.STARTING, L.PENDING, {"ranks": 0, "silent_s": None}), S.RECOVERING, Reason.NO_HEARTBEAT),
        ((S.STARTING, L.PENDING, {"ranks": 0, "silent_s": None, "heartbeat_s": 150.0}), None, None),
        # deadlines
        ((S.RUNNING, L.RUNNING, {"total_s": 99.0}), S.FAILED, Reason.TOTAL_DEADLINE),
        ((S.RUNNING, L.RUNNING, {"total_s": 101.0}), None, None),
        ((S.RECOVERING, L.STOPPED, {"total_s": 99.0}), S.FAILED, Reason.TOTAL_DEADLINE),
        # a running job that takes no step, counted from when it came to run and from when somebody looked
        ((S.RUNNING, L.RUNNING, {"step_s": 31.0, "idle_s": 30.0}), S.FAILED, Reason.IDLE_DEADLINE),
        ((S.RUNNING, L.RUNNING, {"step_s": 29.0, "idle_s": 30.0}), None, None),
        ((S.RUNNING, L.RUNNING, {"idle_s": 30.0}), S.FAILED, Reason.IDLE_DEADLINE),
        ((S.RUNNING, L.RUNNING, {"idle_s": 30.0, "since_s": 20.0}), None, None),
        ((S.RUNNING, L.RUNNING, {"idle_s": 30.0, "listening_s": 20.0}), None, None),
        ((S.STARTING, L.RUNNING, {"step_s": 31.0, "idle_s": 30.0, "ranks": 0}), None, None),
        # cancelling ends when nothing of the attempt is left
        ((S.CANCELLING, L.RUNNING), None, None),
        ((S.CANCELLING, None), None, None),
        ((S.CANCELLING, L.STOPPED), S.CANCELLED, Reason.CANCELLED_BY_USER),
        ((S.CANCELLING, L.UNKNOWN), S.CANCELLED, Reason.CANCELLED_BY_USER),
        ((S.CANCELLING, L.SUCCEEDED, {"ended": SUCCEEDED}), S.SUCCEEDED, None),
        ((S.CANCELLING, L.STOPPED, {"ended": SAVED, "stop_saves": True}), S.CANCELLED, Reason.CANCELLED_BY_USER),
        ((S.CANCELLING, L.FAILED, {"ended": WRONG, "stop_saves": True}), S.CANCELLED, Reason.CANCELLED_BY_USER),
        # pausing ends when the checkpoint is told and nothing of the attempt is left
        ((S.PAUSING, L.RUNNING), None, None),
        ((S.PAUSING, L.RUNNING, {"ended": SAVED}), None, None),
        ((S.PAUSING, None, {"ended": SAVED}), None, None),
        ((S.PAUSING, L.SUCCEEDED, {"ended": SAVED}), S.PAUSED, Reason.PAUSED_BY_USER),
        ((S.PAUSING, L.UNKNOWN, {"ended": SAVED}), S.PAUSED, Reason.PAUSED_BY_USER),
        # it finished first
        ((S.PAUSING, L.RUNNING, {"ended": SUCCEEDED}), S.SUCCEEDED, None),
        ((S.PAUSING, None, {"ended": SUCCEEDED}), S.SUCCEEDED, None),
        # without the wanted checkpoint, an older one counts; without any, it goes on
        ((S.PAUSING, L.FAILED, {"ended": FULL, "resumable_step": 20}), S.PAUSED, Reason.PAUSED_BY_USER),
        ((S.PAUSING, L.FAILED, {"ended": FULL}), S.RECOVERING, Reason.CHECKPOINT_FAILED),
        ((S.PAUSING, L.FAILED, {"ended": LOST, "resumable_step": 20}), S.PAUSED, Reason.PAUSED_BY_USER),
        ((S.PAUSING, L.FAILED, {"ended": LOST}), S.RECOVERING, Reason.WORKER_LOST),
        ((S.PAUSING, L.FAILED), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.PAUSING, L.STOPPED, {"ended": LEFT}), S.RECOVERING, Reason.CHECKPOINT_FAILED),
        ((S.PAUSING, L.STOPPED, {"since_s": 61.0}), S.RECOVERING, Reason.CHECKPOINT_FAILED),
        ((S.PAUSING, L.STOPPED, {"since_s": 61.0, "resumable_step": 20}), S.PAUSED, Reason.PAUSED_BY_USER),
        ((S.PAUSING, L.STOPPED, {"since_s": 61.0, "resumable_step": 0}), S.PAUSED, Reason.PAUSED_BY_USER),
        # an error of the user's own is told as what it is
        ((S.PAUSING, L.FAILED, {"ended": WRONG, "resumable_step": 20}), S.FAILED, Reason.TRAINING_ERROR),
        # a rule of the job's own: divergence fails it, whatever else; others let it save first
        ((S.RUNNING, L.RUNNING, {"ruling": DIVERGED}), S.FAILED, Reason.DIVERGED),
        ((S.RUNNING, L.RUNNING, {"ruling": DIVERGED, "ended": SUCCEEDED}), S.FAILED, Reason.DIVERGED),
        ((S.RUNNING, L.FAILED, {"ruling": DIVERGED, "ended": LOST}), S.FAILED, Reason.DIVERGED),
        ((S.RUNNING, L.RUNNING, {"ruling": AT_TARGET}), S.PAUSING, Reason.TARGET_REACHED),
        ((S.RUNNING, None, {"ruling": AT_REST}), S.PAUSING, Reason.PLATEAU_REACHED),
        ((S.RUNNING, L.RUNNING, {"ruling": DRIFTED}), S.PAUSING, Reason.DRIFT_LIMIT),
        # it came to its end before, or cannot save any more
        ((S.RUNNING, L.RUNNING, {"ruling": AT_TARGET, "ended": SUCCEEDED}), S.SUCCEEDED, None),
        ((S.RUNNING, L.RUNNING, {"behind": True, "ended": SUCCEEDED}), None, None),
        ((S.RUNNING, L.FAILED, {"ruling": DRIFTED, "ended": LOST}), S.RECOVERING, Reason.WORKER_LOST),
        ((S.RUNNING, L.UNKNOWN, {"ruling": AT_TARGET}), S.RECOVERING, Reason.RUNNER_LOST),
        ((S.RUNNING, L.RUNNING, {"ruling": AT_TARGET, "silent_s": 61.0}), S.RECOVERING, Reason.NO_HEARTBEAT),
        # what a rule let save succeeds, or stays paused
        ((S.PAUSING, L.RUNNING, {"ended": SAVED, "reason": Reason.TARGET_REACHED}), None, None),
        ((S.PAUSING, L.STOPPED, {"ended": SAVED, "reason": Reason.TARGET_REACHED}), S.SUCCEEDED, Reason.TARGET_REACHED),
        (
            (S.PAUSING, L.STOPPED, {"ended": SAVED, "reason": Reason.PLATEAU_REACHED}),
            S.SUCCEEDED,
            Reason.PLATEAU_REACHED,
        ),
        (
            (S.PAUSING, L.RUNNING, {"ended": SUCCEEDED, "reason": Reason.TARGET_REACHED}),
            S.SUCCEEDED,
            Reason.TARGET_REACHED,
        ),
        ((S.PAUSING, L.STOPPED, {"ended": SAVED, "reason": Reason.DRIFT_LIMIT}), S.PAUSED, Reason.DRIFT_LIMIT),
        ((S.PAUSING, L.RUNNING, {"ended": SUCCEEDED, "reason": Reason.DRIFT_LIMIT}), S.SUCCEEDED, None),
        # without its checkpoint it has not succeeded, whatever older ones there are
        (
            (S.PAUSING, L.FAILED, {"ended": FULL, "resumable_step": 20, "reason": Reason.TARGET_REACHED}),
            S.RECOVERING,
            Reason.CHECKPOINT_FAILED,
        ),
        (
            (S.PAUSING, L.STOPPED, {"since_s": 61.0, "resumable_step": 0, "reason": Reason.PLATEAU_REACHED}),
            S.RECOVERING,
            Reason.CHECKPOINT_FAILED,
        ),
        (
            (S.PAUSING, L.FAILED, {"ended": LOST, "resumable_step": 20, "reason": Reason.DRIFT_LIMIT}),
            S.PAUSED,
            Reason.DRIFT_LIMIT,
        ),
        # waiting and paused jobs are nobody's business here
        ((S.PAUSED, L.RUNNING), None, None),
        ((S.QUEUED, L.UNKNOWN), None, None),
    ],
)
def test_what_follows(arguments: tuple[Any, ...], to: JobState | None, reason: Reason | None) -> None:
    state, says, *rest = arguments
    made = decision(state, says, **(rest[0] if rest else {}))
    assert (made.to, made.reason) == (to, reason)
    assert made.to is None or made.to in TRANSITIONS[state]


@pytest.mark.parametrize(
    ("state", "about_job"),
    [
        (S.RECOVERING, {}),
        (S.CANCELLING, {}),
        (S.CANCELLING, {"stop_saves": True, "since_s": 61.0}),
        (S.CANCELLING, {"stop_saves": True, "since_s": 6.0, "stop_grace_s": 5.0}),
        (S.PAUSING, {"since_s": 61.0}),
        (S.PAUSING, {"since_s": 0.1, "stop_grace_s": 0.0}),
    ],
)
def test_processes_that_are_not_wanted_or_had_their_grace_are_stopped(
    state: JobState, about_job: dict[str, Any]
) -> None:
    assert decision(state, L.RUNNING, **about_job) == Decision(stop=True)
    assert decision(state, None, **about_job) == Decision()


def test_a_job_that_shall_save_is_left_alone_during_its_grace() -> None:
    for state in (S.PAUSING, S.CANCELLING):
        assert decision(state, L.RUNNING, stop_saves=True, since_s=59.0) == Decision()
        # while the service was away nobody could tell it to save
        assert decision(state, L.RUNNING, stop_saves=True, since_s=90.0, listening_s=59.0) == Decision()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ended": SAVED}, "saved at step 40"),
        ({"ended": FULL, "resumable_step": 20}, "no space left on device; a resume goes on from step 20"),
        ({"since_s": 61.0, "resumable_step": 20}, "stop_grace_s of 60 s; a resume goes on from step 20"),
        ({"since_s": 61.0, "resumable_step": 0}, "a resume goes on from the beginning"),
        ({"ended": FULL}, "no space left on device; there is no checkpoint to pause at, so it goes on"),
    ],
)
def test_a_pause_says_from_where_a_resume_goes_on(arguments: dict[str, Any], said: str) -> None:
    assert said in decision(S.PAUSING, L.STOPPED, **arguments).detail


@pytest.mark.parametrize(
    ("reason", "arguments", "said"),
    [
        (Reason.TARGET_REACHED, {"ended": SAVED}, "It is there. Saved at step 40"),
        (Reason.TARGET_REACHED, {"ended": SUCCEEDED}, "It is there."),
        (Reason.DRIFT_LIMIT, {"ended": SAVED}, "It is there. Saved at step 40"),
        (Reason.DRIFT_LIMIT, {"ended": FULL, "resumable_step": 20}, "It is there. No space left on device; a resume"),
        (Reason.PLATEAU_REACHED, {"ended": FULL}, "device; it goes on until its rule, plateau_reached, holds again"),
    ],
)
def test_what_a_rule_said_is_kept(reason: Reason, arguments: dict[str, Any], said: str) -> None:
    assert said in decision(S.PAUSING, L.STOPPED, reason=reason, detail="It is there.", **arguments).detail


def test_a_diverged_run_is_stopped_and_others_are_told_to_save() -> None:
    assert decision(S.RUNNING, L.RUNNING, ruling=DIVERGED) == Decision(
        S.FAILED, Reason.DIVERGED, DIVERGED.detail, stop=True
    )
    assert decision(S.RUNNING, L.RUNNING, ruling=DRIFTED) == Decision(S.PAUSING, Reason.DRIFT_LIMIT, DRIFTED.detail)


def test_a_cancelled_job_says_whether_it_was_saved() -> None:
    for ended, said in ((SAVED, "saved at step 40 first"), (LEFT, "it left without saving a checkpoint")):
        assert decision(S.CANCELLING, L.STOPPED, ended=ended, stop_saves=True).detail == said
    assert decision(S.CANCELLING, L.STOPPED, ended=LEFT).detail == ""


def test_of_a_traceback_only_the_line_that_names_the_error_is_told() -> None:
    attempt = Attempt(job_id="job_1", number=1, created_at=NOW, heartbeat_at=NOW)
    traceback = "Traceback:\n  File x\nImportError: no module named y\n\n"
    made = decide(job(S.RUNNING), Evidence(attempt, Observation(LaunchState.FAILED, traceback), NOW, NOW))
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
    wanted = Decision(S.RECOVERING, reason, "it broke")
    budget = Retries().of_class(reason_class)
    others = {other: 99 for other in ReasonClass if other is not reason_class}
    assert within_budget(job(S.RUNNING), wanted, others | {reason_class: budget - 1}) == wanted
    given_up = within_budget(job(S.RUNNING), wanted, {reason_class: budget})
    assert (given_up.to, given_up.reason) == (S.FAILED, reason)
    assert given_up.detail == f"it broke (gave up after {budget} recoveries of class {reason_class})"


def test_errors_of_the_users_own_are_not_repeated() -> None:
    failed = within_budget(job(S.RUNNING), decision(S.RUNNING, L.FAILED, ended=WRONG), {})
    assert (failed.to, failed.reason, failed.detail) == (S.FAILED, Reason.TRAINING_ERROR, WRONG.detail)
    assert within_budget(job(S.RUNNING), Decision(S.SUCCEEDED), {}) == Decision(S.SUCCEEDED)


@pytest.mark.parametrize(
    ("about_job", "reason"),
    [
        ({"queue_s": 49.0}, Reason.QUEUE_DEADLINE),
        ({"queue_s": 51.0}, None),  # it is 100 s old, and came into the queue 50 s ago
        ({"total_s": 99.0}, Reason.TOTAL_DEADLINE),
        ({"total_s": 101.0}, None),
        ({}, None),
    ],
)
def test_a_queued_job_may_only_wait_as_long_as_its_owner_allows(
    about_job: dict[str, Any], reason: Reason | None
) -> None:
    late = passed_deadline(job(S.QUEUED, **about_job), NOW)
    assert (late and late.reason) == reason
    assert late is None or (late.to, late.stop) == (S.FAILED, False)
