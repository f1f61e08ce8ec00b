"""The service's side of Ray: each attempt is one Ray job whose driver is the runner."""

from collections.abc import Callable

from service.cluster.job_server import RayJobServer
from service.jobs import LaunchRequest
from service.scheduler.launcher import ClusterCapacity, LaunchState, NodeResources, Observation

_STOP_WAIT_S = 10


class RayLauncher:
    """Implements `service.scheduler.launcher.Launcher` over a Ray job server.

    ``connect`` gives the server to talk to, each time anew: with a local head it is `LocalRayHead.connect`, which
    starts the head where it is gone (its attempts are then unknown). ``python`` is the interpreter on the head node.
    """

    def __init__(self, connect: Callable[[], RayJobServer], python: str = "python") -> None:
        self._connect = connect
        self._python = python

    def capacity(self) -> ClusterCapacity:
        """Totals of the nodes that are alive."""
        return ClusterCapacity(
            tuple(
                NodeResources(
                    cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0), memory_gib=total.get("memory", 0.0) / 2**30
                )
                for total in self._connect().nodes()
            )
        )

    def launch(self, request: LaunchRequest, ingest_token: str) -> None:
        """Submit the runner as a Ray job named as the attempt; one that is there already is left alone."""
        environment = {
            "SYNCBN_RUN": request.model_dump_json(),
            "SYNCBN_INGEST_TOKEN": ingest_token,
            "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
        }
        # exec: the runner must be the direct child of Ray's supervisor, whose loss it watches for.
        entrypoint = f"exec {self._python} -P -m service.cluster.runner"
        self._connect().submit(request.attempt_id, entrypoint, environment)

    def observe(self, attempt_id: str) -> Observation:
        """Ray's word on the attempt."""
        found = self._connect().status(attempt_id)
        if found is None:
            return Observation(LaunchState.UNKNOWN)
        word, message = found
        return Observation(LaunchState(word.lower()), message)

    def stop(self, attempt_id: str) -> None:
        """Ask Ray to end the runner, whose ranks have 5 s to save; Ray itself kills it after 10 s."""
        self._connect().stop(attempt_id)

    def output(self, attempt_id: str) -> str:
        """The last 200 lines of the runner and, as Ray forwards them, of its ranks."""
        return self._connect().log_tail(attempt_id)
