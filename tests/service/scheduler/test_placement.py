"""Who starts, who waits and why: admission over the nodes of a cluster."""

from datetime import UTC, datetime

from service.jobs import Job, JobSpec, JobState, WorkerResources
from service.scheduler import ClusterCapacity, NodeResources, admit, placement_problems

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job(name: str, workers: int, cpus: float = 1, gpus: int = 0, state: JobState = JobState.QUEUED) -> Job:
    spec = JobSpec(name=name, epochs=1, num_workers=workers, resources=WorkerResources(cpus=cpus, gpus=gpus))
    return Job(id=name, spec=spec, state=state, version=1, created_at=NOW, updated_at=NOW)


def cluster(*nodes: tuple[float, float]) -> ClusterCapacity:
    return ClusterCapacity(tuple(NodeResources(cpus, gpus, 16.0) for cpus, gpus in nodes))


def names(jobs: tuple[Job, ...]) -> list[str]:
    return [j.id for j in jobs]


def test_jobs_start_in_the_order_they_came_while_there_is_room() -> None:
    admission = admit([job("a", 2), job("b", 2), job("c", 1)], [], cluster((4, 0)))
    assert names(admission.start) == ["a", "b"]
    assert [(j.id, "do not fit" in why) for j, why in admission.waiting] == [("c", True)]


def test_a_small_job_does_not_overtake_one_that_waits_for_room() -> None:
    admission = admit([job("big", 4), job("small", 1)], [job("now", 2)], cluster((4, 0)))
    assert names(admission.start) == []
    assert dict((j.id, why) for j, why in admission.waiting)["small"] == "behind big, which waits for room"


def test_a_job_larger_than_the_cluster_holds_back_nobody() -> None:
    admission = admit([job("huge", 9), job("small", 1)], [], cluster((4, 0)))
    assert names(admission.start) == ["small"]
    assert "the whole cluster holds 4" in admission.waiting[0][1]


def test_a_worker_never_spans_nodes() -> None:
    two_small_nodes = cluster((3, 0), (3, 0))
    assert two_small_nodes.max_workers(WorkerResources(cpus=2)) == 2
    assert names(admit([job("a", 2, cpus=2)], [], two_small_nodes).start) == ["a"]
    assert names(admit([job("a", 3, cpus=2)], [], two_small_nodes).start) == []


def test_gpus_and_memory_count_as_cpus_do() -> None:
    assert cluster((64, 4)).max_workers(WorkerResources(gpus=2)) == 2
    assert cluster((64, 4)).max_workers(WorkerResources(memory_gib=5)) == 3
    assert cluster((64, 0)).max_workers(WorkerResources(gpus=1)) == 0


def test_an_active_job_that_no_longer_fits_does_not_break_the_reckoning() -> None:
    admission = admit([job("a", 1)], [job("was here", 8)], cluster((4, 0)))
    assert names(admission.start) == ["a"]


def test_a_job_too_large_for_an_empty_cluster_is_told_the_field_and_the_remedy() -> None:
    assert placement_problems(JobSpec(name="x", epochs=1, num_workers=4), cluster((4, 0))) == []
    (problem,) = placement_problems(JobSpec(name="x", epochs=1, num_workers=5), cluster((4, 0)))
    assert problem.pointer == "/num_workers"
    assert "lower num_workers" in problem.message
