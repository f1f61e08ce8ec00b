"""What each verb means in each state of a job, as a table; where it means nothing, the way out."""

from collections.abc import Callable, Mapping
from enum import StrEnum

from service.errors import Conflict
from service.jobs import Job, JobState
from service.store import JobStore

TRIES = 20
"""How often a change is tried again because someone else changed the job in between."""


class Verb(StrEnum):
    """What may be asked of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    CHECKPOINT = "checkpoint"
    RETRY = "retry"


_S = JobState

MOVES: Mapping[Verb, Mapping[JobState, JobState]] = {
    Verb.CANCEL: {
        _S.QUEUED: _S.CANCELLED,
        _S.PAUSED: _S.CANCELLED,
        _S.STARTING: _S.CANCELLING,
        _S.RUNNING: _S.CANCELLING,
        _S.RECOVERING: _S.CANCELLING,
        _S.PAUSING: _S.CANCELLING,
    },
    Verb.PAUSE: {_S.QUEUED: _S.PAUSED, _S.STARTING: _S.PAUSING, _S.RUNNING: _S.PAUSING},
    Verb.RESUME: {_S.PAUSED: _S.QUEUED},
    # These do not move the job itself: one asks its workers, the other makes a new job.
    Verb.CHECKPOINT: {_S.STARTING: _S.STARTING, _S.RUNNING: _S.RUNNING},
    Verb.RETRY: {_S.SUCCEEDED: _S.SUCCEEDED, _S.FAILED: _S.FAILED, _S.CANCELLED: _S.CANCELLED},
}
"""Where a verb has something to do: the state that it brings about."""

DONE: Mapping[Verb, frozenset[JobState]] = {
    Verb.CANCEL: frozenset({_S.CANCELLING, _S.CANCELLED}),
    Verb.PAUSE: frozenset({_S.PAUSING, _S.PAUSED}),
    Verb.RESUME: frozenset({_S.QUEUED, _S.STARTING, _S.RUNNING, _S.RECOVERING}),
    Verb.CHECKPOINT: frozenset({_S.PAUSING}),
    Verb.RETRY: frozenset(),
}
"""Where the job is already as the verb would have it, or on its way there."""

_OVER = "it is over; :retry takes it up again in a new job"
_ENDING = "it is about to end; :retry takes it up again once it has"
_NOT_OVER = "only a job that is over can be retried; :cancel it first, or let it go on"

WAYS_OUT: Mapping[Verb, Mapping[JobState, str]] = {
    Verb.CANCEL: dict.fromkeys((_S.SUCCEEDED, _S.FAILED), "there is nothing left to cancel"),
    Verb.PAUSE: {
        _S.RECOVERING: "it holds no checkpoint of now; :pause it when it runs again, or :cancel it",
        _S.CANCELLING: _ENDING,
        **dict.fromkeys((_S.SUCCEEDED, _S.FAILED, _S.CANCELLED), _OVER),
    },
    Verb.RESUME: {
        _S.PAUSING: "it is saving and leaving; :resume it when it is paused",
        _S.CANCELLING: _ENDING,
        **dict.fromkeys((_S.SUCCEEDED, _S.FAILED, _S.CANCELLED), _OVER),
    },
    Verb.CHECKPOINT: {
        _S.QUEUED: "it has nothing new to save; ask when it runs",
        _S.RECOVERING: "it goes on from its last checkpoint; ask when it runs again",
        _S.PAUSED: "it saved when it was paused",
        _S.CANCELLING: "it is about to end",
        **dict.fromkeys((_S.SUCCEEDED, _S.FAILED, _S.CANCELLED), "it is over; there is nothing left to save"),
    },
    Verb.RETRY: dict.fromkeys([state for state in _S if not state.terminal], _NOT_OVER),
}
"""Where a verb is refused, and what to do instead."""


def target(verb: Verb, job: Job) -> JobState | None:
    """The state that ``verb`` shall bring about; None where nothing is left to do. Raises: Conflict."""
    if job.state in DONE[verb]:
        return None
    if job.state in MOVES[verb]:
        return MOVES[verb][job.state]
    already = "already " if job.state.terminal else ""
    raise Conflict(f"{job.id} is {already}{job.state} and cannot {verb}: {WAYS_OUT[verb][job.state]}")


def steer(
    store: JobStore,
    job_id: str,
    verb: Verb,
    act: Callable[[Job, JobState], Job],
    again: Callable[[Job], bool] = lambda job: False,
) -> tuple[Job, bool]:
    """Do what ``verb`` means now: the job, and whether ``act`` changed it.

    ``act`` takes the job as it was judged and the state to bring about, and raises Conflict if the job has changed;
    another writer in between is no reason to fail. Where the job is already as it shall be, ``again`` says whether
    there is something left to do all the same, and the state to bring about is the job's own.
    Raises: Conflict where the verb means nothing.
    """
    for _ in range(TRIES):
        job = store.get(job_id)
        to = target(verb, job)
        if to is None:
            if not again(job):
                return job, False
            to = job.state
        try:
            return act(job, to), True
        except Conflict:
            continue
    raise Conflict(f"{job_id} kept changing while it was asked to {verb}; try again")
