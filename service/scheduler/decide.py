"""What to do about a job next: a pure function of what is stored and what the cluster says."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.jobs import Attempt, Job, JobState, Outcome, Phase, Reason, ReasonClass
from service.scheduler.launcher import Observation

START_GRACE_S = 60.0
"""How much longer than its heartbeat limit an attempt may take to report for the first time."""


@dataclass(frozen=True)
class Decision:
    """What to do, in this order: end the attempt's processes, change the state, start the next attempt."""

    to: JobState | None = None
    reason: Reason | None = None
    detail: str = ""
    phase: Phase | None = None
    stop: bool = False
    start: bool = False
    keep_output: bool = False
    """Whether what the processes wrote should be stored: they left without a last word."""


WAIT = Decision()


def decide(
    job: Job,
    attempt: Attempt,
    observation: Observation | None,
    recoveries: Mapping[ReasonClass, int],
    now: datetime,
    service_since: datetime,
) -> Decision:
    """Judge one active job.

    ``observation`` must be older than ``attempt``: an attempt's last word is stored before the cluster sees it
    end. None says that the cluster did not answer; then only the job's own reports count. Silence is counted
    from ``service_since`` at the earliest, because nobody listened before.
    """
    match job.state:
        case JobState.CANCELLING:
            return _decide_cancelling(attempt, observation)
        case JobState.RECOVERING:
            return _decide_recovering(job, observation)
        case JobState.STARTING | JobState.RUNNING:
            return _decide_running(job, attempt, observation, recoveries, now, service_since)
        case _:
            return WAIT


def queue_deadline_passed(job: Job, now: datetime) -> bool:
    """Whether a queued job has waited longer than its owner allows."""
    limit = job.spec.timeouts.queue_s
    return limit is not None and now - job.created_at > timedelta(seconds=limit)


def _decide_cancelling(attempt: Attempt, observation: Observation | None) -> Decision:
    if observation is None:
        return WAIT
    if not observation.state.over:
        return Decision(stop=True)
    if attempt.ended is not None and attempt.ended.outcome is Outcome.SUCCEEDED:
        return Decision(JobState.SUCCEEDED, detail="it finished before the cancellation reached it")
    return Decision(JobState.CANCELLED, Reason.CANCELLED_BY_USER)


def _decide_recovering(job: Job, observation: Observation | None) -> Decision:
    if observation is None:
        return WAIT
    if not observation.state.over:
        return Decision(stop=True)
    return Decision(start=True, reason=job.reason)


def _decide_running(
    job: Job,
    attempt: Attempt,
    observation: Observation | None,
    recoveries: Mapping[ReasonClass, int],
    now: datetime,
    service_since: datetime,
) -> Decision:
    if job.state is JobState.STARTING and attempt.num_ranks_started >= job.spec.num_workers:
        return Decision(JobState.RUNNING, phase=Phase.TRAINING)
    if attempt.ended is not None:
        if attempt.ended.outcome is Outcome.SUCCEEDED:
            return Decision(JobState.SUCCEEDED)
        return _recover_or_fail(job, attempt.ended.reason or Reason.RUNNER_LOST, attempt.ended.detail, recoveries)
    total = job.spec.timeouts.total_s
    if total is not None and now - job.created_at > timedelta(seconds=total):
        detail = f"it ran longer than its total_s of {total:g} s"
        return Decision(JobState.FAILED, Reason.TOTAL_DEADLINE, detail, stop=True)
    if observation is not None and observation.state.over:
        said = f"the cluster says {observation.state}: {_last_line(observation.message)}".rstrip(": ")
        detail = f"the runner left without a last word; {said}"
        return _recover_or_fail(job, Reason.RUNNER_LOST, detail, recoveries, keep_output=True)
    silence = _silence_s(attempt, now, service_since)
    limit = job.spec.timeouts.heartbeat_s + (0.0 if attempt.heartbeat_at else START_GRACE_S)
    if silence > limit:
        detail = f"its runner has been silent for {silence:.0f} s, longer than heartbeat_s allows"
        return _recover_or_fail(job, Reason.NO_HEARTBEAT, detail, recoveries, stop=True, keep_output=True)
    return WAIT


def _last_line(text: str) -> str:
    """The line of a traceback that names the error; all of it is kept in the job's log."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _silence_s(attempt: Attempt, now: datetime, service_since: datetime) -> float:
    last_word = attempt.heartbeat_at or attempt.created_at
    return (now - max(last_word, service_since)).total_seconds()


def _recover_or_fail(
    job: Job,
    reason: Reason,
    detail: str,
    recoveries: Mapping[ReasonClass, int],
    *,
    stop: bool = False,
    keep_output: bool = False,
) -> Decision:
    kind = reason.reason_class
    budget, used = job.spec.retries.of_class(kind), recoveries.get(kind, 0)
    to = JobState.RECOVERING if used < budget else JobState.FAILED
    if to is JobState.FAILED and budget:
        detail = f"{detail} (gave up after {used} recoveries of class {kind})"
    return Decision(to, reason, detail, stop=stop, keep_output=keep_output)
