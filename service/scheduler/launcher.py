"""The seam between deciding and running: what the scheduler needs of a cluster, whichever it is."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from service.jobs import LaunchRequest, WorkerResources


class LaunchState(StrEnum):
    """What a cluster knows of an attempt."""

    UNKNOWN = "unknown"
    """The cluster answers, and has never heard of it (or has forgotten)."""
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def over(self) -> bool:
        """Whether no process of the attempt is left that the cluster knows of."""
        return self not in (LaunchState.PENDING, LaunchState.RUNNING)


@dataclass(frozen=True)
class Observation:
    """A cluster's answer about one attempt; ``message`` is the cluster's own words."""

    state: LaunchState
    message: str = ""


@dataclass(frozen=True)
class NodeResources:
    """What one node of the cluster holds in all, used or not."""

    cpus: float
    gpus: float
    memory_gib: float


@dataclass(frozen=True)
class ClusterCapacity:
    """The nodes that are there. Says nothing of what an autoscaler might still add."""

    nodes: tuple[NodeResources, ...]

    def max_workers(self, resources: WorkerResources) -> int:
        """How many such workers the empty cluster holds at once; a worker never spans nodes."""
        return sum(_fit(node, resources) for node in self.nodes)


def _fit(node: NodeResources, worker: WorkerResources) -> int:
    room = [node.cpus / worker.cpus]
    if worker.gpus:
        room.append(node.gpus / worker.gpus)
    if worker.memory_gib:
        room.append(node.memory_gib / worker.memory_gib)
    return int(min(room) + 1e-9)


class Launcher(Protocol):
    """Starts, watches and ends attempts. Each method returns within seconds or raises `ClusterUnreachable`."""

    def capacity(self) -> ClusterCapacity:
        """What the cluster holds in all."""

    def launch(self, request: LaunchRequest, ingest_token: str) -> None:
        """Start the attempt. Asking again for the same attempt starts nothing new."""

    def observe(self, attempt_id: str) -> Observation:
        """What the cluster knows of the attempt now."""

    def stop(self, attempt_id: str) -> None:
        """Ask for the attempt's end; it is over when `observe` says so. Unknown attempts are no error."""

    def output(self, attempt_id: str) -> str:
        """The last lines that the attempt's processes wrote, or "" where none are left."""
