"""Follows the runs of jobs that have rules: reads what is new of each, a bounded piece at a time."""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from service.jobs import Job
from service.scheduler.rules import Ruling, has_rules
from service.scheduler.run_course import RunCourse
from service.store import JobStore

_ENOUGH_S = 0.05
"""After so long no other job is looked at before the next tick."""

_EVENTS_AT_ONCE = 500
_LOSSES_AT_ONCE = 100_000
"""Steps of ranks, read in some 0.05 s."""


@dataclass(frozen=True)
class Look:
    """What a job's rules say now; ``behind`` says that there is more to read before they have the last word."""

    ruling: Ruling | None = None
    behind: bool = False


@dataclass
class _Followed:
    course: RunCourse
    looked_at_s: float = float("-inf")
    behind: bool = True


class RuleWatch:
    """The courses of running jobs that have rules, in memory; what is forgotten is read anew from the store.

    Looks at a job at most every ``every_s``, save while it is behind.
    """

    def __init__(self, store: JobStore, every_s: float = 1.0) -> None:
        self._store = store
        self._every_s = every_s
        self._followed: dict[str, _Followed] = {}

    def look(self, running: Iterable[Job], finished: Collection[str] = ()) -> dict[str, Look]:
        """By id, what the rules say of those of the running jobs that it is time to look at, the longest unseen first.

        Of those ``finished``, whose ids these are, there is always a word, for it is the last one.
        Cost: some 5 ms a job, of which at most a tenth of a second is spent on all together; nothing for jobs without
        rules. Raises: StoreUnavailable.
        """
        began = time.monotonic()
        ruled = [job for job in running if has_rules(job.spec)]
        looks = {job.id: Look(behind=True) for job in ruled if job.id in finished}
        for job in self._due(ruled, finished, began):
            looks[job.id] = self._look(job)
            if time.monotonic() - began > _ENOUGH_S:
                break
        return looks

    def forget_all_but(self, job_ids: Collection[str] = ()) -> None:
        """Drop what is known of other jobs."""
        self._followed = {name: followed for name, followed in self._followed.items() if name in job_ids}

    def _due(self, jobs: Collection[Job], finished: Collection[str], now_s: float) -> list[Job]:
        due = []
        for job in jobs:
            followed = self._followed.setdefault(job.id, _Followed(RunCourse(job.spec)))
            if followed.behind or job.id in finished or now_s - followed.looked_at_s >= self._every_s:
                due.append(job)
        return sorted(due, key=lambda job: (job.id not in finished, self._followed[job.id].looked_at_s))

    def _look(self, job: Job) -> Look:
        followed = self._followed[job.id]
        followed.looked_at_s = time.monotonic()
        followed.behind = self._read(job, followed.course)
        # Half read, a series may look like a plateau that it has left since.
        return Look(behind=True) if followed.behind else Look(followed.course.ruling())

    def _read(self, job: Job, course: RunCourse) -> bool:
        """Whether there is more than was read."""
        # Asked first: whatever a rank told up to this step is then among the events.
        told = self._store.told_step(job.id) or 0 if course.wants_losses else 0
        events = self._store.events(job.id, course.last_seq, _EVENTS_AT_ONCE, course.topics)
        course.take_events(events)
        if len(events) == _EVENTS_AT_ONCE:
            return True
        if told <= course.last_step:
            return False
        last_step = min(told, course.last_step + max(1, _LOSSES_AT_ONCE // job.spec.num_workers))
        window = {"first_step": course.last_step + 1, "last_step": last_step}
        course.take_losses(self._store.metric(job.id, "train/loss", max_points=None, **window), last_step)
        return last_step < told
