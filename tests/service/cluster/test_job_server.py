"""What Ray's job server answers, and what is made of it."""

import socket

import pytest

from service.cluster.head import LocalRayHead
from service.cluster.job_server import RayJobServer
from service.cluster.launcher import RayLauncher
from service.errors import ClusterUnreachable
from service.jobs import WorkerResources
from service.scheduler.launcher import LaunchState, Observation
from tests.service.cluster.receiver import receiving
from tests.service.cluster.waiting import wait_until


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_missing_or_wrong_token_is_told_from_a_broken_network(ray_head: LocalRayHead, token: str | None) -> None:
    address, _ = ray_head.ensure()
    with RayJobServer(address, token) as stranger, pytest.raises(ClusterUnreachable, match="SYNCBN_RAY_TOKEN"):
        stranger.nodes()


def test_an_address_where_nobody_listens_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with (
            RayJobServer(address, None) as server,
            pytest.raises(ClusterUnreachable, match=f"no connection .*{address}"),
        ):
            server.status("job_1-1")


def test_a_server_that_is_not_ray_is_told() -> None:
    with (
        receiving() as receiver,
        RayJobServer(receiver.url, None) as server,
        pytest.raises(ClusterUnreachable, match="answered 501"),
    ):
        server.nodes()


def test_an_attempt_that_ray_does_not_know_is_unknown_and_its_stop_no_error(ray_head: LocalRayHead) -> None:
    launcher = RayLauncher(ray_head.connect)
    assert launcher.observe("job_none-1") == Observation(LaunchState.UNKNOWN)
    assert launcher.output("job_none-1") == ""
    launcher.stop("job_none-1")


def test_the_capacity_is_that_of_the_head(ray_head: LocalRayHead) -> None:
    capacity = RayLauncher(ray_head.connect).capacity()
    assert [node.cpus for node in capacity.nodes] == [4.0]
    assert capacity.max_workers(WorkerResources()) == 4
    assert capacity.max_workers(WorkerResources(gpus=1)) == 0


def test_a_job_submitted_twice_runs_once_and_its_last_lines_can_be_read(ray_head: LocalRayHead) -> None:
    server = ray_head.connect()
    for _ in range(2):
        server.submit("twice", "echo ran as $WHO; exit 7", {"WHO": "itself"})
    ended = wait_until(
        lambda: [found for found in [server.status("twice")] if found and found[0] == "FAILED"], 60, "end"
    )
    assert "exit code 7" in ended[0][1]
    assert server.log_tail("twice").splitlines().count("ran as itself") == 1
