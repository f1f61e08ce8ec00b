"""Who starts now, and why each of the others waits: the queue judged against jobs before, quotas and room.

The line. Within an owner the greater priority goes first, then the older job. Between owners, the one with the
fewest workers goes first, where a job ahead in the line counts as if it ran already; of equals the one whose job is
older. So an owner who holds nothing is always next, and one owner's hundred jobs delay another's first by one job.

Holding back. The first job in the line that does not fit waits for room, and everything behind it waits too, whoever
owns it: small jobs would otherwise take each piece of room as it becomes free, and the large one would never start.
Its owner keeps that place at later looks, although the others' shares change as their jobs end; else a large job
would come first, hold everyone back, and be overtaken just before its room is free. The owner loses the place when
one of its jobs starts, or none of them can use it. How long a job took or will take is not known, so nothing is
filled in behind one that waits.

Aside. A job that waits for other jobs, is larger than the empty cluster, or larger than its owner's quota holds
back nobody and stands behind the line. A job that its owner's quota keeps waiting holds back that owner alone.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from service.jobs import Job, JobState, Phase, Quota, Reason
from service.scheduler.launcher import ClusterCapacity
from service.scheduler.placement import free_nodes, take, too_large

QuotaOf = Callable[[str], Quota]
"""The quota of an owner."""


@dataclass(frozen=True)
class Waiting:
    """A job that does not start now: its place among all that wait, from 1, and why."""

    job: Job
    position: int
    phase: Phase
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Admission:
    """The queue, judged: who starts now, who waits and why, and who waits in vain for another job (and which)."""

    start: tuple[Job, ...]
    waiting: tuple[Waiting, ...]
    in_vain: tuple[tuple[Job, str], ...] = ()


def unlimited(owner: str) -> Quota:
    """No limit, whoever asks."""
    return Quota()


def admit(
    queued: Sequence[Job],
    active: Iterable[Job],
    capacity: ClusterCapacity | None,
    *,
    quota_of: QuotaOf = unlimited,
    states_before: Mapping[str, JobState] | None = None,
    cluster_error: str = "",
) -> Admission:
    """Judge the queue.

    ``queued`` and ``active`` are in order of age. ``states_before`` tells the states of all jobs that queued ones
    wait for; one that is missing there no longer exists. Without ``capacity`` nobody starts, for ``cluster_error``.
    """
    active = list(active)
    aside: list[tuple[Job, _Why]] = []
    in_vain: list[tuple[Job, str]] = []
    able: list[Job] = []
    for job in queued:
        if lost := _ended_otherwise(job, states_before or {}):
            in_vain.append((job, lost))
        elif why := _stands_aside(job, states_before or {}, capacity, quota_of(job.owner)):
            aside.append((job, why))
        else:
            able.append(job)
    start, kept = _walk(line(able, active), active, capacity, quota_of, cluster_error)
    waiting = [Waiting(job, place, *why) for place, (job, why) in enumerate([*kept, *aside], start=1)]
    return Admission(tuple(start), tuple(waiting), tuple(in_vain))


def line(able: Sequence[Job], active: Iterable[Job]) -> list[Job]:
    """The jobs in the order in which they get room. Takes ``n log n`` for ``n`` jobs."""
    workers = _workers_by_owner(active)
    own: dict[str, deque[Job]] = {}
    for job in sorted(able, key=lambda job: (-job.spec.priority, *_age(job))):
        own.setdefault(job.owner, deque()).append(job)
    ordered: list[Job] = []
    if (first := _owner_that_waits_for_room(able)) is not None:
        ordered.append(own[first].popleft())
        workers[first] += ordered[0].spec.num_workers
    turns = [(workers[owner], *_age(jobs[0]), owner) for owner, jobs in own.items() if jobs]
    heapq.heapify(turns)
    while turns:
        *_, owner = heapq.heappop(turns)
        job = own[owner].popleft()
        ordered.append(job)
        workers[owner] += job.spec.num_workers
        if own[owner]:
            heapq.heappush(turns, (workers[owner], *_age(own[owner][0]), owner))
    return ordered


_Why = tuple[Phase, Reason, str]

# Neither names a job: each start would change what is said of every job behind, and each change is an event.
_BEHIND: _Why = (Phase.WAITING_RESOURCES, Reason.BEHIND_OTHERS, "waits its turn; jobs before it wait for room")
_BEHIND_OWN: _Why = (Phase.WAITING_QUOTA, Reason.BEHIND_OTHERS, "waits its turn; its owner's jobs before it wait")


def _walk(
    ordered: Sequence[Job],
    active: Sequence[Job],
    capacity: ClusterCapacity | None,
    quota_of: QuotaOf,
    cluster_error: str,
) -> tuple[list[Job], list[tuple[Job, _Why]]]:
    if capacity is None:
        away: _Why = (Phase.WAITING_CLUSTER, Reason.CLUSTER_UNREACHABLE, cluster_error)
        return [], [(job, away) for job in ordered]
    nodes, workers = free_nodes(capacity, active), _workers_by_owner(active)
    start: list[Job] = []
    kept: list[tuple[Job, _Why]] = []
    room_is_promised, held_owners = False, set[str]()
    for job in ordered:
        if room_is_promised:
            kept.append((job, _BEHIND))
        elif job.owner in held_owners:
            kept.append((job, _BEHIND_OWN))
        elif over := _over_quota(job, workers[job.owner], quota_of(job.owner)):
            held_owners.add(job.owner)
            kept.append((job, (Phase.WAITING_QUOTA, Reason.OWNER_QUOTA, over)))
        elif (rest := take(nodes, job.spec)) is None:
            room_is_promised = True
            busy = f"the cluster is busy; {job.spec.num_workers} workers do not fit beside its jobs"
            kept.append((job, (Phase.WAITING_RESOURCES, Reason.CLUSTER_FULL, busy)))
        else:
            nodes = rest
            workers[job.owner] += job.spec.num_workers
            start.append(job)
    return start, kept


def _owner_that_waits_for_room(able: Sequence[Job]) -> str | None:
    """The owner whose job was first in the line at the last look and did not fit, if it still waits."""
    claims = [job for job in able if job.reason is Reason.CLUSTER_FULL]
    return min(claims, key=lambda job: (job.queue_position or len(able), *_age(job))).owner if claims else None


def _ended_otherwise(job: Job, states: Mapping[str, JobState]) -> str:
    ends = {name: states.get(name) for name in job.spec.after}
    lost = [f"{name} ({state or 'gone'})" for name, state in ends.items() if state is None or _in_vain(state)]
    return f"it was to start after {', '.join(lost)}" if lost else ""


def _in_vain(state: JobState) -> bool:
    return state.terminal and state is not JobState.SUCCEEDED


def _stands_aside(
    job: Job, states: Mapping[str, JobState], capacity: ClusterCapacity | None, quota: Quota
) -> _Why | None:
    if pending := [f"{name} ({states[name]})" for name in job.spec.after if states[name] is not JobState.SUCCEEDED]:
        return Phase.WAITING_JOBS, Reason.WAITING_FOR_JOBS, f"starts after {', '.join(pending)}"
    limit, wanted = quota.max_running_workers, job.spec.num_workers
    if limit is not None and wanted > limit:
        text = (
            f"{wanted} workers, but {job.owner} may run {limit} at once; lower num_workers, or ask for a larger quota"
        )
        return Phase.WAITING_QUOTA, Reason.OWNER_QUOTA, text
    if capacity is not None and wanted > (most := capacity.max_workers(job.spec.resources)):
        return Phase.WAITING_RESOURCES, Reason.CLUSTER_FULL, too_large(job.spec, most)
    return None


def _over_quota(job: Job, running: int, quota: Quota) -> str:
    limit, wanted = quota.max_running_workers, job.spec.num_workers
    if limit is None or running + wanted <= limit:
        return ""
    return f"{job.owner} may run {limit} workers at once; {wanted} more do not fit beside its jobs"


def _workers_by_owner(active: Iterable[Job]) -> Counter[str]:
    workers: Counter[str] = Counter()
    for job in active:
        workers[job.owner] += job.spec.num_workers
    return workers


def _age(job: Job) -> tuple[datetime, str]:
    return job.created_at, job.id
