"""Follows the runs of jobs that have rules: reads what is new of each, a bounded piece at a time."""

from collections.abc import Collection
from dataclasses import dataclass

from service.jobs import Job
from service.scheduler.rules import Ruling, has_rules
from service.scheduler.run_course import RunCourse
from service.store import JobStore

_EVENTS_AT_ONCE = 500
_LOSSES_AT_ONCE = 100_000
"""Steps of ranks, read in some 0.1 s."""


@dataclass(frozen=True)
class Look:
    """What a job's rules say now; ``behind`` says that there is more to read before they have the last word."""

    ruling: Ruling | None = None
    behind: bool = False


_NOTHING = Look()


@dataclass
class _Followed:
    course: RunCourse
    looked_at_s: float = float("-inf")
    behind: bool = True


class RuleWatch:
    """The courses of running jobs that have rules, in memory; what is forgotten is read anew from the store.

    Looks at a job at most every ``every_s``, save while it is behind. Times are seconds of a clock that is never set.
    """

    def __init__(self, store: JobStore, every_s: float = 1.0) -> None:
        self._store = store
        self._every_s = every_s
        self._followed: dict[str, _Followed] = {}

    def look(self, job: Job, now_s: float, *, is_last: bool = False) -> Look:
        """What the rules of a running job say, where it is time to look or this ``is_last`` look at it.

        Cost: for a job without rules nothing, else some queries and at most 0.1 s. Raises: StoreUnavailable.
        """
        if not has_rules(job.spec):
            return _NOTHING
        followed = self._followed.setdefault(job.id, _Followed(RunCourse(job.spec)))
        if not followed.behind and not is_last and now_s - followed.looked_at_s < self._every_s:
            return _NOTHING
        followed.looked_at_s = now_s
        followed.behind = self._read(job, followed.course)
        # Half read, a series may look like a plateau that it has left since.
        return Look(behind=True) if followed.behind else Look(followed.course.ruling())

    def forget_all_but(self, job_ids: Collection[str] = ()) -> None:
        """Drop what is known of other jobs."""
        self._followed = {name: followed for name, followed in self._followed.items() if name in job_ids}

    def _read(self, job: Job, course: RunCourse) -> bool:
        """Whether there is more than was read."""
        # Asked first: whatever a rank told up to this step is then among the events.
        told = self._store.told_step(job.id) or 0
        events = self._store.events(job.id, course.last_seq, _EVENTS_AT_ONCE, course.topics)
        course.take_events(events)
        if len(events) == _EVENTS_AT_ONCE:
            return True
        if not course.wants_losses or told <= course.last_step:
            return False
        last_step = min(told, course.last_step + max(1, _LOSSES_AT_ONCE // job.spec.num_workers))
        window = {"first_step": course.last_step + 1, "last_step": last_step}
        course.take_losses(self._store.metric(job.id, "train/loss", max_points=None, **window), last_step)
        return last_step < told
