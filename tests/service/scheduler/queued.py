"""Jobs and clusters for tables about the queue, made in one line."""

from datetime import UTC, datetime, timedelta

from service.jobs import ANONYMOUS, Job, JobSpec, JobState, Reason, WorkerResources
from service.scheduler import ClusterCapacity, NodeResources

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job(
    name: str,
    workers: int = 1,
    *,
    owner: str = ANONYMOUS,
    priority: int = 0,
    age_s: float = 0.0,
    after: tuple[str, ...] = (),
    cpus: float = 1,
    gpus: int = 0,
    state: JobState = JobState.QUEUED,
    reason: Reason | None = None,
    queue_position: int | None = None,
) -> Job:
    spec = JobSpec(
        name=name,
        epochs=1,
        num_workers=workers,
        priority=priority,
        after=after,
        resources=WorkerResources(cpus=cpus, gpus=gpus),
    )
    born = NOW - timedelta(seconds=age_s)
    return Job(
        id=name,
        owner=owner,
        spec=spec,
        state=state,
        state_since=born,
        reason=reason,
        queue_position=queue_position,
        version=1,
        created_at=born,
        updated_at=born,
    )


def cluster(*nodes: tuple[float, float]) -> ClusterCapacity:
    """Nodes of so many CPUs and GPUs, and 16 GiB each."""
    return ClusterCapacity(tuple(NodeResources(cpus, gpus, 16.0) for cpus, gpus in nodes))
