"""What fits where: workers of jobs on the nodes of a cluster."""

from service.jobs import JobSpec, WorkerResources
from service.scheduler import ClusterCapacity, NodeResources, placement_problems
from service.scheduler.placement import free_nodes, has_room
from tests.service.scheduler.queued import cluster, job


def test_a_worker_never_spans_nodes() -> None:
    two_small_nodes = cluster((3, 0), (3, 0))
    assert two_small_nodes.max_workers(WorkerResources(cpus=2)) == 2
    assert has_room(job("a", 2, cpus=2), [], two_small_nodes)
    assert not has_room(job("a", 3, cpus=2), [], two_small_nodes)


def test_gpus_and_memory_count_as_cpus_do() -> None:
    assert cluster((64, 4)).max_workers(WorkerResources(gpus=2)) == 2
    assert cluster((64, 4)).max_workers(WorkerResources(memory_gib=5)) == 3
    assert cluster((64, 0)).max_workers(WorkerResources(gpus=1)) == 0


def test_what_active_jobs_hold_is_taken_from_the_nodes() -> None:
    left = free_nodes(cluster((3, 0), (3, 2)), [job("a", 4), job("b", 1, gpus=1)])
    assert left == [NodeResources(0, 0, 16.0), NodeResources(1, 1, 16.0)]
    assert has_room(job("c", 1), [job("a", 4), job("b", 1, gpus=1)], cluster((3, 0), (3, 2)))


def test_an_active_job_that_no_longer_fits_does_not_break_the_reckoning() -> None:
    assert free_nodes(cluster((4, 0)), [job("was here", 8), job("b", 1)]) == [NodeResources(3, 0, 16.0)]


def test_a_job_too_large_for_an_empty_cluster_is_told_the_field_and_the_remedy() -> None:
    assert placement_problems(JobSpec(name="x", epochs=1, num_workers=4), cluster((4, 0))) == []
    (problem,) = placement_problems(JobSpec(name="x", epochs=1, num_workers=5), cluster((4, 0)))
    assert problem.pointer == "/num_workers"
    assert "lower num_workers" in problem.message
    assert placement_problems(JobSpec(name="x", epochs=1, num_workers=1), ClusterCapacity(())) != []
