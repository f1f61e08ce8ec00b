"""What fits where: pure reckoning over the nodes of a cluster and the workers of jobs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from service.errors import FieldProblem
from service.jobs import Job, JobSpec
from service.scheduler.launcher import ClusterCapacity, NodeResources


@dataclass(frozen=True)
class Admission:
    """The queue judged against the cluster: who starts now, and why each of the others waits."""

    start: tuple[Job, ...]
    waiting: tuple[tuple[Job, str], ...]


def placement_problems(spec: JobSpec, capacity: ClusterCapacity) -> list[FieldProblem]:
    """Why the cluster could not hold the job even if it were empty; nothing when it could."""
    most = capacity.max_workers(spec.resources)
    if spec.num_workers <= most:
        return []
    return [FieldProblem("/num_workers", "exceeds_cluster", _too_large(spec, most))]


def admit(queued: Sequence[Job], active: Iterable[Job], capacity: ClusterCapacity) -> Admission:
    """First come, first served: a job that must wait holds back all behind it, so that none starves.

    A job larger than the whole cluster holds back nobody: it waits for nodes, not for its turn.
    """
    nodes = list(capacity.nodes)
    for job in active:
        nodes = _take(nodes, job.spec) or nodes
    start: list[Job] = []
    waiting: list[tuple[Job, str]] = []
    blocker: Job | None = None
    for job in queued:
        most = capacity.max_workers(job.spec.resources)
        if job.spec.num_workers > most:
            waiting.append((job, _too_large(job.spec, most)))
        elif blocker is not None:
            waiting.append((job, f"behind {blocker.id}, which waits for room"))
        elif (rest := _take(nodes, job.spec)) is None:
            blocker = job
            waiting.append((job, f"the cluster is busy; {job.spec.num_workers} workers do not fit beside its jobs"))
        else:
            nodes = rest
            start.append(job)
    return Admission(tuple(start), tuple(waiting))


def _too_large(spec: JobSpec, most: int) -> str:
    need = f"{spec.resources.cpus:g} CPU" + (f" and {spec.resources.gpus} GPU" if spec.resources.gpus else "")
    return (
        f"{spec.num_workers} workers of {need} each, but the whole cluster holds {most}; "
        "lower num_workers or resources, or add nodes (a local head: SYNCBN_LOCAL_RAY_CPUS)"
    )


def _take(nodes: list[NodeResources], spec: JobSpec) -> list[NodeResources] | None:
    """Return the nodes less what the job's workers use, first fit; None where they do not all fit."""
    rest, missing = [], spec.num_workers
    for node in nodes:
        count = min(missing, ClusterCapacity((node,)).max_workers(spec.resources))
        missing -= count
        rest.append(
            replace(
                node,
                cpus=node.cpus - count * spec.resources.cpus,
                gpus=node.gpus - count * spec.resources.gpus,
                memory_gib=node.memory_gib - count * (spec.resources.memory_gib or 0.0),
            )
        )
    return None if missing else rest
