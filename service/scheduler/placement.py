"""What fits where: pure reckoning over the nodes of a cluster and the workers of jobs."""

from collections.abc import Iterable
from dataclasses import replace

from service.errors import FieldProblem
from service.jobs import Job, JobSpec
from service.scheduler.launcher import ClusterCapacity, NodeResources


def placement_problems(spec: JobSpec, capacity: ClusterCapacity) -> list[FieldProblem]:
    """Why the cluster could not hold the job even if it were empty; nothing when it could."""
    most = capacity.max_workers(spec.resources)
    if spec.num_workers <= most:
        return []
    return [FieldProblem("/num_workers", "exceeds_cluster", too_large(spec, most))]


def too_large(spec: JobSpec, most: int) -> str:
    """Say that the empty cluster holds only ``most`` such workers, and the remedies."""
    need = f"{spec.resources.cpus:g} CPU" + (f" and {spec.resources.gpus} GPU" if spec.resources.gpus else "")
    return (
        f"{spec.num_workers} workers of {need} each, but the whole cluster holds {most}; "
        "lower num_workers or resources, or add nodes (a local head: SYNCBN_LOCAL_RAY_CPUS)"
    )


def free_nodes(capacity: ClusterCapacity, active: Iterable[Job]) -> list[NodeResources]:
    """The nodes less what active jobs hold; one that no longer fits beside the others is left out."""
    nodes = list(capacity.nodes)
    for job in active:
        nodes = take(nodes, job.spec) or nodes
    return nodes


def has_room(job: Job, others: Iterable[Job], capacity: ClusterCapacity) -> bool:
    """Whether the job fits beside ``others``."""
    return take(free_nodes(capacity, others), job.spec) is not None


def take(nodes: list[NodeResources], spec: JobSpec) -> list[NodeResources] | None:
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
