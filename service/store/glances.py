"""Glances: the few columns that tell whether anything about a job has changed, for many jobs at once."""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from service.jobs import JobState, Progress
from service.store.schema import jobs

_IDS_AT_ONCE = 500


@dataclass(frozen=True)
class Glance:
    """What a follower of a job needs to know at any time; equal glances mean that there is nothing new."""

    state: JobState
    num_events: int
    num_logs: int
    progress_json: str | None

    @property
    def progress(self) -> Progress | None:
        """How far the job has come."""
        return None if self.progress_json is None else Progress.model_validate_json(self.progress_json)


def glance_at(connection: Connection, ids: Iterable[str]) -> dict[str, Glance]:
    """A glance at each of the jobs that exist; one query for every 500."""
    wanted = sorted(set(ids))
    found: dict[str, Glance] = {}
    for start in range(0, len(wanted), _IDS_AT_ONCE):
        some = wanted[start : start + _IDS_AT_ONCE]
        columns = (jobs.c.id, jobs.c.state, jobs.c.num_events, jobs.c.num_logs, jobs.c.progress)
        query = select(*columns).where(jobs.c.id.in_(some))
        for job_id, state, num_events, num_logs, progress in connection.execute(query):
            found[job_id] = Glance(JobState(state), num_events, num_logs, progress)
    return found


def count_by_state(connection: Connection) -> dict[JobState, int]:
    """How many jobs are in each state; states without any are absent."""
    query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
    return {JobState(state): count for state, count in connection.execute(query)}
