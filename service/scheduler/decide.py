"""What to do about a job next: a pure function of what is stored and what the cluster says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from service.jobs import Attempt, Job, JobState, Outcome, Phase, Reason, ReasonClass
from service.scheduler.launcher import LaunchState, Observation
from service.scheduler.rules import SUCCESSES, Ruling

START_GRACE_S = 60.0
"""How much longer than its heartbeat limit an attempt may take to report for the first time."""

HANDOVER_S = 15.0
"""How long a scheduler that takes over waits for an attempt that the one before may just be handing to the cluster."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of a job's newest attempt at one moment.

    ``observation`` must be older than ``attempt``: an attempt's last word is stored before the cluster sees it
    end. None says that the cluster did not answer; then only the job's own reports count. Silence, idleness and the
    grace to save are counted from ``listening_since`` at the earliest, because nobody listened or told before.
    """

    attempt: Attempt
    observation: Observation | None
    now: datetime
    listening_since: datetime
    heard_at: datetime | None = None
    """When its runner's last report was first seen; by default the time that the report itself has."""
    last_step_at: datetime | None = None
    """When the attempt's last step was first seen, as far as it is known."""
    resumable_step: int | None = None
    """From which step the job could go on: of its last checkpoint, or 0 if it has not taken a step."""
    ruling: Ruling | None = None
    """What the job's own rules say of its run, where they were looked at."""
    rules_are_behind: bool = False
    """Whether the rules have more to read of a run that has ended."""

    @property
    def left_nothing(self) -> bool:
        """Whether the cluster says that no process of the attempt is left."""
        return self.observation is not None and self.observation.state.over


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


def decide(job: Job, evidence: Evidence) -> Decision:
    """Judge one active job. Where this says recovering, `within_budget` has the last word."""
    match job.state:
        case JobState.CANCELLING:
            return _decide_cancelling(job, evidence)
        case JobState.PAUSING:
            return _decide_pausing(job, evidence)
        case JobState.RECOVERING:
            return _decide_recovering(job, evidence)
        case JobState.STARTING | JobState.RUNNING:
            return _decide_running(job, evidence)
        case _:
            return WAIT


def within_budget(job: Job, decision: Decision, recoveries: Mapping[ReasonClass, int]) -> Decision:
    """``decision``, or failure instead where its recovery would be one too many for its class of reason."""
    if decision.to is not JobState.RECOVERING:
        return decision
    kind = decision.reason.reason_class if decision.reason else ReasonClass.INFRA
    budget = job.spec.retries.of_class(kind)
    if recoveries.get(kind, 0) < budget:
        return decision
    gave_up = f" (gave up after {recoveries.get(kind, 0)} recoveries of class {kind})" if budget else ""
    return replace(decision, to=JobState.FAILED, detail=decision.detail + gave_up)


def passed_deadline(job: Job, now: datetime) -> Decision | None:
    """Failure of a queued job that has waited longer than its owner allows; None while it has not.

    ``queue_s`` counts from when it last came into the queue, ``total_s`` from when it was submitted.
    """
    limit = job.spec.timeouts.queue_s
    if limit is not None and now - job.state_since > timedelta(seconds=limit):
        detail = f"it waited longer than its queue_s of {limit:g} s; {job.detail}".rstrip("; ")
        return Decision(JobState.FAILED, Reason.QUEUE_DEADLINE, detail)
    return _past_total(job, now)


def _decide_cancelling(job: Job, evidence: Evidence) -> Decision:
    if not evidence.left_nothing:
        return _stop_if(evidence, not job.stop_saves or _grace_is_over(job, evidence))
    ended = evidence.attempt.ended
    if ended is not None and ended.outcome is Outcome.SUCCEEDED:
        return Decision(JobState.SUCCEEDED, detail="it finished before the cancellation reached it")
    detail = ""
    if job.stop_saves:
        step = _saved_at(evidence)
        detail = f"saved at step {step} first" if step is not None else "it left without saving a checkpoint"
    return Decision(JobState.CANCELLED, Reason.CANCELLED_BY_USER, detail)


def _decide_pausing(job: Job, evidence: Evidence) -> Decision:
    """What paused for a rule keeps what the rule said; where the rule is to succeed, it does once it has saved."""
    ended, by_rule = evidence.attempt.ended, job.reason in SUCCESSES
    if ended is not None and ended.outcome is Outcome.SUCCEEDED:
        if by_rule:
            return Decision(JobState.SUCCEEDED, job.reason, job.detail)
        return Decision(JobState.SUCCEEDED, detail="it finished before the pause reached it")
    if not evidence.left_nothing:
        return _stop_if(evidence, _grace_is_over(job, evidence))
    if (step := _saved_at(evidence)) is not None:
        to = JobState.SUCCEEDED if by_rule else JobState.PAUSED
        return Decision(to, _pause_reason(job), _joined(job.detail, f"saved at step {step}"))
    reason, what = _why_not_saved(job, evidence)
    if reason.reason_class is ReasonClass.USER_ERROR:
        return Decision(JobState.FAILED, reason, what)
    if by_rule:
        detail = f"{what}; it goes on until its rule, {job.reason}, holds again"
        return Decision(JobState.RECOVERING, reason, detail, keep_output=ended is None)
    if evidence.resumable_step is None:
        detail = f"{what}; there is no checkpoint to pause at, so it goes on"
        return Decision(JobState.RECOVERING, reason, detail, keep_output=ended is None)
    goes_on = f"from step {evidence.resumable_step}" if evidence.resumable_step else "from the beginning"
    detail = _joined(job.detail, f"{what}; a resume goes on {goes_on}")
    return Decision(JobState.PAUSED, _pause_reason(job), detail, keep_output=ended is None)


def _pause_reason(job: Job) -> Reason:
    return job.reason if job.reason and job.reason.reason_class is ReasonClass.RULE else Reason.PAUSED_BY_USER


def _joined(rule: str, what: str) -> str:
    return f"{rule} {what[0].upper()}{what[1:]}" if rule else what


def _why_not_saved(job: Job, evidence: Evidence) -> tuple[Reason, str]:
    ended = evidence.attempt.ended
    if ended is not None and ended.reason is not None:
        return ended.reason, ended.detail or "it ended without saving"
    if _grace_is_over(job, evidence):
        grace = job.spec.timeouts.stop_grace_s
        return Reason.CHECKPOINT_FAILED, f"it did not save and leave within its stop_grace_s of {grace:g} s"
    if ended is None:
        return Reason.RUNNER_LOST, "the runner left without a last word"
    return Reason.CHECKPOINT_FAILED, "it left without saving"


def _decide_recovering(job: Job, evidence: Evidence) -> Decision:
    if not evidence.left_nothing:
        return _stop_if(evidence, True)
    return _past_total(job, evidence.now) or Decision(start=True, reason=job.reason)


def _decide_running(job: Job, evidence: Evidence) -> Decision:
    attempt, now = evidence.attempt, evidence.now
    if job.state is JobState.STARTING and attempt.num_ranks_started >= job.spec.num_workers:
        return Decision(JobState.RUNNING, phase=Phase.TRAINING)
    if evidence.ruling is not None and evidence.ruling.reason is Reason.DIVERGED:
        return Decision(JobState.FAILED, Reason.DIVERGED, evidence.ruling.detail, stop=True)
    if attempt.ended is not None:
        if attempt.ended.outcome is Outcome.SUCCEEDED:
            return WAIT if evidence.rules_are_behind else Decision(JobState.SUCCEEDED)
        return Decision(JobState.RECOVERING, attempt.ended.reason or Reason.RUNNER_LOST, attempt.ended.detail)
    if (late := _past_total(job, now) or _past_idle(job, evidence)) is not None:
        return late
    if evidence.observation is not None and evidence.left_nothing:
        if _may_be_on_its_way(job, evidence.observation, evidence):
            return WAIT
        said = f"the cluster says {evidence.observation.state}: {_last_line(evidence.observation.message)}".rstrip(": ")
        detail = f"the runner left without a last word; {said}"
        return Decision(JobState.RECOVERING, Reason.RUNNER_LOST, detail, keep_output=True)
    heard_at = evidence.heard_at or attempt.heartbeat_at or attempt.created_at
    silence_s = (now - max(heard_at, evidence.listening_since)).total_seconds()
    if silence_s > job.spec.timeouts.heartbeat_s + (0.0 if attempt.heartbeat_at else START_GRACE_S):
        detail = f"its runner has been silent for {silence_s:.0f} s, longer than heartbeat_s allows"
        return Decision(JobState.RECOVERING, Reason.NO_HEARTBEAT, detail, stop=True, keep_output=True)
    if evidence.ruling is not None:
        return Decision(JobState.PAUSING, evidence.ruling.reason, evidence.ruling.detail)
    return WAIT


def _may_be_on_its_way(job: Job, observation: Observation, evidence: Evidence) -> bool:
    """Whether another scheduler began this attempt so shortly ago that the cluster may not have heard of it yet."""
    unheard_of = job.state is JobState.STARTING and observation.state is LaunchState.UNKNOWN
    began_before = job.state_since < evidence.listening_since
    return unheard_of and began_before and evidence.now - job.state_since <= timedelta(seconds=HANDOVER_S)


def _past_total(job: Job, now: datetime) -> Decision | None:
    limit = job.spec.timeouts.total_s
    if limit is None or now - job.created_at <= timedelta(seconds=limit):
        return None
    detail = f"it is older than its total_s of {limit:g} s"
    return Decision(JobState.FAILED, Reason.TOTAL_DEADLINE, detail, stop=job.state.active)


def _past_idle(job: Job, evidence: Evidence) -> Decision | None:
    limit = job.spec.timeouts.idle_s
    if limit is None or job.state is not JobState.RUNNING:
        return None
    since = max(evidence.last_step_at or job.state_since, job.state_since, evidence.listening_since)
    if evidence.now - since <= timedelta(seconds=limit):
        return None
    detail = f"no step after {evidence.attempt.last_step} for longer than its idle_s of {limit:g} s"
    return Decision(JobState.FAILED, Reason.IDLE_DEADLINE, detail, stop=True)


def _stop_if(evidence: Evidence, due: bool) -> Decision:
    # Where the cluster does not answer, asking it to stop something would not be heard either.
    return Decision(stop=due and evidence.observation is not None)


def _grace_is_over(job: Job, evidence: Evidence) -> bool:
    since = max(job.state_since, evidence.listening_since)
    return evidence.now - since > timedelta(seconds=job.spec.timeouts.stop_grace_s)


def _saved_at(evidence: Evidence) -> int | None:
    """The step of the checkpoint with which the attempt left as it was told."""
    ended = evidence.attempt.ended
    return ended.checkpoint_step if ended is not None and ended.outcome is Outcome.STOPPED else None


def _last_line(text: str) -> str:
    """The line of a traceback that names the error; all of it is kept in the job's log."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
