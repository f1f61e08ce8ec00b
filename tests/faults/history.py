"""What must be true of a job's history in any database at any moment, whatever happened to who wrote it."""

from itertools import pairwise

from service.errors import NotFound
from service.jobs import TRANSITIONS, JobEvent, JobState
from service.store import JobStore

_PAGE = 500


def all_events(store: JobStore, job_id: str) -> list[JobEvent]:
    events: list[JobEvent] = []
    while page := store.events(job_id, events[-1].seq if events else 0, _PAGE):
        events += page
    return events


def path_of(events: list[JobEvent]) -> list[str]:
    """The states that the job has been in, in order."""
    return [event.body["to"] for event in events if event.type == "state_changed"]


def problems_of(store: JobStore, job_id: str) -> list[str]:
    """Each way in which the history of the job contradicts itself; none of a sound one."""
    job, events = store.get(job_id), all_events(store, job_id)
    moves = [event for event in events if event.type == "state_changed"]
    path = path_of(events)
    starts = [event.attempt for event in moves if event.body["to"] == JobState.STARTING]
    num_changes = len(moves) + sum(event.type in ("priority_changed", "cancel_forced") for event in events)
    found = {
        "events have holes": [event.seq for event in events] != list(range(1, len(events) + 1)),
        "the first event is not the birth": path[:1] != ["queued"] or moves[0].body["from"] is not None,
        "a move begins elsewhere": any(after.body["from"] != before.body["to"] for before, after in pairwise(moves)),
        "a move is not allowed": any(to not in TRANSITIONS[JobState(state)] for state, to in pairwise(path)),
        "the state is not where the moves led": path[-1:] != [job.state],
        "the version is not the number of changes": job.version != num_changes,
        "attempts are not numbered": starts != list(range(1, job.attempt + 1)),
        "the end has no time": job.state.terminal is not (job.finished_at is not None),
        "attempts are not those that were started": not _has_attempts(store, job_id, job.attempt),
    }
    return [f"{job_id}: {what} ({path}, version {job.version})" for what, wrong in found.items() if wrong]


def _has_attempts(store: JobStore, job_id: str, count: int) -> bool:
    try:
        for number in range(1, count + 1):
            store.attempt(job_id, number)
    except NotFound:
        return False
    try:
        store.attempt(job_id, count + 1)
    except NotFound:
        return True
    return False
