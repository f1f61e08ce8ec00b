"""How a service that takes its cluster along leaves: what runs saves and tells first, and waits for the next start."""

import time
from collections.abc import Callable

import structlog

from service.jobs import Attempt, JobState, Outcome, Reason, attempt_id
from service.scheduler.launcher import Launcher
from service.store import JobStore

_WITH_RUNNER = frozenset({JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING})
_POLL_S = 0.05

_log = structlog.get_logger("scheduler")


def let_attempts_leave(store: JobStore, launcher: Launcher, timeout_s: float, hurried: Callable[[], bool]) -> None:
    """Stop every attempt, and wait until each has told its last word, or ``timeout_s`` is over, or ``hurried``.

    To be called while runners can still post, and when no scheduler acts any more. An attempt that has not reported
    yet is stopped and not waited for: it has nothing to tell.

    Raises: ClusterUnreachable, StoreUnavailable where they do not answer: there is nothing to wait for then.
    """
    deadline = time.monotonic() + timeout_s
    awaited = [job for job in store.unfinished() if job.state in _WITH_RUNNER]
    for job in awaited:
        launcher.stop(attempt_id(job.id, job.attempt))
    while time.monotonic() < deadline and not hurried():
        awaited = [job for job in awaited if _has_more_to_tell(store.attempt(job.id, job.attempt))]
        if not awaited:
            return
        time.sleep(_POLL_S)
    _log.warning("not waiting any longer for jobs to save and report", jobs=[job.id for job in awaited])


def set_aside(store: JobStore) -> None:
    """Let the jobs that ran wait for the next start of the service instead of pretending to run.

    Those that came to their end meanwhile are left as they are: the next scheduler reads how they ended.
    """
    for job in store.unfinished():
        if job.state not in (JobState.STARTING, JobState.RUNNING):
            continue
        attempt = store.attempt(job.id, job.attempt)
        if attempt.ended is None or attempt.ended.outcome is Outcome.STOPPED:
            store.transition(job, JobState.RECOVERING, reason=Reason.SERVICE_STOPPED, detail=_detail(attempt))


def _has_more_to_tell(attempt: Attempt) -> bool:
    return attempt.heartbeat_at is not None and attempt.ended is None


def _detail(attempt: Attempt) -> str:
    step = attempt.ended.checkpoint_step if attempt.ended else None
    saved = "" if step is None else f", having saved at step {step}"
    return f"the service was stopped and its local Ray head with it{saved}; goes on when the service is back"
